"""Checkpoints: what goes on from one is the run that was never interrupted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lab.command.entry import Run, compose_settings
from lab.learning.examples import Example
from lab.learning.training import learning_rate_at
from lab.settings import Dtype, UserError
from split.training.checkpoint import latest_step, read_manifest
from split.training.data import examples_digest
from split.training.messages import Recipe
from split.training.run import check_resumable, follow, run_training
from split.training.settings import SplitTrainSettings
from tests.split.training.unsplit import (
    ADAPTER,
    EVERYTHING,
    OPTIMIZATION,
    RUN,
    Unsplit,
    in_process,
    model_settings,
    some_examples,
    trainer,
)

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
    check_resumable(found, read_manifest(folder), folder, allow_changed_data=False)
    for field, value, rule in (
        ("cuts", [0, 1, 4], r"cut 0:1, 1:4, got .* of 0:2, 2:4; to cut it anew, merge it \(python -m split.merge"),
        ("model", "other", "checkpoint of model other, got .* of tests"),
        ("recipe", ADAPTER, "recipe .*lora.*, got .*everything"),
        ("total_steps", 9, "steps must be 8 to go on from .*; a finished run may be given more, got 9"),
    ):
        ours = read_manifest(folder)
        setattr(ours, field, value)
        with pytest.raises(UserError, match=rule):
            check_resumable(found, ours, folder, allow_changed_data=True)


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


def _words(folder: Path, *words: str) -> SplitTrainSettings:
    told = (
        f"model=random model.cache_dir={folder}/models project.transport=inproc project.local_shards=2 tracking=none "
        f"project.data.source=jsonl project.data.path={folder}/d.jsonl project.data.sequence_length=32 "
        f"project.checkpoints={folder}/kept project.checkpoint_every=1 project.micro_batches=1 project.train=everything"
    )
    return compose_settings("split_train", " ".join([told, *words]), SplitTrainSettings)


def _write_lines(folder: Path, text: str) -> None:
    lines = [json.dumps({"text": f"{text}, line {number}"}) for number in range(12)]
    (folder / "d.jsonl").write_text("\n".join(lines), encoding="utf-8")


def test_changed_data_stops_a_resumed_run_unless_allowed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _write_lines(tmp_path, "first data")
    run_training(_words(tmp_path, "project.steps=2"), Run(tmp_path / "run"))
    (run,) = (tmp_path / "kept").iterdir()
    resumed = ["project.steps=2", f"project.resume={run}/step-00000001"]
    _write_lines(tmp_path, "other words")
    with pytest.raises(
        UserError, match=r"^project\.data must hold the examples .*allow_changed_data=true.*, got others"
    ):
        run_training(_words(tmp_path, *resumed), Run(tmp_path / "b"))
    run_training(_words(tmp_path, *resumed, "project.allow_changed_data=true"), Run(tmp_path / "c"))
    assert "from step 1 on the run learns from different examples" in caplog.text
    unsplit = ["project.steps=2", f"project.resume={run}", "project.baseline=unsplit"]
    with pytest.raises(UserError, match=r"^project\.baseline must be none .* altered after step 1$"):
        run_training(_words(tmp_path, *unsplit), Run(tmp_path / "d"))


def test_data_are_the_same_where_their_examples_are(tmp_path: Path) -> None:
    """Whatever the file is called; a token, a counted position or the order makes them others."""
    examples = some_examples(4)
    same = [Example(example.ids_T.copy(), example.counted_T.copy()) for example in examples]
    assert examples_digest(same) == examples_digest(examples)
    assert examples_digest(examples[::-1]) != examples_digest(examples)
    same[2].counted_T[-1] ^= True
    assert examples_digest(same) != examples_digest(examples)
    same[2].counted_T[-1] ^= True
    same[3].ids_T[-1] += 1
    assert examples_digest(same) != examples_digest(examples)


def test_a_finished_run_given_more_steps_goes_on_with_their_schedule(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the whole model does that takes its first steps under one schedule and the others under the next."""
    settings = model_settings(tmp_path)
    made = trainer(in_process(settings, CUTS, tmp_path), tmp_path, total_steps=3)
    for _ in range(3):
        made.train_step()
    folder = made.save()
    assert folder is not None
    found, ours = read_manifest(folder), read_manifest(folder)
    for total, rule in ((2, "must be 3 to go on from .*, or more, got 2"), (3, None), (6, None)):
        ours.total_steps = total
        if rule is not None:
            with pytest.raises(UserError, match=rule):
                check_resumable(found, ours, folder, allow_changed_data=False)
        else:
            check_resumable(found, ours, folder, allow_changed_data=False)
    follow(found, ours)
    assert (found.total_steps, found.altered_at) == (6, 3)
    assert "ended after 3 steps and now takes 6" in caplog.text
    again = trainer(in_process(settings, CUTS, tmp_path), tmp_path, manifest=found)
    steps = [again.train_step() for _ in range(3)]
    whole = Unsplit(settings)
    whole.train(3, 3)
    theirs = whole.train(3, 6, first_step=3)
    assert [step.learning_rate for step in steps] == [learning_rate_at(step, 6, OPTIMIZATION) for step in (3, 4, 5)]
    assert [step.loss for step in steps] == [figures.loss for figures in theirs]
