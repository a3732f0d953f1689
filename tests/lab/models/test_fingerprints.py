"""Fingerprints tell weights apart: each thing that changes a model's text changes one of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lab.command.entry import compose_settings
from lab.doctor import DoctorSettings
from lab.models.fingerprints import changes, weights_fingerprints
from lab.settings import Dtype, ModelSettings, Quantization


@pytest.fixture
def model(tmp_path: Path) -> ModelSettings:
    return compose_settings("doctor", f"model=random 'model.cache_dir={tmp_path}'", DoctorSettings).model


def _adapter(folder: Path, weight: float, alpha: int) -> str:
    folder.mkdir()
    save_file({"a.lora_A.weight": torch.full((2, 2), weight)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": alpha}))
    return str(folder)


def test_each_change_of_a_target_is_named(model: ModelSettings, tmp_path: Path) -> None:
    one = _adapter(tmp_path / "one", 1.0, 2)
    other, stronger = _adapter(tmp_path / "other", 2.0, 2), _adapter(tmp_path / "stronger", 1.0, 4)
    adapted = replace(model, adapter=one)
    for before, now, name in (
        (model, replace(model, seed=1), "model"),
        (model, replace(model, architecture=replace(model.architecture, layers=3)), "model"),
        (model, replace(model, dtype=Dtype.float64), "dtype"),
        (model, replace(model, quantization=Quantization.nf4), "quantization"),
        (model, adapted, "adapter"),
        (adapted, replace(model, adapter=other), "adapter"),
        (adapted, replace(model, adapter=stronger), "adapter"),
    ):
        found = weights_fingerprints(before), weights_fingerprints(now)
        assert changes(*found) == f"its {name} was {found[0][name]} and is {found[1][name]}"
    assert changes(weights_fingerprints(model), weights_fingerprints(replace(model, name="another"))) == ""


def test_what_only_one_side_has_is_a_change() -> None:
    assert changes({"a": "1"}, {"a": "1", "b": "2"}) == "its b was None and is 2"
    assert changes({"a": "1", "b": "2"}, {"a": "3"}) == "its a was 1 and is 3, its b was 2 and is None"
