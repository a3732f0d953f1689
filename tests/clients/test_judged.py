"""What `make clients` says of the cases that it ran, and of the scores that it compared."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

import pytest

from tests.clients.__main__ import Case, Outcome, Refusal, _case, compared, judged

REFUSED: list[Refusal] = [{"reason": "No middle is filled in.", "says": "suffix must", "cases": ["m::C::suffix"]}]
OURS = [
    Case("m::C::one", Outcome.passed),
    Case("m::C::two", Outcome.passed),
    Case("m::C::suffix", Outcome.failed, "BadRequestError: suffix must be null, got 'x'"),
]
THEIRS = [Case("m::C::one", Outcome.passed), Case("m::C::two", Outcome.failed), Case("m::C::suffix", Outcome.failed)]


def changed(cases: list[Case], place: int, outcome: Outcome, fault: str = "") -> list[Case]:
    return [Case(one.name, outcome, fault) if at == place else one for at, one in enumerate(cases)]


def test_a_run_holds_in_which_only_listed_cases_fail() -> None:
    row = judged(OURS, THEIRS, REFUSED)
    assert row["holds"], row
    assert (row["passed_share"], row["transformers_serve_share"]) == (2 / 3, 1 / 3)
    assert row["refused"] == {"No middle is filled in.": 1}


@pytest.mark.parametrize(
    ("ours", "theirs", "figure", "names"),
    [
        (changed(OURS, 0, Outcome.failed, "suffix must"), THEIRS, "failed_without_a_reason", ["m::C::one"]),
        (changed(OURS, 2, Outcome.failed, "500"), THEIRS, "failed_for_another_reason", ["m::C::suffix"]),
        (changed(OURS, 2, Outcome.passed), THEIRS, "listed_but_not_failed", ["m::C::suffix"]),
        (OURS[:2], THEIRS[:2], "listed_but_not_failed", ["m::C::suffix"]),
        (changed(OURS, 1, Outcome.unstarted), THEIRS, "not_started", ["m::C::two"]),
        (OURS, changed(THEIRS, 1, Outcome.unstarted), "transformers_serve_not_started", ["m::C::two"]),
        (OURS, THEIRS[:2], "same_cases", False),
    ],
)
def test_what_else_happens_is_named_and_does_not_hold(
    ours: list[Case], theirs: list[Case], figure: str, names: Any
) -> None:
    row = judged(ours, theirs, REFUSED)
    assert row[figure] == names
    assert not row["holds"]


def test_a_case_that_did_not_start_counts_for_nobody() -> None:
    row = judged(changed(OURS, 1, Outcome.unstarted), changed(THEIRS, 1, Outcome.skipped), REFUSED)
    assert (row["passed_share"], row["transformers_serve_share"]) == (1 / 2, 1 / 2)


def test_as_many_passed_cases_as_the_peer_do_not_hold() -> None:
    assert not judged(OURS, changed(THEIRS, 1, Outcome.passed), REFUSED)["holds"]


@pytest.mark.parametrize(
    ("inside", "outcome"),
    [
        ("", Outcome.passed),
        ('<failure message="m">text</failure>', Outcome.failed),
        ('<error message="m">text</error>', Outcome.unstarted),
        ('<skipped message="m">text</skipped>', Outcome.skipped),
        ('<failure message="m">text</failure><error message="at its end">text</error>', Outcome.unstarted),
    ],
)
def test_outcomes_are_those_of_the_report(inside: str, outcome: Outcome) -> None:
    case = _case(
        "chat/test_x.py", ET.fromstring(f'<testcase classname="tests.a.TestX" name="one[loose]">{inside}</testcase>')
    )
    assert (case.name, case.outcome) == ("chat/test_x.py::TestX::one[loose]", outcome)
    assert (case.fault == "") == (outcome is Outcome.passed)


def found(*scores: float, acc: float = 1.0) -> dict[str, Any]:
    return {"acc": acc, "acc_norm": acc, "scores": [[[score, False] for score in scores]]}


EXACT = found(-3.0, -4.0, -4.0)
WHOLE = found(-3.0 + 1e-6, -4.0, -4.0)


def test_scores_agree_within_the_rounding_of_the_model_in_process() -> None:
    row = compared(found(-3.0 - 1.5e-6, -4.0 + 1e-6, -4.0 + 1e-6), WHOLE, EXACT, [(0, 1, 2)])
    assert row["holds"], row
    assert row["largest_difference"] == pytest.approx(2.5e-6)


@pytest.mark.parametrize(
    "served",
    [
        found(-3.0 + 1e-4, -4.0, -4.0),
        found(-3.0, -4.0, -4.0 + 5e-7),
        found(-3.0, -4.0, -4.0, acc=0.9),
        {**found(-3.0, -4.0, -4.0), "scores": [[[-3.0, True], [-4.0, False], [-4.0, False]]]},
    ],
    ids=["not as exact", "a tie broken", "another accuracy", "another greedy answer"],
)
def test_scores_that_do_not_agree(served: dict[str, Any]) -> None:
    assert not compared(served, WHOLE, EXACT, [(0, 1, 2)])["holds"]
