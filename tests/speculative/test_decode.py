"""Speculation over full windows, as a command: a verifier process, a drafter a text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab.models.conversion import byte_tokenizer
from speculative.decode import _cut, figures_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.real
def test_every_text_fills_its_window(tmp_path: Path) -> None:
    words = ["model=random", "tracking=none", "project.context=96", "project.sessions=2", "project.max_new_tokens=12"]
    done = subprocess.run(
        [sys.executable, "-m", "speculative.decode", *words], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["context"], last["sessions"]) == (96, 2)
    assert last["new_tokens"] == 24
    assert last["tokens_per_second"] > 0
    assert last["token_seconds_p50"] > 0
    assert 0 <= last["alpha"] <= 1


def text(**figures: float) -> dict[str, float]:
    same = {"new_tokens": 10, "generation_seconds": 2.0, "ms_per_token_p50": 200.0, "time_to_first_token_seconds": 0.5}
    return same | {"drafts_checked": 8, "drafts_accepted": 4, "drafts_late": 0} | figures


def test_figures_of_several_texts() -> None:
    figures = figures_of([text(), text(generation_seconds=4.0, drafts_accepted=8, ms_per_token_p50=400.0)])
    assert figures["tokens_per_second"] == 5.0, "20 tokens until the slowest was done"
    assert figures["token_seconds_p50"] == pytest.approx(0.3)
    assert figures["alpha"] == 0.75
    assert figures_of([text(drafts_checked=0, drafts_accepted=0)])["alpha"] is None


def test_a_prompt_is_never_longer_than_asked() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("häuser")["input_ids"]
    assert _cut(tokenizer, ids) == "häuser"
    assert len(tokenizer(_cut(tokenizer, ids[:2]))["input_ids"]) <= 2, "half a letter becomes three bytes of a mark"
