"""Fresh adapters, from a seed and a config alone."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict

from lab.command.entry import compose_settings
from lab.doctor import DoctorSettings
from lab.models.lora import add_lora, fresh_adapter, highest_ranks
from lab.models.sources import LoadedModel, load_model
from lab.settings import LoraSettings, ModelSettings, UserError

CPU = torch.device("cpu")
LORA = LoraSettings(rank=4, alpha=8.0, dropout=0.0)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> ModelSettings:
    cache = shlex.quote(f"model.cache_dir={tmp_path_factory.mktemp('cache')}")
    sizes = "model.architecture.layers=2 model.architecture.hidden_size=64 model.architecture.head_dim=16"
    return compose_settings("doctor", f"model=random {sizes} {cache}", DoctorSettings).model


@pytest.fixture
def base(settings: ModelSettings) -> LoadedModel:
    return load_model(settings, CPU)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(torch.tensor([list(b"hello")])).logits)


def test_highest_ranks(base: LoadedModel) -> None:
    assert list(highest_ranks(base.model)) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


def test_fresh_adapter_fits_and_changes_nothing(settings: ModelSettings, base: LoadedModel) -> None:
    fresh = fresh_adapter(settings, LORA, seed=3)
    before = logits(base.model)
    model = add_lora(base.model, settings.lora_targets, LORA)
    expected = get_peft_model_state_dict(model)
    assert {name: value.shape for name, value in fresh.items()} == {k: v.shape for k, v in expected.items()}
    assert list(fresh) == sorted(fresh)
    for name, value in fresh.items():
        bound = value.shape[1] ** -0.5
        assert value.dtype == torch.float32
        assert value.abs().max() <= (0 if ".lora_B." in name else bound), name
        assert ".lora_B." in name or value.std() > 0.4 * bound, "uniform, not constant"
    assert torch.equal(logits(model), before)


def test_fresh_adapter_is_its_seed(settings: ModelSettings) -> None:
    one, same, other = (fresh_adapter(settings, LORA, seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_fresh_adapter_converts_no_weights(settings: ModelSettings, tmp_path: Path) -> None:
    fresh_adapter(dataclasses.replace(settings, cache_dir=str(tmp_path)), LORA, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_target_that_the_model_lacks(settings: ModelSettings, base: LoadedModel) -> None:
    rule = r"^model.lora_targets must be linear modules of the model \(.*q_proj.*\), got 'c_attn'$"
    with pytest.raises(UserError, match=rule):
        add_lora(base.model, ["q_proj", "c_attn"], LORA)
    with pytest.raises(UserError, match=rule):
        fresh_adapter(dataclasses.replace(settings, lora_targets=["c_attn"]), LORA, seed=0)


def test_rank_that_no_target_can_have(settings: ModelSettings, base: LoadedModel) -> None:
    """It would cost memory without end."""
    high = dataclasses.replace(LORA, rank=2**40)
    rule = r"^project.lora.rank must be at most 64, the rank of the model's targets, got 1099511627776$"
    with pytest.raises(UserError, match=rule):
        add_lora(base.model, ["q_proj", "down_proj"], high)
    with pytest.raises(UserError, match=rule):
        fresh_adapter(dataclasses.replace(settings, lora_targets=["gate_proj"]), high, seed=0)
