"""Sites that share A and keep B: what travels, what stays, what they go on with."""

import json
from pathlib import Path

import pytest
import torch
from flwr.app import Error, Message
from safetensors.torch import load_file

from fl.aggregation.parts import A, B
from fl.client import Site, open_client
from fl.messages import index_of
from fl.server import first_adapter, serve
from fl.settings import Aggregation, FederatedSettings
from lab.command.entry import Run
from lab.settings import UserError
from tests.federated import small_settings, write_dialogues
from tests.fl.aggregation.test_federation import settings_of
from tests.fl.compression.test_link import FaultyGrid


class Watched(FaultyGrid):
    """Keeps the names of the tensors that sites send."""

    def answer(self, message: Message, partition: int) -> Message:
        reply = super().answer(message, partition)
        if message.metadata.message_type == "train" and reply.has_content():
            self.names = [*getattr(self, "names", []), index_of(reply.content).names]
        return reply


def personal(folder: Path, *more: str) -> FederatedSettings:
    own = f"project.site_folder={folder / 'sites'}"
    return settings_of(folder, Aggregation.average, "project.share=A", own, "project.rounds=3", *more)


def own_adapters(folder: Path) -> dict[str, bytes]:
    files = sorted((folder / "sites").rglob("site-*-adapter/adapter_model.safetensors"))
    return {file.parent.name: file.read_bytes() for file in files}


@pytest.mark.parametrize("codec", ["none", "int8"])
def test_b_stays_at_its_site_whatever_order_and_however_often_sites_are_asked(codec: str, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    settings = [personal(folder, f"project.compression.uplink={codec}") for folder in folders]
    grids = [Watched(settings[0]), Watched(settings[1], twice={(1, 0), (2, 2), (3, 1)})]
    grids[1].order = lambda ids: ids[::-1]
    figures = [serve(grid, each, Run(folder / "run")) for grid, each, folder in zip(grids, settings, folders)]
    assert figures[0]["sites_after"] == figures[1]["sites_after"]
    assert figures[0]["eval_loss_after"] < figures[0]["eval_loss_before"]
    whole = first_adapter(settings[0])
    assert {names for grid in grids for names in grid.names} == {tuple(name for name in whole if A in name)}
    kept = [own_adapters(folder) for folder in folders]
    assert kept[0] == kept[1]
    assert len(set(kept[0].values())) == len(kept[0]) == 3, "each site has a B of its own"
    last = load_file(figures[0]["adapter_path"] / "adapter_model.safetensors")
    for folder in sorted((folders[0] / "sites").rglob("site-*-adapter")):
        mine = load_file(folder / "adapter_model.safetensors")
        assert all(torch.equal(mine[name], last[name]) for name in last if A in name)
        assert all(mine[name].any() and not last[name].any() for name in last if B in name)
        client = open_client(settings[0], Site(int(folder.name.split("-")[1])))
        client.load(mine)
        assert client.evaluate() == figures[0]["sites_after"].by_site[str(client.site.index)]


def test_a_lost_round_is_lost_at_the_site_too(tmp_path: Path) -> None:
    """Its A had no part in the mean, so its B goes back as well; a site that was never asked has the same."""

    class Unasked(FaultyGrid):
        def answer(self, message: Message, partition: int) -> Message:
            if (message.metadata.group_id, partition, message.metadata.message_type) == ("3", 1, "train"):
                return Message(Error(5, "gone"), reply_to=message)
            return super().answer(message, partition)

    kept = []
    for name, kind, lost in (("lost", FaultyGrid, {(3, 1)}), ("unasked", Unasked, set()), ("all", FaultyGrid, set())):
        (tmp_path / name).mkdir()
        settings = personal(tmp_path / name)
        serve(kind(settings, lost=lost), settings, Run(tmp_path / name / "run"))
        kept.append(own_adapters(tmp_path / name))
    assert kept[0] == kept[1] != kept[2]


def test_a_personal_adapter_acts_as_it_was_evaluated_whatever_its_site_s_alpha(tmp_path: Path) -> None:
    """PEFT applies `lora_alpha / r` of the folder to the B in it."""
    settings = personal(tmp_path, "project.site_alphas=[32,8,16]")
    figures = serve(Watched(settings), settings, Run(tmp_path / "run"))
    for folder in sorted((tmp_path / "sites").rglob("site-*-adapter")):
        config = json.loads((folder / "adapter_config.json").read_text())
        lora = settings.project.lora
        assert (config["lora_alpha"], config["r"]) == (lora.alpha, lora.rank)
        client = open_client(settings, Site(int(folder.name.split("-")[1])))
        client.load(load_file(folder / "adapter_model.safetensors"))
        assert client.evaluate() == figures["sites_after"].by_site[str(client.site.index)]


def test_a_site_that_has_lost_its_b_says_so_and_trains_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Forgetful(FaultyGrid):
        def answer(self, message: Message, partition: int) -> Message:
            if (message.metadata.group_id, message.metadata.message_type, partition) == ("3", "train", 1):
                for file in (tmp_path / "sites").rglob("site-1.safetensors"):
                    file.unlink()
            return super().answer(message, partition)

    settings = personal(tmp_path)
    serve(Forgetful(settings), settings, Run(tmp_path / "run"))
    [line] = [line for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines() if '"step": 3' in line]
    assert json.loads(line)["replies"] == 2
    assert "must hold the B of site 1 after round 2" in caplog.text


@pytest.mark.parametrize("rule", ["ffa", "rolora", "svd"])
def test_only_average_has_an_a_to_share(rule: str, tmp_path: Path) -> None:
    line = rf"project\.aggregation must be average for share=A, which trains A and B and shares A, got '{rule}'"
    with pytest.raises(UserError, match=line):
        small_settings(write_dialogues(tmp_path / "d.jsonl", 30), 3, f"project.aggregation={rule}", "project.share=A")
