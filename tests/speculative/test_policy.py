"""What the policies decide, on a virtual clock: beside the best plan for what they cannot know beforehand."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from speculative.policy import AcceptanceByPosition, DraftLength, Pacing, PassCosts
from speculative.theory import Speeds, best_plan, simulate, survival
from tests.speculative.virtual import Virtual, drawn

SPEEDS = Speeds(step_seconds=0.04, row_seconds=0.0008, draft_step_seconds=0.004, rtt_seconds=0.0)
ALONE = 1 / SPEEDS.step_seconds


def _virtual(alpha: float, rtt_seconds: float, *, draft_length: int | None = None, new_tokens: int = 1000) -> float:
    """Tokens per second, of three texts."""
    speeds = replace(SPEEDS, rtt_seconds=rtt_seconds)
    runs = [Virtual(speeds, lambda place: alpha, draft_length, seed=seed).run(new_tokens) for seed in range(3)]
    return sum(runs) / len(runs)


def _optimum(alpha: float, rtt_seconds: float) -> float:
    speeds = replace(SPEEDS, rtt_seconds=rtt_seconds)
    plans = [best_plan(survival(alpha, 400), speeds.pace(), [length])[0] for length in (0, 1, 2, 3, 5, 8, 12, 16)]
    return max(simulate(drawn(alpha, 1), speeds, p, window=64, new_tokens=3000).tokens_per_second for p in plans)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("rtt", [0.0, 0.02, 0.1])
def test_measuring_as_it_goes_it_is_as_fast_as_the_best_plan(alpha: float, rtt: float) -> None:
    assert _virtual(alpha, rtt) >= 0.92 * _optimum(alpha, rtt)  # the draws differ: three texts scatter by 3 %


@pytest.mark.parametrize(("alpha", "rtt"), [(0.5, 0.0), (0.8, 0.02), (0.9, 0.1)])
def test_no_fixed_length_is_much_better(alpha: float, rtt: float) -> None:
    fixed = max(_virtual(alpha, rtt, draft_length=length) for length in (1, 2, 4, 8, 16))
    assert _virtual(alpha, rtt) >= 0.93 * fixed


def test_a_fixed_length_is_kept() -> None:
    text = Virtual(SPEEDS, lambda place: 0.9, 3)
    text.run(300)
    assert text.pacing.plan.draft_length == 3
    assert text.rows <= 3 * text.passes


def test_guesses_that_are_never_right_cost_next_to_nothing() -> None:
    text = Virtual(SPEEDS, lambda place: 0.0)
    assert text.run(1000) >= 0.99 * ALONE
    assert text.pacing.rows(8) == 0
    assert text.drafter.next(0) == 0
    assert text.drafted < 150, "a drafter that is never right stays silent most of the time"


def test_speculation_is_tried_again_when_the_text_has_changed() -> None:
    speeds = replace(SPEEDS, rtt_seconds=0.02)
    text = Virtual(speeds, lambda place: 0.0 if place < 400 else 0.9)
    text.run(400)
    assert text.drafter.next(0) == 0
    began = text.now
    while text.position < 1600:
        text.run(text.position + 1)
    later = 1200 / (text.now - began)
    assert later >= 1.8 * ALONE, "the best would be 3.3 times the target alone"


def test_a_drafter_that_stops_is_not_waited_for_again_and_again() -> None:
    pacing = _trained(answer_seconds=0.006, spacing_seconds=0.004)
    assert pacing.plan.wait_for >= 1
    pacing.on_rejection(100.0)
    assert 0 < pacing.patience(100.0, 0) < 0.03
    assert pacing.patience(100.03, 0) == 0, "long past the time at which guesses usually come"
    pacing.on_rejection(200.0)
    pacing.on_draft(200.001, 0)
    assert pacing.patience(200.001, 0) == 0, "the drafter said that it has none"


def test_nobody_is_waited_for_over_a_distance() -> None:
    pacing = _trained(answer_seconds=0.06, spacing_seconds=0.004)
    assert pacing.plan.draft_length >= 4
    pacing.on_rejection(100.0)
    assert pacing.patience(100.0, 0) == 0


def _trained(*, answer_seconds: float, spacing_seconds: float, texts: int = 1) -> Pacing:
    """A policy that has seen 60 epochs of a drafter with acceptance 0.7."""
    costs, draws = PassCosts(), random.Random(0)
    pacing = Pacing(costs, None, 16)
    now = 0.0
    for _ in range(60):
        pacing.on_rejection(now)
        pacing.on_draft(now + answer_seconds, 1)
        for i in range(1, 8):
            pacing.on_draft(now + answer_seconds + i * spacing_seconds, 1)
        right = 0
        while draws.random() < 0.7 and right < 8:
            right += 1
        pacing.on_compared(right, 1)
        rows = 1 + min(right + 1, 8)
        costs.add(0.04 + 0.0008 * (texts * rows - 1), texts * rows, texts)
        now += 0.2
    return pacing


def test_what_a_pass_costs_is_found_by_least_squares() -> None:
    costs, draws = PassCosts(), random.Random(1)
    assert not costs.known
    assert costs.step_seconds == 0
    for _ in range(200):
        rows = draws.randint(1, 12)
        costs.add(0.05 + 0.002 * (rows - 1) + draws.uniform(-0.001, 0.001), rows, 1)
    assert costs.step_seconds == pytest.approx(0.05, rel=0.03)
    assert costs.row_seconds == pytest.approx(0.002, rel=0.1)
    before = costs.step_seconds
    costs.add(5.0, 3, 1)
    assert costs.step_seconds < 1.2 * before, "one pass that the machine held up"


def test_passes_of_one_size_say_little_about_a_row() -> None:
    costs = PassCosts()
    for _ in range(100):
        costs.add(0.04, 1, 1)
    assert costs.step_seconds == pytest.approx(0.04)
    assert costs.row_seconds == pytest.approx(0.0008)


@pytest.mark.parametrize(("right", "most", "worth"), [(0.3, 10, 0), (0.6, 1, 0), (0.9, 10, 10)])
def test_the_first_guess_may_cost_more_than_the_next_ones(right: float, most: int, worth: int) -> None:
    """So that one alone is not worth it, and ten are."""
    costs, acceptance, draws = PassCosts(), AcceptanceByPosition(), random.Random(0)
    for rows in (1, 1, 2, 5) * 100:
        costs.add(0.05 if rows == 1 else 0.08 + 0.006 * (rows - 1), rows, 1)
    assert costs.step_seconds == pytest.approx(0.05)
    assert costs.first_seconds == pytest.approx(0.03, rel=0.1)
    assert costs.row_seconds == pytest.approx(0.006, rel=0.1)
    for _ in range(400):
        is_right = draws.random() < right
        acceptance.add(int(is_right), int(not is_right))
    acceptance.place = 0
    assert acceptance.worth(most, costs) == worth


def test_a_guess_among_several_texts_costs_its_row_only() -> None:
    costs = PassCosts()
    for rows in (4, 6, 9) * 50:
        costs.add(0.05, 1, 1)
        costs.add(0.08 + 0.006 * (rows - 1), rows, 4)
    costs.add(0.098, 4, 4)
    assert costs.first_seconds == 0
    for _ in range(20):
        costs.add(0.05, 1, 1)
    assert costs.first_seconds == pytest.approx(0.03, rel=0.1)


def test_acceptance_is_told_apart_by_place() -> None:
    acceptance = AcceptanceByPosition()
    for epoch in range(200):
        acceptance.add(*((0, 1) if epoch % 2 else (6, 1)))
    rates = acceptance.rates
    assert rates[0] == pytest.approx(0.5, abs=0.1)
    assert rates[3] > 0.9
    assert rates[6] < 0.3
    assert acceptance.compared == 100 + 700


def test_a_guess_is_dearer_among_other_texts_that_it_holds_up() -> None:
    alone, among = (_trained(answer_seconds=0.06, spacing_seconds=0.004, texts=texts) for texts in (1, 16))
    assert among._costs.row_seconds == pytest.approx(16 * alone._costs.row_seconds, rel=0.05)
    assert 0 < among.plan.draft_length < alone.plan.draft_length


def test_guesses_go_in_groups_over_a_distance_and_alone_near_by() -> None:
    def grown(rtt_seconds: float) -> DraftLength:
        drafter = DraftLength(None, 64)
        drafter.rtt_seconds = rtt_seconds
        for i in range(40):
            drafter.on_drafted(1, 0.004)
            drafter.on_verdict(0.04 * i, 2, 0, 3)
        return drafter

    assert [grown(0.0).next(ahead) for ahead in (0, 2, 8)] == [1, 1, 1]
    assert [grown(0.05).next(ahead) for ahead in (0, 2, 8)] == [1, 3, 3]
    assert grown(0.05).next(64) == 0, "the window is full"


def test_no_guess_is_made_that_is_hardly_ever_reached() -> None:
    drafter = DraftLength(None, 64)
    for i in range(100):
        drafter.on_verdict(0.04 * i, 1, 1, 2)
    assert drafter.next(0) >= 1
    assert drafter.next(12) == 0
