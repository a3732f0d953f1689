"""The real model: float32 text through two roles, with flips counted and each explained by its margin."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.speculative.processes import Role, drafted, verifier

pytestmark = pytest.mark.real

WORDS = ("tracking=none", "device.threads=1", "model.dtype=float32")
CODE = "Write this Python function again, with a docstring:\ndef add(first, second):\n    return first + second\n"


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Role]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with verifier(*WORDS) as running:
        yield running
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "words",
    [
        ("project.draft.source=ngram", "project.draft.length=8", "project.max_new_tokens=60"),
        (
            *("project.draft.source=layers", "project.draft.layers=4", "project.draft.length=3"),
            *("project.temperature=0.7", "seed=3", "project.max_new_tokens=24"),
        ),
    ],
    ids=lambda words: words[0].rpartition("=")[2],
)
def test_text_is_the_targets_own_or_each_flip_is_a_tie(smollm2: Role, words: tuple[str, ...], tmp_path: Path) -> None:
    result = drafted(smollm2.port, (*WORDS, *words, "project.check=true"), tmp_path, CODE)
    assert words[-1] == f"project.max_new_tokens={result['new_tokens']}" or result["ended_by"] == "end_token"
    assert all(flip["margin"] < 1e-4 for flip in result["flips"]), result["flips"]
    assert len(result["flips"]) <= 1
    assert result["drafts_checked"] > 5
    if "ngram" in words[0]:
        assert result["drafts_accepted"] + result["drafts_late"] > 5


def test_the_chat_template_is_used_unless_it_is_not_wanted(smollm2: Role, tmp_path: Path) -> None:
    short = (*WORDS, "project.max_new_tokens=12")
    chat = drafted(smollm2.port, short, tmp_path / "chat", "What is the capital of France?")
    plain = drafted(smollm2.port, (*short, "project.chat=false"), tmp_path / "plain", "What is the capital of France?")
    assert "Paris" in chat["text"]
    assert chat["token_ids"] != plain["token_ids"]
