"""Training that goes on from an adapter goes on from all of it: as PEFT trains it on the whole model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lab.settings import ModelSettings, UserError
from split.merger import merge
from split.training.first_adapter import first_adapter
from split.training.messages import Recipe
from tests.lab.models.adapters import make_adapter, peft_says
from tests.split.training.test_merge import trained
from tests.split.training.unsplit import ADAPTER, RUN, Unsplit, gradients_of, in_process, model_settings, trainer, worst

KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layers.1.self_attn.q_proj": 8}, "alpha_pattern": {"down_proj": 64}},
    "dora": {"use_dora": True},
    "saved head": {"modules_to_save": ["lm_head", "model.norm"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def adapted(folder: Path, **changes: Any) -> tuple[ModelSettings, Recipe]:
    """A model, an adapter for it, and the recipe that its rank, alpha and targets ask for."""
    settings = model_settings(folder / "model", tied="tied" in changes and changes.pop("tied"))
    made = make_adapter(folder / "model", folder / "adapter", lora_alpha=8, **changes)
    targets = changes.get("target_modules", ["q_proj", "down_proj"])
    fields = {name: getattr(ADAPTER, name) for name in ADAPTER.__struct_fields__} | {"lora_targets": targets}
    return replace(settings, adapter=str(made)), Recipe(**fields)


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_gradients_are_those_of_peft(kind: str, tied: bool, tmp_path: Path) -> None:
    settings, recipe = adapted(tmp_path, tied=tied, **KINDS[kind])
    transport = in_process(settings, (0, 1, 4), tmp_path)
    made = trainer(transport, tmp_path, recipe=recipe)
    found = gradients_of(made, transport._stages)
    expected = Unsplit(settings, recipe=recipe).gradients()
    assert found.keys() == expected.keys()
    assert worst(found, expected) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_trained_is_merged_with_all_of_its_description(kind: str, tmp_path: Path) -> None:
    settings, recipe = adapted(tmp_path, **KINDS[kind])
    made = trained(settings, tmp_path, recipe, steps=2)
    whole = Unsplit(settings, recipe=recipe)
    assert [figures.loss for figures in whole.train(2, 8)] == made.losses
    merge(settings, tmp_path / RUN, tmp_path / "merged")
    with torch.inference_mode():
        expected = whole.model.eval()(torch.tensor([[3, 1, 5, 9, 20, 8, 1, 5]])).logits
    assert torch.equal(peft_says(settings, tmp_path / "merged"), expected)
    assert not torch.equal(peft_says(settings, Path(str(settings.adapter))), expected), "training changes nothing"
    before, after = (
        json.loads((Path(str(place)) / "adapter_config.json").read_text())
        for place in (settings.adapter, tmp_path / "merged")
    )
    apart = {name for name in before if before[name] != after[name]} - {"target_modules", "base_model_name_or_path"}
    assert apart == set()
    assert sorted(before["target_modules"]) == after["target_modules"]


def test_rank_alpha_and_targets_must_be_those_of_the_settings(tmp_path: Path) -> None:
    settings, recipe = adapted(tmp_path)
    for name, value, message in (
        ("lora_rank", 8, r"must have project\.lora\.rank=8, got 4"),
        ("lora_alpha", 16.0, r"must have project\.lora\.alpha=16\.0, got 8"),
        ("lora_targets", ["q_proj"], r"must have model\.lora_targets=\['q_proj'\], got \['down_proj', 'q_proj'\]"),
    ):
        fields = {field: getattr(recipe, field) for field in recipe.__struct_fields__} | {name: value}
        with pytest.raises(UserError, match=f"^model.adapter {message}"):
            first_adapter(settings, Recipe(**fields))
