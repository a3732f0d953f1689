"""Adapters: fresh ones from a seed and a config alone, and folders that belong to the base model or are refused."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from lab.doctor import DoctorSettings
from lab.entry import compose_settings
from lab.lora import IDENTITY_KEY, add_lora, apply_adapter, fresh_adapter, linear_names
from lab.models import LoadedModel, load_model, model_identity
from lab.settings import LoraSettings, ModelSettings, Quantization, UserError

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


@pytest.fixture
def adapter(settings: ModelSettings, tmp_path: Path) -> Path:
    """A PEFT folder whose B is not zero, with our record beside it."""
    model = add_lora(load_model(settings, CPU).model, settings.lora_targets, LORA)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "lab_adapter.json").write_text(json.dumps({IDENTITY_KEY: model_identity(settings)}))
    return tmp_path / "adapter"


def test_linear_names(base: LoadedModel) -> None:
    assert linear_names(base.model) == sorted(
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


def test_applied_adapter_is_frozen_and_changes_the_logits(base: LoadedModel, adapter: Path) -> None:
    before = logits(base.model)
    model = apply_adapter(base, str(adapter))
    assert (logits(model) - before).abs().max() > 1e-3
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    stored = load_file(adapter / "adapter_model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in get_peft_model_state_dict(model).items())


def test_adapter_on_nf4(settings: ModelSettings, adapter: Path) -> None:
    quantized = load_model(dataclasses.replace(settings, quantization=Quantization.nf4), CPU)
    before = logits(quantized.model)
    assert (logits(apply_adapter(quantized, str(adapter))) - before).abs().max() > 1e-3


def test_adapter_of_another_base_model(settings: ModelSettings, adapter: Path) -> None:
    other = load_model(dataclasses.replace(settings, seed=1), CPU)
    with pytest.raises(UserError) as caught:
        apply_adapter(other, str(adapter))
    assert str(caught.value) == (
        f"model.adapter must belong to base model {other.checkpoint.identity}, "
        f"got {str(adapter)!r} trained on {model_identity(settings)}"
    )


def test_adapter_that_does_not_say_its_base_is_let_through(base: LoadedModel, adapter: Path) -> None:
    (adapter / "lab_adapter.json").unlink()
    apply_adapter(base, str(adapter))


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors", "all"])
def test_no_adapter_folder(base: LoadedModel, adapter: Path, missing: str) -> None:
    if missing == "all":
        shutil.rmtree(adapter)
    else:
        (adapter / missing).unlink()
    with pytest.raises(UserError, match=r"^model.adapter must be a PEFT folder \(.*\), got '.+'$"):
        apply_adapter(base, str(adapter))


def test_broken_record(base: LoadedModel, adapter: Path) -> None:
    (adapter / "lab_adapter.json").write_text("{")
    with pytest.raises(UserError, match=r"^model.adapter must hold a lab_adapter.json that is JSON, got '.+'$"):
        apply_adapter(base, str(adapter))


def test_tensors_of_other_shapes(settings: ModelSettings, base: LoadedModel, adapter: Path) -> None:
    (adapter / "lab_adapter.json").unlink()
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: value[:, :2].contiguous() for name, value in tensors.items()}, adapter / "adapter_model.safetensors"
    )
    with pytest.raises(UserError, match=r"^model.adapter must fit the base model, got '.+' \(.*size mismatch"):
        apply_adapter(base, str(adapter))


@pytest.mark.parametrize("change", ["unknown", "missing"])
def test_tensors_that_are_unknown_or_missing(base: LoadedModel, adapter: Path, change: str) -> None:
    """PEFT itself would load both without an error."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = min(tensors)
    value = tensors[name] if change == "unknown" else tensors.pop(name)
    odd = name.replace("layers.0", "layers.7") if change == "unknown" else name
    if change == "unknown":
        tensors[odd] = value.clone()
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"\(1 tensors are unknown or missing, .* first\)$") as caught:
        apply_adapter(base, str(adapter))
    assert odd in str(caught.value)


def test_modules_that_the_base_has_not(base: LoadedModel, adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["c_attn"]}))
    with pytest.raises(UserError, match=r"^model.adapter must fit the base model, got '.+' \(.*c_attn"):
        apply_adapter(base, str(adapter))
