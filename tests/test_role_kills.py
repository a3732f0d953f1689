"""A drafter and a training that SIGTERM ends in the middle of their work; `tests.soak roles_killed` has all roles."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.role_kills import ROLES, Killed, kill_roles, wrong_of


@pytest.mark.real
def test_what_was_made_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.role_kills.AT_WORK", 1.0)
    monkeypatch.setattr("tests.role_kills.WORK_SECONDS", 0.0)
    killed = kill_roles(2, seed=3, names=["drafter", "central"])
    assert killed.faults == []
    assert killed.with_text == 1, "the drafter was at its text"


LAST = {"status": "failed", "ended_by": "terminated", "text": "a word and", "token_ids": [1]}


@pytest.mark.parametrize(
    ("code", "last", "shown", "errors", "fault"),
    [
        (143, LAST, "a word\n", "terminated\n", None),
        (0, {"status": "ok", "ended_by": "length", "text": "a", "token_ids": [1]}, "a\n", "", None),
        (-15, LAST, "a word\n", "", "exit code -15"),
        (143, LAST | {"ended_by": "failed"}, "a word\n", "", "ended_by 'failed'"),
        (143, LAST, "another\n", "", "shown 'another'"),
        (143, {"status": "failed", "ended_by": "terminated"}, "a word\n", "", "nothing kept"),
        (143, LAST, "a word\n", "Exception ignored in: x\n", "a traceback"),
        (143, None, "a word\n", "", "no last line"),
    ],
)
def test_what_is_wrong_with_an_end_is_found(
    code: int, last: dict[str, Any] | None, shown: str, errors: str, fault: str | None, tmp_path: Path
) -> None:
    """The controls."""
    out, err = tmp_path / "out", tmp_path / "err"
    out.write_text(shown + (json.dumps(last) + "\n" if last else ""))
    err.write_text(errors)
    found = list(wrong_of(ROLES["drafter"], code, signal.SIGTERM, out, err, Killed()))
    assert len(found) == (fault is not None)
    assert fault is None or fault in found[0]
