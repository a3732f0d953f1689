"""What is asked of a text of `split.infer`: logit rules, stop strings, a drawn seed, messages, a filled context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lab.command.entry import Run, compose_settings
from lab.engine.sampling import Sampling
from lab.models.sources import load_model
from lab.settings import UserError
from lab.text.logit_rules import LogitRules
from split import infer
from split.settings import SplitSettings
from tests.speculative.in_process import decoded_alone, local_engine

PROMPT = "Hello"
ASKED = (
    "project.temperature=0.9 project.repetition_penalty=1.2 project.presence_penalty=0.4 project.bad_words=[e] seed=3"
)


def _settings(words: str, prompt: str = PROMPT) -> SplitSettings:
    words = f"model=random model.dtype=float64 tracking=none project.transport=inproc project.local_shards=2 {words}"
    settings = compose_settings("split_inf", words, SplitSettings)
    settings.prompt = prompt
    return settings


def _said(words: str, folder: Path, prompt: str = PROMPT) -> dict[str, Any]:
    return infer.run(_settings(words, prompt), Run(folder))


def test_logit_rules_and_stop_strings_are_those_of_the_whole_model(tmp_path: Path) -> None:
    loaded = load_model(_settings(ASKED).model, torch.device("cpu"))
    words = LogitRules(
        prompt_tokens=len(PROMPT), repetition_penalty=1.2, presence_penalty=0.4, bad_words=((32, 101), (101,))
    )
    sampling = Sampling(seed=3, temperature=0.9, top_k=0, top_p=1.0, logit_rules=words)
    expected = decoded_alone(local_engine(loaded.model, sessions=1), list(PROMPT.encode()), sampling, 24)
    found = _said(f"{ASKED} project.max_new_tokens=24", tmp_path)
    assert found["token_ids"] == expected[: len(found["token_ids"])]
    assert found["ended_by"] == ("length" if len(found["token_ids"]) == 24 else "end_token")
    assert found["seed"] == 3
    letter = next(chr(token) for token in expected[4:] if chr(token).isalnum() and token < 127)
    stopped = _said(f"{ASKED} project.max_new_tokens=24 project.stop=[zzz,'{letter}']", tmp_path)
    assert stopped["ended_by"] == "stop"
    assert stopped["text"] == found["text"][: found["text"].index(letter)]
    assert len(stopped["token_ids"]) == expected.index(ord(letter))


def test_a_seed_may_be_drawn() -> None:
    assert 0 <= _settings("seed=-1").seed != _settings("seed=-1").seed


def test_a_text_may_fill_the_context(tmp_path: Path) -> None:
    found = _said("project.max_new_tokens=-1 project.context=16", tmp_path)
    assert len(found["token_ids"]) == 11 or found["ended_by"] == "end_token"
    with pytest.raises(UserError, match=r"^prompt must leave room in the context of 4 tokens, got 5$"):
        _said("project.max_new_tokens=-1 project.context=4", tmp_path)


def test_what_cannot_be_asked_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "messages.json"
    file.write_text(json.dumps([{"role": "user", "content": "hi"}]))
    with pytest.raises(UserError, match=r"^project\.messages must be null for a model without a chat template$"):
        _said(f"project.messages={file}", tmp_path, prompt="")
    with pytest.raises(UserError, match=r"^project\.logit_bias and bad_words must name ids in \[0, 259\), got 300$"):
        _said("'project.logit_bias={300: 1}'", tmp_path)
