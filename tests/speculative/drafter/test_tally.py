"""The figures of a text, on rounds whose figures are known by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from speculative.drafter.loop import Round
from speculative.drafter.tally import Tally
from tests.speculative.in_process import sync_round


def _tally(rounds: list[Round], seconds: list[float]) -> Tally:
    times: Iterator[float] = iter([0.0, *seconds])
    tally = Tally(clock=lambda: next(times))
    for done in rounds:
        tally.add(done)
    return tally


def test_figures_by_hand() -> None:
    rounds = [
        sync_round([1, 2, 3], 3, [4], [0.1, 0.2, 0.3], []),  # all accepted: 3 checked
        sync_round([5, 6, 7], 1, [8], [0.4, 2.0], []),  # 2 checked, the third never looked at
        sync_round([9, 9, 9], 0, [10], [5.0], []),  # 1 checked
        sync_round([], 0, [11], [], []),  # no guesses: no round of speculation
    ]
    figures = _tally(rounds, [0.4, 0.6, 0.7, 0.8]).figures()
    assert figures["new_tokens"] == 8
    assert (figures["drafts_made"], figures["drafts_checked"], figures["drafts_accepted"]) == (9, 6, 4)
    assert figures["alpha"] == pytest.approx(4 / 6)
    assert figures["alpha_by_position"] == pytest.approx([2 / 3, 1 / 2, 1.0])
    assert figures["mean_accepted_length"] == pytest.approx(4 / 3)
    assert figures["draft_waste"] == pytest.approx(5 / 9)
    assert figures["guess_cross_entropy"] == pytest.approx(8.0 / 6)
    assert figures["time_to_first_token_seconds"] == pytest.approx(0.4)
    assert figures["tokens_per_second"] == pytest.approx(10)
    assert figures["ms_per_token_p50"] == pytest.approx(100)  # 4 x 100, 2 x 100, 100, 100


def test_a_text_that_ends_inside_a_draft_looked_at_no_more_than_it_took() -> None:
    figures = _tally([sync_round([1, 2, 3, 4], 2, [], [0.1, 0.1], [])], [1.0]).figures()
    assert (figures["drafts_checked"], figures["alpha"], figures["alpha_by_position"]) == (2, 1.0, [1.0, 1.0])


def test_nothing_to_divide_by_is_none() -> None:
    figures = _tally([sync_round([], 0, [1], [], [])], [1.0]).figures()
    assert figures["alpha"] is None
    assert figures["mean_accepted_length"] is None
    assert figures["draft_waste"] is None
    assert figures["alpha_by_position"] == []
    assert _tally([], []).figures()["tokens_per_second"] is None


def test_rows_have_lists_only_where_they_were_reported() -> None:
    tally = _tally([sync_round([1], 1, [2], [0.1], [3.0, 4.0]), sync_round([1], 0, [2], [], [])], [1.0, 3.0])
    first, second = tally.rows()
    assert first["round_guess_cross_entropy"] == [0.1]
    assert first["round_margins"] == [3.0, 4.0]
    assert second == {"round_seconds": 2.0, "round_guesses": 1, "round_accepted": 0, "round_tokens": 1}
