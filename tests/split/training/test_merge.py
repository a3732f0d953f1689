"""A merged checkpoint is an ordinary folder: programs without this lab load it, and it is what was trained."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from lab.settings import Dtype, ModelSettings, ModelSource, Quantization, UserError
from split.merger import merge, write_model
from split.training.checkpoint import Manifest, latest_step, read_manifest
from split.training.messages import Recipe
from split.training.open import identity_of
from split.training.trainer import DistributedTrainer
from tests.lab.models.gguf_files import write_gguf
from tests.split.training.unsplit import (
    ADAPTER,
    EVERYTHING,
    OPTIMIZATION,
    RUN,
    all_batches,
    in_process,
    model_settings,
    some_examples,
    trainer,
)

PLAIN = """
import json, sys
import numpy as np, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
for base, adapter, batch in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    data = np.load(batch)
    ids, mask, labels = (torch.from_numpy(data[name]) for name in ("ids", "mask", "labels"))
    print(json.dumps([model(input_ids=ids, attention_mask=mask, labels=labels).loss.item(), str(model.dtype)]))
"""
CUTS = (0, 1, 3, 4)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def trained(settings: ModelSettings, folder: Path, recipe: Recipe, steps: int = 4) -> DistributedTrainer:
    manifest = Manifest(
        run=RUN, step=0, model=identity_of(settings), dtype=settings.dtype.name, cuts=list(CUTS), digests=[],
        recipe=recipe, optimization={}, data={}, total_steps=8, micro_batches=1, seed=11, loss_by_step=[],
    )  # fmt: skip
    made = trainer(in_process(settings, CUTS, folder), folder, recipe=recipe, manifest=manifest)
    for _ in range(steps):
        made.train_step()
    made.save()
    return made


def next_batch(made: DistributedTrainer, folder: Path) -> Path:
    batch = next(islice(all_batches(some_examples(), OPTIMIZATION.batch_size), made.step, None))
    labels = batch.labels_BT.numpy()
    np.savez(folder / "batch.npz", ids=batch.ids_BT.numpy(), mask=batch.attention_BT.numpy(), labels=labels)
    return folder / "batch.npz"


@pytest.mark.real
def test_plain_programs_load_it_and_see_the_same_loss(tmp_path: Path) -> None:
    """In a fresh process, with transformers and PEFT alone: everything trained (tied and not), and an adapter."""
    expected, jobs = [], []
    for name, recipe, tied in (("all", EVERYTHING, False), ("tied", EVERYTHING, True), ("lora", ADAPTER, False)):
        folder = tmp_path / name
        settings = model_settings(folder, tied=tied)
        made = trained(settings, folder, recipe)
        result = merge(settings, folder / RUN, folder / "merged")
        assert result["step"] == 4
        assert result["loss"] == made.losses[-1]
        batch = next_batch(made, folder)
        expected.append(made.train_step().loss)  # of the weights that were saved, before its own step
        merged = str(folder / "merged")
        if recipe is ADAPTER:
            config = json.loads(Path(merged, "adapter_config.json").read_text())
            assert config["base_model_name_or_path"] == settings.path
            card = Path(merged, "README.md").read_text()
            assert f'AutoModelForCausalLM.from_pretrained("{settings.path}"), "{merged}")' in card
        jobs.append([settings.path if recipe is ADAPTER else merged, merged if recipe is ADAPTER else None, str(batch)])
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, json.dumps(jobs)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [loss for loss, _ in found] == pytest.approx(expected, rel=1e-6)
    untrained = merge_control(tmp_path / "all", expected[0])
    assert abs(untrained - expected[0]) > 1e-3, "the control: the base model has another loss"


def merge_control(folder: Path, _: float) -> float:
    settings = model_settings(folder / "base")
    return trainer(in_process(settings, (0, 4), folder / "base"), folder / "base").train_step().loss


def test_what_was_trained_in_16_bits_stays_in_them(tmp_path: Path) -> None:
    settings = model_settings(tmp_path, Dtype.bfloat16)
    trained(settings, tmp_path, EVERYTHING)
    merge(settings, tmp_path / RUN, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_cannot_be_merged_is_said(tmp_path: Path) -> None:
    settings = model_settings(tmp_path / "model")
    trained(settings, tmp_path, EVERYTHING)
    run = tmp_path / RUN
    with pytest.raises(UserError, match="model must be what the run began with, path:"):
        merge(model_settings(tmp_path / "other", tied=True), run, tmp_path / "merged")
    with pytest.raises(UserError, match=r"project\.output must not be there yet"):
        merge(settings, run, tmp_path / "model")
    with pytest.raises(UserError, match=r"^project\.checkpoint must be a checkpoint with at least one valid step"):
        merge(settings, tmp_path / "nothing", tmp_path / "merged")
    weights = latest_step(run) / "shard-2" / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="must be as it was written"):
        merge(settings, run, tmp_path / "merged")
    weights.parent.rename(tmp_path / "gone")
    with pytest.raises(UserError, match="part of shard 2 must be at"):
        merge(settings, run, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_step_without_its_manifest_is_not_there(tmp_path: Path) -> None:
    """All parts are written, then the manifest: whoever dies in between leaves the step before."""
    settings = model_settings(tmp_path / "model")
    made = trained(settings, tmp_path, EVERYTHING, steps=2)
    made.train_step()
    made.save()
    newest = latest_step(tmp_path / RUN)
    assert read_manifest(newest).step == 3
    (newest / "manifest.json").unlink()
    assert read_manifest(latest_step(tmp_path / RUN)).step == 2
    assert merge(settings, tmp_path / RUN, tmp_path / "merged")["step"] == 2


def test_the_folder_of_trained_weights_is_described_as_in_float(tmp_path: Path) -> None:
    """Also where the base, a GGUF file, is meant to be packed: then its folder has no tensors in float."""
    file, _ = write_gguf(tmp_path / "base.gguf", inner=64)
    settings = replace(
        model_settings(tmp_path),
        source=ModelSource.gguf,
        path=str(file),
        quantization=Quantization.int4,
        cache_dir=str(tmp_path / "cache"),
    )
    (tmp_path / "merged").mkdir()
    write_model(settings, {"model.norm.weight": torch.ones(32)}, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    assert (tmp_path / "merged" / "tokenizer.json").exists()
