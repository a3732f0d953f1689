"""A slice of layers read on its own is, bit by bit, that part of the whole model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fl.settings import FederatedSettings
from lab.command.entry import compose_settings
from lab.models import conversion
from lab.models.folder import ModelFolder
from lab.models.layers import load_layers
from lab.models.slices import run_slice
from lab.models.sources import load_model, load_tokenizer_only
from lab.settings import Dtype, ModelSettings, ModelSource, Quantization, UserError
from tests.random_models import ARCHITECTURES, WINDOW, random_model

CPU = torch.device("cpu")
IDS = torch.arange(1, 3 * WINDOW)[None]  # beyond a sliding window


pytestmark = pytest.mark.usefixtures("one_thread")


def _settings(folder: Path, dtype: Dtype = Dtype.float32) -> ModelSettings:
    composed = compose_settings("fed_learn", "model=random model.quantization=none", FederatedSettings).model
    return replace(composed, source=ModelSource.path, path=str(folder), dtype=dtype)


def _saved(architecture: str, folder: Path, **options: Any) -> ModelSettings:
    model = random_model(architecture, torch.float32, **options)
    model.save_pretrained(folder, max_shard_size="50KB")  # several files, as large models have
    conversion.byte_tokenizer().save_pretrained(folder)
    return _settings(folder)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_slices_are_the_whole_model(architecture: str, tied: bool, tmp_path: Path) -> None:
    settings = _saved(architecture, tmp_path, tie_word_embeddings=tied)
    whole: Any = load_model(settings, CPU).model
    first: Any = load_layers(settings, CPU, range(0, 1), embedding=True, head=False)
    second: Any = load_layers(settings, CPU, range(1, 4), embedding=False, head=True)
    with torch.inference_mode():
        expected = whole(IDS).logits
        hidden = run_slice(first, IDS)
        assert torch.equal(run_slice(second, hidden), expected)
        other = load_layers(settings, CPU, range(2, 4), embedding=False, head=True)
        assert not torch.equal(run_slice(other, hidden), expected), "other layers gave the same"


@pytest.mark.parametrize("dtype", [Dtype.float64, Dtype.bfloat16])
def test_a_slice_of_all_layers_is_the_whole_model(dtype: Dtype, tmp_path: Path) -> None:
    settings = replace(_saved("llama", tmp_path), dtype=dtype)
    whole: Any = load_model(settings, CPU).model
    all_layers: Any = load_layers(settings, CPU, range(0, 4), embedding=True, head=True)
    with torch.inference_mode():
        assert torch.equal(run_slice(all_layers, IDS), whole(IDS).logits)
    assert not any(parameter.requires_grad for parameter in all_layers.parameters())


@pytest.mark.parametrize(("first", "last"), [(0, 5), (-1, 2), (2, 2), (3, 1)])
def test_layers_that_are_not_there(first: int, last: int, tmp_path: Path) -> None:
    settings = _saved("llama", tmp_path)
    with pytest.raises(UserError, match=rf"within the model's 4 layers, got {first} to {last}"):
        load_layers(settings, CPU, range(first, last), embedding=True, head=True)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
def test_slices_in_4_bits_are_the_whole_model_in_4_bits(architecture: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}  # the CPU kernel takes whole blocks of 64
    settings = replace(_saved(architecture, tmp_path, **sizes), quantization=Quantization.nf4)
    whole: Any = load_model(settings, CPU).model
    first: Any = load_layers(settings, CPU, range(0, 1), embedding=True, head=False)
    second: Any = load_layers(settings, CPU, range(1, 4), embedding=False, head=True)
    assert first.get_decoder().layers[0].self_attn.q_proj.weight.dtype is torch.uint8
    with torch.inference_mode():
        hidden = run_slice(first, IDS)
        assert torch.equal(run_slice(second, hidden), whole(IDS).logits)
        plain: Any = load_layers(
            replace(settings, quantization=Quantization.none), CPU, range(1, 4), embedding=False, head=True
        )
        assert not torch.equal(run_slice(plain, hidden), whole(IDS).logits)


def test_a_checkpoint_without_a_tensor_is_named(tmp_path: Path) -> None:
    settings = _saved("llama", tmp_path)
    folder = ModelFolder(tmp_path)
    held = folder.read(folder.files.keys() - {"model.norm.weight"})
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"got none named 'model\.norm\.weight'"):
        load_layers(settings, CPU, range(0, 4), embedding=True, head=True)


def test_a_tokenizer_alone(tmp_path: Path) -> None:
    assert load_tokenizer_only(_saved("llama", tmp_path)).get_vocab()["<eos>"] == conversion.BYTE_EOS
