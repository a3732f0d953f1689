"""What a verifier says of its target when it starts, and what it refuses then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lab.command.entry import compose_settings
from lab.models.sources import prepare_checkpoint
from lab.settings import UserError
from speculative.settings import SpeculativeSettings
from speculative.verifier.target import open_target

CPU = torch.device("cpu")


def _settings(*words: str) -> SpeculativeSettings:
    return compose_settings("spec_decoding", " ".join(words), SpeculativeSettings)


def _folder(tmp_path: Path, ends: list[int]) -> str:
    """The random model as a folder of its own, with these ends."""
    source = prepare_checkpoint(_settings("model=random", f"'model.cache_dir={tmp_path}'").model).folder
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": ends}))
    return f"model=random model.source=path 'model.path={folder}'"


def test_more_ends_than_a_drafter_can_be_told_are_refused_at_the_start(tmp_path: Path) -> None:
    words = _folder(tmp_path, list(range(17)))
    with pytest.raises(UserError) as refused:
        open_target(_settings(words), CPU)
    assert str(refused.value) == (
        "model model must end texts with at most 16 ids (eos_token_id of its generation config), got 17"
    )


def test_a_target_says_what_its_text_depends_on(tmp_path: Path) -> None:
    words = f"model=random 'model.cache_dir={tmp_path}' model.dtype=float32 project.context=64"
    found = open_target(_settings(words), CPU).fingerprints
    assert found.keys() == {"model", "adapter", "dtype", "quantization"}
    assert open_target(_settings(words, "model.seed=1"), CPU).fingerprints["model"] != found["model"]
    synthetic = open_target(_settings("model=random project.engine=synthetic"), CPU)
    assert synthetic.engine.vocabulary_size == 258, "as many as the tokenizer has"
    words = "model=random project.engine=synthetic project.synthetic.vocabulary_size"
    assert synthetic.fingerprints != open_target(_settings(f"{words}=300"), CPU).fingerprints
    with pytest.raises(UserError) as refused:
        open_target(_settings(f"{words}=256"), CPU)
    assert str(refused.value) == (
        "project.synthetic.vocabulary_size must be 0 or at least 258, the ids of the tokenizer of "
        "model random-1M, got 256"
    )
