"""The formulas against closed forms, against the literature, and against a simulation that plays every guess."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from speculative.theory import (
    ALONE,
    Plan,
    Speeds,
    async_tokens_per_second,
    best_plan,
    expected_tokens,
    predicted_async_tokens_per_second,
    simulate,
    simulated_optimum,
    survival,
    sync_tokens_per_second,
)
from tests.speculative.virtual import drawn

SPEEDS = Speeds(step_seconds=0.04, row_seconds=0.0008, draft_step_seconds=0.004, rtt_seconds=0.0)
DELAYS = (0.0, 0.02, 0.05, 0.1)
LENGTHS = range(17)


def _at(rtt_seconds: float) -> Speeds:
    return replace(SPEEDS, rtt_seconds=rtt_seconds)


def _best(acceptance: float, speeds: Speeds) -> tuple[Plan, float]:
    """The best plan and its speed-up over the target alone."""
    plan, speed = best_plan(survival(acceptance, 400), speeds.pace(), LENGTHS)
    return plan, speed * speeds.step_seconds


def test_expected_tokens_of_a_round() -> None:
    assert expected_tokens(0.0, 5) == 1
    assert expected_tokens(1.0, 5) == 6
    assert expected_tokens(0.5, 3) == pytest.approx(1 + 0.5 + 0.25 + 0.125)


def test_the_table_of_the_synchronous_loop() -> None:
    best = [max(sync_tokens_per_second(0.8, k, _at(rtt)) for k in range(1, 20)) * 0.04 for rtt in DELAYS]
    assert best == pytest.approx([2.31, 1.78, 1.35, 0.98], abs=0.01)


@pytest.mark.parametrize(("alpha", "never_waiting"), [(0.6, [1.47, 1.47, 1.24, 1.12]), (0.8, [2.42, 2.28, 1.85, 1.51])])
def test_the_table_of_an_asynchronous_loop_that_never_waits(alpha: float, never_waiting: list[float]) -> None:
    # Made elsewhere, with a drafter that stops at once when it is told; ours is half through a step.
    for rtt, seen in zip(DELAYS, never_waiting):
        chances = survival(alpha, 400)
        pace = replace(_at(rtt).pace(), answer_seconds=rtt + SPEEDS.draft_step_seconds)
        best = max(async_tokens_per_second(chances, pace, Plan(k, 0)) for k in LENGTHS) * 0.04
        assert best == pytest.approx(seen, rel=0.03)


@pytest.mark.parametrize("alpha", [0.4, 0.6, 0.8, 0.9])
@pytest.mark.parametrize("rtt", [*DELAYS, 0.3])
def test_the_formula_is_what_the_simulation_gives(alpha: float, rtt: float) -> None:
    plan, formula = _best(alpha, _at(rtt))
    runs = [simulate(drawn(alpha, seed), _at(rtt), plan, window=400, new_tokens=4000) for seed in range(3)]
    simulated = sum(run.tokens_per_second for run in runs) / len(runs) * 0.04
    assert simulated == pytest.approx(formula, rel=0.035)


def test_without_delay_and_drafting_time_it_is_the_synchronous_formula() -> None:
    speeds = replace(SPEEDS, draft_step_seconds=0.0)
    for length in (1, 3, 8):
        asynchronous = async_tokens_per_second(survival(0.7, 400), speeds.pace(), Plan(length, length))
        assert asynchronous == pytest.approx(sync_tokens_per_second(0.7, length, speeds), rel=2e-3)


def test_no_guess_is_ever_right() -> None:
    for rtt in DELAYS:
        assert _best(0.0, _at(rtt)) == (ALONE, pytest.approx(1.0))
        alone = simulate(drawn(0.0, 0), _at(rtt), ALONE, window=64, new_tokens=100)
        assert alone.tokens_per_second == pytest.approx(25.0)


def test_every_guess_is_right() -> None:
    # Passes are full as soon as the first guesses are there, and never run dry when drafting is fast enough.
    speeds = replace(_at(0.05), draft_step_seconds=0.001)
    full = 17 / speeds.pass_seconds(16)
    run = simulate(drawn(1.0, 0), speeds, Plan(16, 0), window=400, new_tokens=4000)
    assert run.tokens_per_second == pytest.approx(full, rel=0.03)
    assert run.epochs == 1
    # A drafter that is slower than that sets the speed itself: its guesses and what a pass adds to them.
    slow = simulate(drawn(1.0, 0), _at(0.05), Plan(16, 0), window=400, new_tokens=4000)
    assert slow.tokens_per_second == pytest.approx(1 / 0.004, rel=0.03)


def test_a_delay_without_end_leaves_the_target_alone() -> None:
    assert _best(0.9, _at(1e6))[1] == pytest.approx(1.0, abs=1e-3)
    run = simulate(drawn(0.9, 0), _at(1e6), Plan(8, 0), window=64, new_tokens=200)
    assert run.tokens_per_second == pytest.approx(25.0)


def test_better_guesses_and_shorter_ways_are_never_worse() -> None:
    speeds = [_best(alpha, _at(rtt))[1] for rtt in (0.0, 0.01, 0.03, 0.1, 0.3) for alpha in (0.2, 0.5, 0.8, 0.95)]
    by_rtt = [speeds[i : i + 4] for i in range(0, len(speeds), 4)]
    assert all(row == sorted(row) for row in by_rtt), "more acceptance, less speed"
    assert all(list(column) == sorted(column, reverse=True) for column in zip(*by_rtt)), "less delay, less speed"
    assert min(speeds) >= 1.0, "the best plan can always be the target alone"


def test_a_short_wait_pays_only_near_by() -> None:
    assert _best(0.6, _at(0.0))[0].wait_for > 0
    assert _best(0.6, _at(0.05))[0].wait_for == 0
    waiting, going = (async_tokens_per_second(survival(0.6, 400), SPEEDS.pace(), Plan(6, wait)) for wait in (2, 0))
    assert waiting > 1.05 * going


def test_a_window_and_a_slow_drafter() -> None:
    wide, narrow = (
        simulate(drawn(0.95, 0), _at(0.1), Plan(16, 0), window=window, new_tokens=3000).tokens_per_second
        for window in (64, 4)
    )
    assert narrow < 0.7 * wide
    slower_than_the_target = replace(_at(0.02), draft_step_seconds=0.05)
    run = simulate(drawn(0.8, 0), slower_than_the_target, Plan(4, 0), window=64, new_tokens=500)
    assert run.tokens_per_second >= 0.98 * 25.0


def test_only_the_round_trip_counts_not_how_it_is_split() -> None:
    speeds = [
        simulate(drawn(0.8, 3), _at(0.06), Plan(10, 0), window=64, new_tokens=4000, up_seconds=up).tokens_per_second
        for up in (0.0, 0.03, 0.06)
    ]
    assert speeds == pytest.approx([speeds[0]] * 3, rel=0.02)


def test_acceptance_by_place() -> None:
    assert survival([0.5, 0.9], 4) == pytest.approx([1, 0.5, 0.45, 0.405])
    # Guesses in runs: half of the epochs have none, the others long ones. Their mean acceptance says something else.
    runs = predicted_async_tokens_per_second([0.3, 0.97], _at(0.02), longest=16, draft_length=None, new_tokens=400)
    run = simulate(drawn([0.3, 0.97], 0), _at(0.02), _best_by_place([0.3, 0.97]), window=400, new_tokens=20000)
    assert run.tokens_per_second == pytest.approx(runs, rel=0.05)


def _best_by_place(rates: list[float]) -> Plan:
    return best_plan(survival(rates, 400), _at(0.02).pace(), LENGTHS)[0]


def test_the_optimum_of_a_text_is_hardly_below_the_best_plan_found_by_trying_them_all() -> None:
    draws = random.Random(0)
    wrong = {place for place in range(3000) if draws.random() < 0.2}

    def guess(place: int, in_epoch: int) -> bool:
        return place not in wrong

    optimum = simulated_optimum(guess, 0.8, _at(0.02), longest=16, new_tokens=3000).tokens_per_second
    tried = [
        simulate(guess, _at(0.02), Plan(length, wait), window=64, new_tokens=3000).tokens_per_second
        for length in range(1, 17)
        for wait in (0, 2, 4)
    ]
    assert optimum == pytest.approx(max(tried), rel=0.04)
    assert optimum > 1.4 * min(tried), "a bad plan is seen"
