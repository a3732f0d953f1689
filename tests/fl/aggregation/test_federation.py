"""Whole federations under every rule, in this process: what travels, what is trained, what lies in the folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from fl.adapters import lora_parameters
from fl.aggregation.parts import A, B, cut
from fl.checkpoint import latest_adapter
from fl.client import LoRAClient, Site, open_client
from fl.client_app import make_client_app
from fl.messages import from_records
from fl.server import first_adapter, serve
from fl.settings import Aggregation, FederatedSettings
from lab.command.entry import Run
from lab.device import open_device
from lab.learning.training import evaluate
from lab.models.sources import load_model
from lab.settings import UserError
from tests.federated import InProcessGrid, small_settings, write_dialogues
from tests.fl.aggregation.oracle import adapter_of

MIXED = ("project.site_ranks=[2,4,8]", "project.site_alphas=[16,4,16]", "project.residual_rank=48")


def settings_of(folder: Path, rule: Aggregation, *overrides: str) -> FederatedSettings:
    data = write_dialogues(folder / "d.jsonl", 30)
    small = ("model.architecture.layers=1", "model.lora_targets=[q_proj,down_proj]", "project.residual_rank=48")
    return small_settings(data, 3, f"project.aggregation={rule.name}", *small, *overrides)


def federate(settings: FederatedSettings, folder: Path, *, backwards: bool = False) -> tuple[bytes, InProcessGrid]:
    """The bytes of all adapters of a run; `backwards`: the last site that is asked replies first."""
    grid = InProcessGrid(make_client_app(lambda context: settings), settings.project.num_clients)
    grid.order = (lambda ids: ids[::-1]) if backwards else grid.order
    serve(grid, settings, Run(folder))
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("adapter_model.safetensors"))), grid


def mixed_where_possible(rule: Aggregation) -> tuple[str, ...]:
    return MIXED if rule.takes_ranks else ()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[Aggregation, bytes]:
    """The bytes of all adapters of one run of each rule."""
    root = tmp_path_factory.mktemp("rules")
    runs = {rule: settings_of(root, rule, *mixed_where_possible(rule)) for rule in Aggregation}
    return {rule: federate(settings, root / rule.name)[0] for rule, settings in runs.items()}


@pytest.mark.parametrize("rule", list(Aggregation))
def test_a_run_gives_the_same_bytes_whatever_the_order_of_its_sites(
    rule: Aggregation, tmp_path: Path, adapters: dict[Aggregation, bytes]
) -> None:
    settings = settings_of(tmp_path, rule, *mixed_where_possible(rule))
    again, grid = federate(settings, tmp_path / "run", backwards=True)
    assert [other for other in Aggregation if adapters[other] == again] == [rule]
    trained = [message for message in grid.sent if message.metadata.message_type == "train"]
    assert [len(trained), grid.sent[-1].metadata.message_type] == [6, "evaluate"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [("lost_norm" in row) for row in rows[:2]] == [rule.takes_ranks] * 2
    assert rows[-1]["eval_loss_after"] < rows[-1]["eval_loss_before"]


@pytest.mark.parametrize(("rule", "sent"), [(Aggregation.ffa, [B, B]), (Aggregation.rolora, [B, A])])
def test_only_the_factor_that_is_trained_travels_to_the_server(
    rule: Aggregation, sent: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, replies = settings_of(tmp_path, rule), []
    carry = InProcessGrid.answer

    def noted(self: InProcessGrid, message: Any, partition: int) -> Any:
        reply = carry(self, message, partition)
        if message.metadata.message_type == "train":
            replies.append(from_records(reply.content).index)
        return reply

    monkeypatch.setattr(InProcessGrid, "answer", noted)
    federate(settings, tmp_path / "run")
    whole = first_adapter(settings)
    for number, index in enumerate(replies):
        assert list(index.names) == [name for name in whole if sent[number // 3] in name]
    last = load_file(str(latest_adapter(tmp_path / "run" / "adapters") / "adapter_model.safetensors"))  # type: ignore[operator]
    unchanged = [name for name in whole if torch.equal(last[name], whole[name])]
    assert unchanged == ([name for name in whole if A in name] if rule is Aggregation.ffa else [])


def clients_of(settings: FederatedSettings) -> list[LoRAClient]:
    return [open_client(settings, Site(index)) for index in range(settings.project.num_clients)]


def test_sites_of_every_rank_and_scale_hold_the_same_model(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, Aggregation.svd, *MIXED)
    adapter = {name: tensor + 0.01 for name, tensor in first_adapter(settings).items()}
    clients, losses, ranks = clients_of(settings), [], []
    held_out = clients[0].split.held_out
    for client in (*clients, *clients[::-1]):  # ranks grow and shrink again in one process
        client.load(adapter)
        losses.append(evaluate(client.base.model, held_out, 2))
        ranks.append({len(x) for name, x in lora_parameters(client.base.model).items() if A in name})
    assert ranks == [{2}, {4}, {8}, {8}, {4}, {2}]
    assert losses == pytest.approx([losses[0]] * 6, rel=1e-6)
    assert losses[:3] == losses[:2:-1]
    clients[0].load(cut(adapter, 2)[0])
    assert abs(evaluate(clients[0].base.model, held_out, 2) - losses[0]) > 1e-4, "the frozen rows do something"


def test_a_site_trains_its_own_rows_and_leaves_the_others(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, Aggregation.svd, *MIXED)
    adapter = {name: tensor + 0.3 * (B in name) for name, tensor in first_adapter(settings).items()}
    for rank, client in zip((2, 4, 8), clients_of(settings)):
        client.load(adapter)
        before = {name: x.clone() for name, x in client.base.model.named_parameters() if ".frozen." in name}
        trained, _ = client.train(1)
        first = cut(adapter, rank)[0]
        assert {name: x.shape for name, x in trained.items()} == {name: x.shape for name, x in first.items()}
        assert all(not torch.equal(trained[name], first[name]) for name in trained)
        after = dict(client.base.model.named_parameters())
        assert all(torch.equal(after[name], x) for name, x in before.items())
        assert bool(before) == (rank < 8)
        # In the scale of the run: so near to what it got only if it was put back into it.
        assert all(float((trained[name] - first[name]).abs().max()) < 0.03 for name in trained if B in name)


@pytest.mark.parametrize("rule", [Aggregation.stack, Aggregation.svd])
def test_any_program_with_peft_loads_both_parts_at_once(rule: Aggregation, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, rule, *MIXED)
    federate(settings, tmp_path / "run")
    folder = latest_adapter(tmp_path / "run" / "adapters")
    assert folder is not None
    client = clients_of(settings)[0]
    client.load(load_file(folder / "adapter_model.safetensors"))
    assert "frozen" in client.base.model.peft_config
    examples = client.split.train[:4]
    ours = evaluate(client.base.model, examples, 2)
    base = load_model(settings.model, open_device(settings.device)).model
    bare = evaluate(base, examples, 2)
    theirs = evaluate(PeftModel.from_pretrained(base, folder), examples, 2)
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert abs(ours - bare) > 1e-3


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ("project.aggregation=average", "project.site_ranks=[2,4,8]"),
            r"project\.aggregation must be stack or svd for sites of ranks \[2, 4, 8\], with lora\.rank=8, got "
            r"'average'",
        ),
        (
            ("project.aggregation=ffa", "project.site_ranks=[4,4,4]"),
            r"project\.aggregation must be stack or svd for sites of ranks \[4, 4, 4\], with lora\.rank=8, got 'ffa'",
        ),
        (
            ("project.aggregation=svd", "project.site_ranks=[2,4,9]"),
            r"project\.site_ranks must be at most lora\.rank=8",
        ),
        (("project.site_ranks=[8,8]",), r"project\.site_ranks must have one value for each of num_clients=3 sites"),
        (("project.site_alphas=[8,0,1]",), r"project\.site_alphas must be greater than 0"),
        (
            ("project.aggregation=stack", "project.residual_rank=47"),
            r"project\.residual_rank must be at least 48 for aggregation=stack, which loses nothing, over 2 rounds of "
            r"3 sites \(aggregation=svd keeps the best part in any rank\), got 47",
        ),
        (
            (
                *("project.aggregation=stack", "project.site_ranks=[8,8,4]", "project.warm_start=before"),
                "project.residual_rank=47",
            ),
            r"project\.residual_rank must be at least 48 for aggregation=stack",
        ),
    ],
)
def test_what_ranks_do_not_allow_is_refused(overrides: tuple[str, ...], line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{line}"):
        small_settings(write_dialogues(tmp_path / "d.jsonl", 30), 3, *overrides)


def test_a_site_without_a_rank_of_its_own_says_so(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, Aggregation.svd, *MIXED)
    data = str(write_dialogues(tmp_path / "own.jsonl", 9))
    with pytest.raises(UserError, match=r"partition-id must be in \[0, 3\) for project\.site_ranks, got 3"):
        open_client(settings, Site(3, data)).load(adapter_of(8, 0))
