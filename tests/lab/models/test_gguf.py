"""Tensors of a GGUF file, one at a time: what transformers reads from the whole file is the oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lab.models.gguf.file import GgufModel
from lab.settings import UserError
from tests.lab.models.gguf_files import write_gguf


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3moe"])
def test_each_tensor_is_that_of_the_whole_file(architecture: str, tmp_path: Path) -> None:
    """Rows that were reordered for llama.cpp, norms counted from one, stacked experts."""
    file, stored = write_gguf(tmp_path / "a.gguf", architecture=architecture, layers=2, kv_heads=2)
    model = GgufModel(file)
    assert not model.is_read_whole
    found, expected = model.tensors(model.config()), model.whole()
    assert found.keys() == expected.keys()
    assert len(found) == len(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name][...], tensor), name
    assert any(not any(torch.equal(tensor, one) for one in stored.values()) for tensor in expected.values()), (
        "the negative control: names alone do not make a tensor transformers' own"
    )


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    file, _ = write_gguf(tmp_path / "a.gguf", inner=64)
    model, config = GgufModel(file), GgufModel(write_gguf(tmp_path / "b.gguf", inner=96)[0]).config()
    tensors = model.tensors(config)
    name = "model.layers.0.mlp.up_proj.weight"
    refused = rf"GGUF file that transformers can read, .* {name} is 64 x 32, where its config asks for 96 x 32\)$"
    with pytest.raises(UserError, match=refused):
        tensors[name][...]
