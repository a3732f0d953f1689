"""Which model `project.draft.model` means: names, folders, files, and YAMLs beside the user's own config."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from lab.command.entry import compose_settings
from lab.engine.sampling import Sampling
from lab.models.sources import load_tokenizer_only, prepare_checkpoint
from lab.settings import Dtype, ModelSource, UserError
from speculative.drafter import draft_model
from speculative.drafter.draft_model import draft_model as meant
from speculative.drafter.sources import open_drafts
from speculative.settings import SpeculativeSettings
from speculative.vocabulary import token_texts

CPU = torch.device("cpu")
WORDS = "model=random project.draft.source=model project.draft.model=random"
AWKWARD = "José, = [1] {a} $b 'c' \"d\""


def _settings(model: str, **draft: Any) -> SpeculativeSettings:
    settings = compose_settings("spec_decoding", WORDS, SpeculativeSettings)
    settings.project.draft.model = model
    for name, value in draft.items():
        setattr(settings.project.draft, name, value)
    return settings


def test_a_folder_of_any_name_guesses(tmp_path: Path) -> None:
    folder = tmp_path / AWKWARD
    shutil.copytree(prepare_checkpoint(_settings("random").model).folder, folder)
    settings = _settings(str(folder))
    model = meant(settings, CPU)
    assert (model.source, model.path, model.name, model.dtype) == (
        ModelSource.path,
        str(folder),
        AWKWARD,
        Dtype.float32,
    )
    assert model.architecture.layers == 4
    texts = token_texts(load_tokenizer_only(settings.model))
    drafts = open_drafts(settings, CPU, Sampling.greedy(), texts, len(texts))
    drafts.begin([1, 2, 3])
    assert len(drafts.propose(2)) == 2
    drafts.close()


def test_a_file_is_a_gguf_file_and_two_names_are_a_repository(tmp_path: Path) -> None:
    file = tmp_path / f"{AWKWARD}.gguf"
    file.write_bytes(b"GGUF")
    found = meant(_settings(str(file), dtype=Dtype.bfloat16), CPU)
    assert (found.source, found.path, found.dtype, found.adapter) == (ModelSource.gguf, str(file), Dtype.bfloat16, None)
    found = meant(_settings("HuggingFaceTB/SmolLM2-135M"), CPU)
    assert (found.source, found.repo, found.name) == (ModelSource.hub, "HuggingFaceTB/SmolLM2-135M", "SmolLM2-135M")


def test_a_yaml_of_the_users_own_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    ours = Path(draft_model.__file__).parents[2] / "conf" / "model"
    (tmp_path / "model" / f"{AWKWARD}.yaml").write_text(
        (ours / "random.yaml").read_text() + "seed: 5\ndtype: bfloat16\n"
    )
    (tmp_path / "model" / "random.yaml").write_text("name: never\n")
    (tmp_path / "model" / "broken.yaml").write_text("name: broken\nbogus: 1\n")
    (tmp_path / "model" / "half.yaml").write_text("name: half\nsource: path\n")
    runtime = {"runtime": {"config_sources": [{"path": str(tmp_path), "schema": "file", "provider": "command-line"}]}}
    monkeypatch.setattr(draft_model.HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(draft_model.HydraConfig, "get", lambda: OmegaConf.create(runtime))
    found = meant(_settings(AWKWARD), CPU)
    assert (found.source, found.seed, found.dtype) == (ModelSource.random, 5, Dtype.bfloat16)
    assert meant(_settings("random"), CPU).name == "random-1M", "ours goes first, as with Hydra"
    with pytest.raises(UserError, match=r"^project\.draft\.model broken: .*bogus"):
        meant(_settings("broken"), CPU)
    with pytest.raises(UserError, match=r"^project\.draft\.model half: "):
        meant(_settings("half"), CPU)
    with pytest.raises(UserError, match=r"^project\.draft\.model must be one of .*, broken, half, llama3_70b, .* got "):
        meant(_settings("nope"), CPU)


def test_nothing_of_that_name_is_one_line() -> None:
    with pytest.raises(UserError) as refused:
        meant(_settings("nope"), CPU)
    assert str(refused.value) == (
        "project.draft.model must be one of llama3_70b, llama3_8b, qwen3_0_6b, random, smollm2_135m, tinyllama, "
        "a folder, a GGUF file or a hub repository, got 'nope'"
    )
