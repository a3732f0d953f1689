"""The text on a terminal: whole characters, two colours, nothing that a terminal obeys."""

from __future__ import annotations

import io

from speculative.terminal import ACCEPTED, CORRECTED, PLAIN, TextStream
from tests.speculative.in_process import sync_round


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _decode(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


def _shown(stream: io.StringIO, text: bytes, accepted: int) -> str:
    shown = TextStream(_decode, stream)
    shown.show(sync_round(list(text[:accepted]), accepted, list(text[accepted:]), [], []))
    shown.finish()
    return stream.getvalue()


def test_guesses_and_corrections_have_their_colours() -> None:
    assert _shown(Terminal(), b"ab", 1) == f"{ACCEPTED}a{PLAIN}{CORRECTED}b{PLAIN}\n"


def test_no_colours_where_it_is_no_terminal() -> None:
    assert _shown(io.StringIO(), b"ab", 1) == "ab\n"


def test_a_character_is_written_once_it_is_whole() -> None:
    stream = io.StringIO()
    shown = TextStream(_decode, stream)
    for byte in "é€x".encode():
        shown.show(sync_round([], 0, [byte], [], []))
        assert "\N{REPLACEMENT CHARACTER}" not in stream.getvalue()
    shown.finish()
    assert stream.getvalue() == "é€x\n"


def test_what_a_target_says_does_not_move_the_cursor() -> None:
    assert _shown(io.StringIO(), b"a\x1b[2Jb\n", 0) == "a?[2Jb\n\n"
