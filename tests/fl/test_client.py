import copy
from pathlib import Path

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from peft import PeftModel

from fl.adapters import Adapter, load_into
from fl.client import LoRAClient, Site, open_client
from fl.server import first_adapter
from fl.settings import FederatedSettings
from lab.command.entry import compose_settings
from lab.learning import training
from lab.learning.examples import Batch, Example, collate
from lab.learning.records import Text
from lab.learning.training import TrainFigures
from lab.models.lora import add_lora, fresh_adapter
from lab.models.sources import LoadedModel, load_model
from lab.settings import UserError
from tests.federated import small_settings, write_dialogues
from tests.shared import examples


@pytest.fixture
def settings(tmp_path: Path) -> FederatedSettings:
    return small_settings(write_dialogues(tmp_path / "d.jsonl", 40), 2)


def train(client: LoRAClient, adapter: Adapter, server_round: int) -> tuple[dict[str, torch.Tensor], TrainFigures]:
    client.load(adapter)
    return client.train(server_round)


def test_two_sites_of_a_process_share_one_base_model_and_no_example(settings: FederatedSettings) -> None:
    clients = [open_client(settings, Site(index)) for index in range(2)]
    assert clients[0].base is clients[1].base
    assert open_client(settings, Site(0)).split is clients[0].split
    parts = [part for client in clients for part in (client.split.train, client.split.held_out)]
    ids = [{example.ids_T.tobytes() for example in part} for part in parts]
    assert all(ids)
    assert len(set.union(*ids)) == sum(map(len, ids))


def test_training_depends_on_what_came_in_and_the_round_not_on_what_went_before(settings: FederatedSettings) -> None:
    start = first_adapter(settings)
    client = open_client(settings, Site(0))
    first, figures = train(client, start, 1)
    other, _ = train(client, first, 2)
    again, same = train(client, start, 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert (figures.loss, figures.tokens) == (same.loss, same.tokens)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_schedule_runs_over_the_whole_run_and_not_over_one_round(tmp_path: Path) -> None:
    data = write_dialogues(tmp_path / "d.jsonl", 40)
    settings = small_settings(data, 2, "project.optimization.warmup_steps=0", "project.rounds=4")
    client, start = open_client(settings, Site(0)), first_adapter(settings)
    moved = []
    for server_round in (1, 4):
        trained, _ = train(client, start, server_round)
        moved.append(max((trained[name] - start[name]).abs().max().item() for name in start))
    assert moved[1] < 0.4 * moved[0], "the last round is at the end of the cosine"


def test_fedprox_holds_a_client_near_the_global_adapter(tmp_path: Path) -> None:
    data = write_dialogues(tmp_path / "d.jsonl", 40)
    far = []
    for mu in (0.0, 100.0):
        settings = small_settings(data, 2, f"project.proximal_mu={mu}", "project.local_steps=8")
        start = first_adapter(settings)
        trained, _ = train(open_client(settings, Site(0)), start, 1)
        far.append(sum((trained[name] - start[name]).square().sum().item() for name in start))
    assert far[1] < 0.5 * far[0]


def test_an_adapter_that_does_not_fit_is_refused_by_name(settings: FederatedSettings) -> None:
    client, adapter = open_client(settings, Site(0)), first_adapter(settings)
    name = sorted(adapter)[0]
    lacking = {key: value for key, value in adapter.items() if key != name}
    with pytest.raises(ValueError, match=f"1 of {len(adapter)} tensors are missing, the first is {name}"):
        client.load(lacking)
    with pytest.raises(ValueError, match=r"1 tensors are unknown, the first is layers\.9"):
        client.load({**adapter, "layers.9": adapter[name]})


def test_a_site_with_a_file_of_its_own_reads_all_of_it_and_nothing_else(
    tmp_path: Path, settings: FederatedSettings
) -> None:
    own = write_dialogues(tmp_path / "own.jsonl", 7, "mine")
    client = open_client(settings, Site(0, str(own)))
    assert len(client.split.train) + len(client.split.held_out) == 7
    shared = open_client(settings, Site(0))
    ids = [{example.ids_T.tobytes() for example in c.split.train + c.split.held_out} for c in (client, shared)]
    assert not ids[0] & ids[1]
    with pytest.raises(UserError, match=r"project.data.path must be a JSONL file, got '.*absent.jsonl'"):
        open_client(settings, Site(0, str(tmp_path / "absent.jsonl")))


def test_where_every_site_names_its_own_file_no_other_is_needed(tmp_path: Path) -> None:
    own = write_dialogues(tmp_path / "own.jsonl", 7, "mine")
    settings = small_settings(own, 2, "project.data.path=null")
    split = open_client(settings, Site(0, str(own))).split
    assert len(split.train) + len(split.held_out) == 7
    with pytest.raises(UserError, match=r"project.data.path must be set for source=jsonl, got None"):
        open_client(settings, Site(1))


FIRST, LAST = "layers.0.", "layers.29."
"""The first layer's gradient has come through every other layer, the last one's through none."""


def gradients(model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """Of the adapter in the first and the last layer, in training mode."""
    model.train()
    model.zero_grad()
    training.accumulate_gradients(model, [batch])
    ends = [(name, p.grad) for name, p in model.named_parameters() if FIRST in name or LAST in name]
    found = {name: grad.clone() for name, grad in ends if grad is not None}
    assert len(found) == 2 * 14
    return found


@pytest.fixture(scope="module")
def nf4() -> tuple[LoadedModel, Example]:
    """SmolLM2 in NF4, and an example of 32 tokens."""
    settings = compose_settings("fed_learn", "device.threads=1", FederatedSettings)
    loaded = load_model(settings.model, torch.device("cpu"))
    return loaded, examples([Text("The otter reads the river as others read a book. " * 4)], loaded.tokenizer, 32)[0]


def with_adapter(loaded: LoadedModel) -> PeftModel:
    """A copy of the model with an adapter whose B is not zero, so that A has a gradient too."""
    settings = compose_settings("fed_learn", "device.threads=1", FederatedSettings)
    model = add_lora(copy.deepcopy(loaded.model), settings.model.lora_targets, settings.project.lora)
    generator = torch.Generator().manual_seed(1)
    adapter = fresh_adapter(settings.model, settings.project.lora, 0)
    load_into(model, {name: torch.randn(value.shape, generator=generator) / 100 for name, value in adapter.items()})
    return model


def dequantise(model: torch.nn.Module) -> None:
    """Every 4-bit layer as a plain one of the same numbers."""
    for module in [*model.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, bitsandbytes.nn.Linear4bit):
                weight = bitsandbytes.functional.dequantize_4bit(child.weight.data, child.weight.quant_state).float()
                plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                plain.weight = torch.nn.Parameter(weight, requires_grad=False)
                setattr(module, name, plain)


@pytest.mark.real
def test_an_evaluation_leaves_the_gradient_of_a_4_bit_model_as_it_is(nf4: tuple[LoadedModel, Example]) -> None:
    model, batch = with_adapter(nf4[0]), collate([nf4[1]])
    before = gradients(model, batch)
    training.evaluate(model, [nf4[1]], 1)
    after = gradients(model, batch)
    assert all(torch.equal(before[name], after[name]) for name in before)
    dequantise(model)
    plain = gradients(model, batch)
    assert {*plain} == {*before}
    for name, gradient in plain.items():
        assert (gradient - before[name]).norm() < 1e-4 * gradient.norm(), name


@pytest.mark.real
@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes repacks 4-bit layers on CPUs with AVX512-BF16 only")
def test_without_the_guard_an_evaluation_would_change_the_gradient(
    nf4: tuple[LoadedModel, Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "keep_differentiable", lambda model: None)
    model, batch = with_adapter(nf4[0]), collate([nf4[1]])
    before = gradients(model, batch)
    training.evaluate(model, [nf4[1]], 1)
    after = gradients(model, batch)
    assert any((after[name] - before[name]).norm() > 0.1 * before[name].norm() for name in before)
