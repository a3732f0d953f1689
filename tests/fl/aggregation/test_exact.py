import itertools
import math
import random
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fl.aggregation.exact as module
from fl.aggregation.exact import MAX_REPLIES, MAX_WEIGHT, ExactMean, Float32, MetricMean, TooManyReplies

Reply = tuple[Float32, int]
MIB = 1 << 20


def mean_of(replies: list[Reply]) -> Float32:
    mean = ExactMean(len(replies[0][0]))
    for values, weight in replies:
        mean.fold(values, weight)
    return mean.mean()


def float64_mean_of(replies: list[Reply]) -> Float32:
    """What everybody writes: the control that depends on the order."""
    total = np.zeros(len(replies[0][0]))
    for values, weight in replies:
        total += np.float64(weight) * values
    return (total / sum(weight for _, weight in replies)).astype(np.float32)


def exact_column_means(replies: list[Reply]) -> list[Fraction]:
    total_weight = sum(weight for _, weight in replies)
    columns = zip(*(values.tolist() for values, _ in replies))
    weights = [weight for _, weight in replies]
    return [sum(w * Fraction(x) for w, x in zip(weights, column)) / Fraction(total_weight) for column in columns]


def rounded(exact: Fraction) -> np.float32:
    """A fraction to the nearest float32, ties to even, by comparing with the neighbours of a guess."""
    guess = np.float32(float(exact))
    around = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(around, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(np.uint32)) % 2))


def random_replies(seed: int, count: int, size: int) -> list[Reply]:
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.uniform(-6, 0, size)
    return [
        ((rng.standard_normal(size) * scales).astype(np.float32), int(rng.integers(1, 5_000))) for _ in range(count)
    ]


finite = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-4, max_value=4)
denormal = st.integers(-(2**20), 2**20).map(lambda n: float(np.float32(n * 2.0**-149)))
huge = st.sampled_from([2.0**29, -(2.0**29), 2.0**28 + 64, 1.0, -1.0, 2.0**-126, 2.0**-149, 0.0, -0.0])
values_or_weights = st.integers(1, 6).flatmap(
    lambda size: st.lists(
        st.tuples(
            st.lists(finite | denormal | huge, min_size=size, max_size=size).map(lambda x: np.array(x, np.float32)),
            st.integers(1, 3) | st.integers(1, MAX_WEIGHT),
        ),
        min_size=1,
        max_size=7,
    )
)


def in_range(reply: Reply) -> bool:
    values, weight = reply
    return max(abs(Fraction(float(x))) for x in values) * weight <= 2**29


@settings(max_examples=300, deadline=None)
@given(values_or_weights)
def test_mean_is_the_exact_fraction_rounded_once_and_what_is_out_of_range_is_refused(replies: list[Reply]) -> None:
    mean = ExactMean(len(replies[0][0]))
    good = [reply for reply in replies if in_range(reply)]
    for values, weight in replies:
        if in_range((values, weight)):
            mean.fold(values, weight)
        else:
            with pytest.raises(ValueError, match="at most 2\\*\\*29"):
                mean.fold(values, weight)
    if not good:
        return
    exact = exact_column_means(good)
    assert mean.mean().tobytes() == np.array([rounded(e) for e in exact], np.float32).tobytes()
    total = sum(weight for _, weight in good)
    for column, (got, want) in enumerate(zip(mean.mean(), exact)):
        bound = sum(weight * abs(Fraction(float(values[column]))) for values, weight in good) / Fraction(total)
        assert abs(Fraction(float(got)) - want) <= Fraction(1, 10**6) * bound + Fraction(1, 2**150)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 20), st.integers(1, 3_000))
def test_mean_against_float64_within_the_stated_band(seed: int, count: int, size: int) -> None:
    replies = random_replies(seed, count, size)
    total = sum(weight for _, weight in replies)
    want = sum(np.float64(weight) * values for values, weight in replies) / total
    band = 1e-6 * sum(weight * np.abs(values.astype(np.float64)) for values, weight in replies) / total
    assert (np.abs(mean_of(replies) - want) <= band).all()


def test_all_orders_of_six_replies_give_the_same_bytes_and_plain_float64_does_not() -> None:
    replies = random_replies(1, 6, 2_500)
    orders = list(itertools.permutations(replies))
    assert len({mean_of(list(order)).tobytes() for order in orders}) == 1
    # The control: one rounding per addition makes float64 sums differ, and float32 shows it where they cancel.
    cancelling = [(np.array([x], np.float32), 1) for x in (1.0, -1.0, 2.0**-60, 2.0**-61, 3.0, -3.0)]
    assert len({mean_of(list(order)).tobytes() for order in itertools.permutations(cancelling)}) == 1
    assert len({float64_mean_of(list(order)).tobytes() for order in itertools.permutations(cancelling)}) > 1


def test_ties_go_to_even_and_a_denormal_breaks_them() -> None:
    tie = [1.0, float(np.nextafter(np.float32(1), np.float32(2)))]  # their mean is the middle of two float32
    nudge = 2.0**-149
    columns = [[*tie, 0.0, 0.0], [*tie, nudge, 0.0], [*tie, -nudge, 0.0]]
    replies = [(np.array(column, np.float32), 1) for column in zip(*columns)]
    # Weights that leave the middle where it is: the last two replies count in the sum, and as 2 of 4 in the weight.
    exact = exact_column_means(replies)
    assert mean_of(replies).tolist() == [float(rounded(e)) for e in exact]
    middles = [Fraction(tie[0]) + Fraction(tie[1]) for _ in columns]
    assert [e * 4 - m for e, m in zip(exact, middles)] == [0, Fraction(nudge), -Fraction(nudge)]
    assert len(set(mean_of(replies).tolist())) == 2


def test_blocks_tiles_and_tails_hold_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    replies = random_replies(5, 4, 10_000)
    for values, _ in replies:
        values[::97] = np.float32(3e-42)
        values[4_000:4_200] *= np.float32(1e-25)
    whole = mean_of(replies)
    monkeypatch.setattr(module, "BLOCK", 3_072)
    assert mean_of(replies).tobytes() == whole.tobytes()
    assert whole.tolist() == [float(rounded(e)) for e in exact_column_means(replies)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused_wherever_it_stands_and_changes_nothing(bad: float) -> None:
    size = module.BLOCK + 100
    good = np.linspace(-1, 1, size, dtype=np.float32)
    for position in (0, module.BLOCK - 1, size - 1):
        mean = ExactMean(size)
        mean.fold(good, 3)
        before = mean.mean().tobytes()
        broken = good.copy()
        broken[position] = bad
        with pytest.raises(ValueError, match="values must be finite"):
            mean.fold(broken, 1)
        assert (mean.count, mean.total_weight, mean.mean().tobytes()) == (1, 3, before)


@pytest.mark.parametrize("weight", [0, -1, MAX_WEIGHT + 1, True, 1.0, 2.5, math.nan, "3", None])
def test_a_weight_that_is_no_positive_whole_number_in_range_is_refused(weight: object) -> None:
    with pytest.raises(ValueError, match="weight must be"):
        ExactMean(2).fold(np.ones(2, np.float32), weight)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values", [np.ones(3, np.float32), np.ones(4), np.ones((2, 2), np.float32), np.ones(8, np.float32)[::2]]
)
def test_another_type_shape_or_layout_is_refused(values: Float32) -> None:
    with pytest.raises(ValueError, match="contiguous float32 vector of 4"):
        ExactMean(4).fold(values, 1)


def test_the_largest_sums_do_not_wrap_and_one_reply_too_many_is_an_error() -> None:
    mean = ExactMean(4)
    most = np.array([1.0, -1.0, 1.0 - 2**-24, 2.0**-149], np.float32)
    for _ in range(MAX_REPLIES):
        mean.fold(most, MAX_WEIGHT)
    assert mean.mean().tolist() == most.tolist()
    with pytest.raises(TooManyReplies, match=str(MAX_REPLIES)):
        mean.fold(most, 1)
    assert mean.count == MAX_REPLIES


def test_no_reply_has_no_mean() -> None:
    with pytest.raises(ValueError, match="at least 1 reply"):
        ExactMean(3).mean()


def fold_peak_bytes(replies: int, size: int) -> int:
    """tracemalloc's peak while that many random replies of `size` floats are folded; full size is a benchmark's."""
    rng = np.random.default_rng(0)
    tracemalloc.start()
    try:
        mean = ExactMean(size)
        for _ in range(replies):
            mean.fold(rng.standard_normal(size, np.float32) * np.float32(0.001), int(rng.integers(1, 1_000)))
        mean.mean()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_number_of_replies() -> None:
    adapter_bytes = MIB
    few, many = fold_peak_bytes(2, adapter_bytes // 4), fold_peak_bytes(200, adapter_bytes // 4)
    assert many - few <= 2 * adapter_bytes
    assert many < 200 * adapter_bytes / 10


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(-1e300, 1e300), st.integers(1, MAX_WEIGHT)),
        min_size=1,
        max_size=8,
    ),
    st.randoms(use_true_random=False),
)
def test_metric_means_are_exact_in_any_order(replies: list[tuple[float, int]], chance: random.Random) -> None:
    def means(order: list[tuple[float, int]]) -> dict[str, float]:
        mean = MetricMean()
        for value, weight in order:
            mean.fold({"loss": value}, weight)
        return mean.means()

    want = float(sum(Fraction(x) * w for x, w in replies) / sum(w for _, w in replies))
    shuffled = chance.sample(replies, len(replies))
    assert means(replies) == means(shuffled) == {"loss": want}


def test_a_metric_is_averaged_over_the_replies_that_have_it() -> None:
    mean = MetricMean()
    mean.fold({"loss": 1.0, "steps": 4}, 1)
    mean.fold({"loss": 4.0}, 2)
    assert mean.means() == {"loss": 3.0, "steps": 4.0}


@pytest.mark.parametrize("value", [math.nan, -math.inf, 10**400, [1.0], True, "1"])
def test_a_metric_that_is_not_one_finite_number_is_refused(value: object) -> None:
    mean = MetricMean()
    with pytest.raises(ValueError, match="loss must be one finite number"):
        mean.fold({"steps": 1, "loss": value}, 1)
    assert mean.means() == {}
