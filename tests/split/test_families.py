"""Split training of other families than Llama: a merged checkpoint holds what unsplit training makes of the model.

Their blocks have other names, their ends are tied or learned apart, their experts are fused in memory and one by one on
the disk, and position embeddings stand before the layers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lab.learning.examples import Example
from lab.models.shape import ModelShape
from lab.models.twin import VOCABULARY, twin_model
from split.merger import merge
from split.training.checkpoint import Manifest
from split.training.open import identity_of
from tests.architectures import config_of
from tests.split.chains import saved_model
from tests.split.training.unsplit import EVERYTHING, RUN, Unsplit, in_process, trainer

STEPS = 2


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _examples() -> list[Example]:
    generator = np.random.default_rng(3)
    lengths = [int(generator.integers(8, 20)) for _ in range(12)]
    return [
        Example(generator.integers(1, VOCABULARY, length).astype(np.int32), np.ones(length, dtype=np.bool_))
        for length in lengths
    ]


@pytest.mark.parametrize("family", ["gpt2", "opt", "mixtral", "smollm3", "glm4_moe"])
def test_a_merged_checkpoint_is_what_unsplit_training_makes(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    settings = saved_model("llama", tmp_path / "llama")
    model = twin_model(config_of(family))
    for dropout in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "attention_dropout", "hidden_dropout"):
        if getattr(model.config, dropout, 0.0):
            setattr(model.config, dropout, 0.0)  # its noise depends on where the cuts are
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # kept, and trained by nobody
            buffer.normal_()
    model.save_pretrained(folder)
    settings = replace(settings, name=family, path=str(folder))
    count = ModelShape.of(model.config).layers
    manifest = Manifest(
        run=RUN, step=0, model=identity_of(settings), dtype="float32", cuts=[0, 1, count - 1, count], digests=[],
        recipe=EVERYTHING, optimization={}, data={}, total_steps=8, micro_batches=1, seed=11, loss_by_step=[],
    )  # fmt: skip
    made = trainer(in_process(settings, manifest.cuts, tmp_path), tmp_path, examples=_examples(), manifest=manifest)
    losses = [made.train_step().loss for _ in range(STEPS)]
    made.save()
    merge(settings, tmp_path / RUN, tmp_path / "merged")
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)

    whole = Unsplit(settings, examples=_examples())
    assert losses == pytest.approx([step.loss for step in whole.train(STEPS, 8)], rel=1e-6)
    found, untrained = merged.state_dict(), model.state_dict()
    expected = whole.model.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, rtol=1e-4, atol=1e-6), name
    assert (family == "glm4_moe") == any("correction_bias" in name for name in found)
    moved = [name for name, weight in expected.items() if not torch.equal(weight, untrained[name])]
    assert len(moved) > 0.9 * sum(weight.is_floating_point() for weight in expected.values())
