"""Rounds on a terminal: what was guessed right and what the target put have their colours."""

from __future__ import annotations

import io

import pytest

from lab.command.terminal import PLAIN, TextStream
from speculative.drafter.session import ACCEPTED, CORRECTED, show
from tests.lab.command.test_terminal import Terminal, decode_bytes
from tests.speculative.in_process import sync_round


def _shown(stream: io.StringIO, text: bytes, accepted: int) -> str:
    shown = TextStream(decode_bytes, stream)
    show(shown, sync_round(list(text[:accepted]), accepted, list(text[accepted:]), [], []))
    shown.finish(CORRECTED)
    return stream.getvalue()


def test_guesses_and_corrections_have_their_colours() -> None:
    assert _shown(Terminal(), b"ab", 1) == f"{ACCEPTED}a{PLAIN}{CORRECTED}b{PLAIN}\n"


def test_no_colours_where_it_is_no_terminal() -> None:
    assert _shown(io.StringIO(), b"ab", 1) == "ab\n"


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_colours_where_nobody_wants_them(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert _shown(Terminal(), b"ab", 1) == "ab\n"
