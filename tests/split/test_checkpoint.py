"""Checkpoints: what goes on from one is the run that was never interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lab.settings import Dtype, UserError
from split.checkpoint import latest_step, read_manifest
from split.training_messages import Recipe
from split.training_run import check_resumable
from tests.split.unsplit import ADAPTER, EVERYTHING, OPTIMIZATION, RUN, in_process, model_settings, trainer

CUTS = (0, 2, 4)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16])
@pytest.mark.parametrize("recipe", [EVERYTHING, ADAPTER], ids=lambda recipe: recipe.train.name)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(dtype: Dtype, recipe: Recipe, tmp_path: Path) -> None:
    """Moments, masters, schedule, order of the data, dropout."""
    settings = model_settings(tmp_path, dtype)
    recipe = Recipe(**{**{name: getattr(recipe, name) for name in recipe.__struct_fields__}, "lora_dropout": 0.2})
    options = {"recipe": recipe, "micro_batches": 2, "optimization": replace(OPTIMIZATION, max_gradient_norm=1.0)}
    whole = trainer(in_process(settings, CUTS, tmp_path / "whole"), tmp_path / "whole", **options)  # type: ignore[arg-type]
    losses = [whole.train_step().loss for _ in range(8)]
    first = trainer(in_process(settings, CUTS, tmp_path / "cut"), tmp_path / "cut", **options)  # type: ignore[arg-type]
    for _ in range(5):
        first.train_step()
        if first.step == 3:
            first.save()
    manifest = read_manifest(latest_step(tmp_path / "cut" / RUN))
    assert manifest.step == 3
    again = trainer(
        in_process(settings, CUTS, tmp_path / "cut"), tmp_path / "cut", manifest=manifest, **options  # type: ignore[arg-type]
    )  # fmt: skip
    while again.step < 8:
        again.train_step()
    assert again.losses == losses


def test_the_last_two_valid_steps_are_kept(tmp_path: Path) -> None:
    made = trainer(in_process(model_settings(tmp_path), CUTS, tmp_path), tmp_path)
    for _ in range(4):
        made.train_step()
        made.save()
    assert sorted(folder.name for folder in (tmp_path / RUN).iterdir()) == ["step-00000003", "step-00000004"]
    for folder in (tmp_path / RUN).iterdir():
        assert sorted(place.name for place in folder.iterdir()) == ["manifest.json", "shard-1", "shard-2"]


def test_another_cut_or_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    made = trainer(in_process(model_settings(tmp_path), CUTS, tmp_path), tmp_path)
    made.train_step()
    folder = made.save()
    assert folder is not None
    found = read_manifest(folder)
    check_resumable(found, read_manifest(folder), folder)
    for field, value, rule in (
        ("cuts", [0, 1, 4], r"cut 0:1, 1:4, got .* of 0:2, 2:4; to cut it anew, merge it \(python -m split.merge"),
        ("model", "other", "checkpoint of model other, got .* of tests"),
        ("recipe", ADAPTER, "recipe .*lora.*, got .*everything"),
        ("total_steps", 9, "total_steps 9, got 8"),
    ):
        ours = read_manifest(folder)
        setattr(ours, field, value)
        with pytest.raises(UserError, match=rule):
            check_resumable(found, ours, folder)


def test_a_part_that_was_damaged_is_refused(tmp_path: Path) -> None:
    settings = model_settings(tmp_path)
    made = trainer(in_process(settings, CUTS, tmp_path), tmp_path)
    made.train_step()
    folder = made.save()
    assert folder is not None
    state = folder / "shard-1" / "optimizer.safetensors"
    state.write_bytes(state.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(UserError, match="must be as it was written"):
        trainer(in_process(settings, CUTS, tmp_path), tmp_path, manifest=read_manifest(folder))
