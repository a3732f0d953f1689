"""Where a stop string ends a text: by its characters, however tokens cut them; and nothing of it is ever shown."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from lab.text.running_text import RunningText, final_text


def _decode(ids: Sequence[int]) -> str:
    return bytes(ids).decode(errors="replace")


PIECES = ["a", "b", "ab", "ba", "é", "€ ", "\U0001f98a", " x", "aab"]


def _decode_pieces(ids: Sequence[int]) -> str:
    return "".join(PIECES[token] for token in ids)


def _plainly(text: str, stops: Sequence[str]) -> str:
    """The oracle: the shortest beginning of the text that has a stop string in it, without that."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


def _shown(running: RunningText, ids: Sequence[int]) -> str:
    return "".join([*(running.add(token) for token in ids), running.finish()])


@pytest.mark.parametrize("seed", range(40))
def test_a_text_ends_where_a_stop_string_is_first_complete(seed: int) -> None:
    numbers = random.Random(seed)
    ids = [numbers.randrange(len(PIECES)) for _ in range(30)]
    whole = _decode_pieces(ids)
    stops = [whole[at : at + numbers.randrange(1, 7)] for at in (numbers.randrange(len(whole)) for _ in range(3))]
    expected = _plainly(whole, stops)
    running = RunningText(_decode_pieces, stops)
    shown = ""
    for token in ids:
        shown += running.add(token)
        assert expected.startswith(shown), "what may become a stop string is held back"
    assert shown + running.finish() == expected
    found = final_text(_decode_pieces, ids, stops)
    assert (found.text, found.stopped) == (expected, True)
    kept = _decode_pieces(found.ids)
    assert expected.startswith(kept)
    assert not expected.startswith(_decode_pieces(ids[: len(found.ids) + 1])), "as many tokens as stand before it"


def test_characters_of_several_tokens_are_found() -> None:
    ids = list("1 € then € ends".encode())
    found = final_text(_decode, ids, ["€ e"])
    assert (found.text, bytes(found.ids), found.stopped) == ("1 € then ", "1 € then ".encode(), True)


def test_without_the_stop_string_all_is_shown() -> None:
    ids = list(b"abcab")
    running = RunningText(_decode, ["abd", "bx"])
    assert [running.add(token) for token in ids] == ["", "", "abc", "", ""]
    assert running.finish() == "ab"
    assert final_text(_decode, ids, ["abd"]).text == "abcab"
    assert _shown(RunningText(_decode), ids) == "abcab"


def test_half_a_character_at_the_end_is_shown_as_that() -> None:
    assert _shown(RunningText(_decode, ["x"]), list("a€".encode()[:-1])) == "a\N{REPLACEMENT CHARACTER}"
