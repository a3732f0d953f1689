"""GPipe and 1F1B as data: complete, free of deadlock, bounded, and as long as the formulas say."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from split.training.schedule import (
    Operation,
    Phase,
    Schedule,
    even_bubble,
    least_seconds,
    most_held,
    operations,
    replay,
)

SIZES = {"shards": st.integers(1, 6), "micro_batches": st.integers(1, 12), "schedule": st.sampled_from(Schedule)}
SECONDS = st.floats(0.01, 10.0)


def orders(schedule: Schedule, shards: int, micro_batches: int) -> list[list[Operation]]:
    return [operations(schedule, shards=shards, shard=shard, micro_batches=micro_batches) for shard in range(shards)]


def held(order: list[Operation]) -> int:
    """The most micro-batches between their forward and the end of their backward."""
    now = most = 0
    for operation in order:
        now += 1 if operation.phase is Phase.forward else -1
        most = max(most, now)
    return most


def test_the_two_schedules_of_two_shards() -> None:
    def text(schedule: Schedule, shard: int) -> str:
        found = operations(schedule, shards=2, shard=shard, micro_batches=4)
        return " ".join(f"{operation.phase.name[0].upper()}{operation.micro_batch}" for operation in found)

    assert text(Schedule.gpipe, 0) == text(Schedule.gpipe, 1) == "F0 F1 F2 F3 B0 B1 B2 B3"
    assert text(Schedule.one_f_one_b, 0) == "F0 F1 B0 F2 B1 F3 B2 B3"
    assert text(Schedule.one_f_one_b, 1) == "F0 B0 F1 B1 F2 B2 F3 B3"


@given(**SIZES)
def test_every_micro_batch_goes_both_ways_once_in_order(schedule: Schedule, shards: int, micro_batches: int) -> None:
    for order in orders(schedule, shards, micro_batches):
        for phase in Phase:
            numbers = [operation.micro_batch for operation in order if operation.phase is phase]
            assert numbers == list(range(micro_batches))


@given(**SIZES)
def test_a_shard_holds_what_the_schedule_allows(schedule: Schedule, shards: int, micro_batches: int) -> None:
    for shard, order in enumerate(orders(schedule, shards, micro_batches)):
        bound = micro_batches if schedule is Schedule.gpipe else min(shards - shard, micro_batches)
        assert held(order) == bound
        assert most_held(schedule, shards=shards, shard=shard, micro_batches=micro_batches) == bound


@given(**SIZES, forward=SECONDS, backward=SECONDS)
def test_equal_shards_leave_the_known_bubble(
    schedule: Schedule, shards: int, micro_batches: int, forward: float, backward: float
) -> None:
    timeline = replay(orders(schedule, shards, micro_batches), [forward] * shards, [backward] * shards)
    assert timeline.seconds == pytest.approx((micro_batches + shards - 1) * (forward + backward))
    assert timeline.bubble_fraction == pytest.approx(even_bubble(shards, micro_batches), abs=1e-9)


@given(micro_batches=SIZES["micro_batches"], times=st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=6))
def test_unequal_shards_take_what_the_docstring_says(micro_batches: int, times: list[tuple[float, float]]) -> None:
    forward, backward = [f for f, _ in times], [b for _, b in times]

    def seconds(schedule: Schedule) -> float:
        return replay(orders(schedule, len(times), micro_batches), forward, backward).seconds

    expected = least_seconds(Schedule.gpipe, forward, backward, micro_batches)
    assert seconds(Schedule.gpipe) == pytest.approx(expected)
    least = least_seconds(Schedule.one_f_one_b, forward, backward, micro_batches)
    assert seconds(Schedule.one_f_one_b) >= least * (1 - 1e-9)


def test_the_formulas_of_unequal_shards() -> None:
    """Three micro-batches, by hand."""
    assert least_seconds(Schedule.gpipe, [1.0, 2.0], [3.0, 4.0], 3) == 3.0 + 2 * 2.0 + 7.0 + 2 * 4.0
    assert least_seconds(Schedule.one_f_one_b, [1.0, 2.0], [3.0, 4.0], 3) == 4.0 + 3 * 6.0
    assert least_seconds(Schedule.one_f_one_b, [2.0, 1.0], [4.0, 3.0], 3) == 3 * 6.0


@given(**SIZES, link=SECONDS)
def test_nothing_begins_before_its_input(schedule: Schedule, shards: int, micro_batches: int, link: float) -> None:
    timeline = replay(orders(schedule, shards, micro_batches), [1.0] * shards, [2.0] * shards, link)
    times = [{span.operation: span for span in shard} for shard in timeline.shards]
    for number in range(micro_batches):
        forward, backward = Operation(number, Phase.forward), Operation(number, Phase.backward)
        for before, after in itertools.pairwise(times):
            assert after[forward].begin >= before[forward].end + link
            assert before[backward].begin >= after[backward].end + link
        assert times[-1][backward].begin >= times[-1][forward].end
    for shard in timeline.shards:
        assert all(early.end <= late.begin + 1e-9 for early, late in itertools.pairwise(shard))


def test_a_wrong_schedule_is_refused() -> None:
    forward, backward = Operation(0, Phase.forward), Operation(0, Phase.backward)
    with pytest.raises(ValueError, match="shard 0 waits for the input"):
        replay([[backward, forward], [forward, backward]], [1.0, 1.0], [1.0, 1.0])
