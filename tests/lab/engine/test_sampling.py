"""The sampling rule as a distribution, its hash as randomness, and the coupling that it buys.

Every statistical test has a control: a wrong rule, a weak hash or noise that is not shared fails it. Seeds are fixed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from lab.engine import sampling
from lab.engine.sampling import Sampling, choose, gumbel, mix64, nll, noise_bits, noise_keys
from tests.random_models import random_model

VOCABULARY = 24
Noise = Callable[[torch.Tensor, torch.dtype], torch.Tensor]
RULES = [
    Sampling(seed=11, temperature=1.0, top_k=0, top_p=1.0),
    Sampling(seed=12, temperature=0.7, top_k=9, top_p=1.0),
    Sampling(seed=13, temperature=1.4, top_k=0, top_p=0.8),
    Sampling(seed=14, temperature=0.9, top_k=12, top_p=0.85),
]


def _logits(seed: int, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * 1.5


def _draw(logits_V: torch.Tensor, rule: Sampling, positions: range) -> np.ndarray:
    drawn: list[int] = []
    for start in range(0, len(positions), 50_000):
        part = positions[start : start + 50_000]
        rows_RV = logits_V.expand(len(part), -1)
        drawn += choose(rows_RV, [rule] * len(part), part, [-1] * len(part)).ids
    return np.array(drawn)


def _oracle(logits_V: torch.Tensor, rule: Sampling) -> np.ndarray:
    """Softmax with temperature, then top-k, then top-p, written as plainly as possible in float64."""
    scores = logits_V.double().numpy() / rule.temperature
    order = np.argsort(-scores)
    if rule.top_k:
        order = order[: rule.top_k]
    probability = np.exp(scores[order]) / np.exp(scores[order]).sum()
    needed = int(np.searchsorted(np.cumsum(probability), rule.top_p)) + 1 if rule.top_p < 1 else len(order)
    result = np.zeros(len(scores))
    result[order[:needed]] = probability[:needed] / probability[:needed].sum()
    return result


def _p_value(drawn: np.ndarray, expected: np.ndarray) -> float:
    counts = np.bincount(drawn, minlength=len(expected))
    if counts[expected == 0].any():
        return 0.0
    possible = expected > 0
    return float(stats.chisquare(counts[possible], expected[possible] * len(drawn)).pvalue)


def _independence_p_value(first: np.ndarray, second: np.ndarray) -> float:
    table = np.zeros((VOCABULARY, VOCABULARY))
    np.add.at(table, (first, second), 1)
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    return float(stats.chi2_contingency(table).pvalue)


@pytest.mark.parametrize("rule", RULES, ids=["plain", "top-k", "top-p", "both"])
def test_a_million_draws_have_the_softmax_distribution(rule: Sampling) -> None:
    logits_V = _logits(1)
    assert _p_value(_draw(logits_V, rule, range(1_000_000)), _oracle(logits_V, rule)) > 0.01


@pytest.mark.parametrize(
    "wrong",
    [lambda bits, dtype: gumbel(bits, dtype) / 2, lambda bits, dtype: bits.to(dtype) * 2.0**-32],
    ids=["half the spread", "uniform noise"],
)
def test_a_wrong_rule_fails_the_same_test(monkeypatch: pytest.MonkeyPatch, wrong: Noise) -> None:
    monkeypatch.setattr(sampling, "gumbel", wrong)
    logits_V = _logits(1)
    assert _p_value(_draw(logits_V, RULES[0], range(20_000)), _oracle(logits_V, RULES[0])) < 1e-6


def _lower_half_p_value() -> float:
    """Among many equal tokens, are low ids drawn as often as high ones? Ties go to the lowest id."""
    drawn = _draw(torch.zeros(4_000), RULES[0], range(600))
    return float(stats.binomtest(int((drawn < 2_000).sum()), len(drawn)).pvalue)


def test_many_equal_tokens_are_drawn_equally() -> None:
    assert _lower_half_p_value() > 0.01


def test_noise_of_few_bits_fails_the_same_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "gumbel", lambda bits, dtype: gumbel((bits >> 22) << 22, dtype))
    assert _lower_half_p_value() < 1e-6


def test_the_wrong_nucleus_fails_the_same_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token too few: what a cumulative sum compared the wrong way round gives."""
    right = sampling._nucleus_threshold
    monkeypatch.setattr(sampling, "_nucleus_threshold", lambda *given: right(*given) + 1e-3)
    logits_V = _logits(1)
    assert _p_value(_draw(logits_V, RULES[2], range(50_000)), _oracle(logits_V, RULES[2])) < 1e-6


def _neighbours_p_values() -> list[float]:
    """Draws at positions 2n and 2n + 1; and at the same positions with seeds s and s + 1."""
    logits_V, rule = _logits(2), RULES[0]
    drawn = _draw(logits_V, rule, range(400_000))
    next_seed = Sampling(seed=rule.seed + 1, temperature=rule.temperature, top_k=rule.top_k, top_p=rule.top_p)
    other = _draw(logits_V, next_seed, range(400_000))
    return [_independence_p_value(drawn[::2], drawn[1::2]), _independence_p_value(drawn, other)]


def test_neighbouring_positions_and_seeds_are_independent() -> None:
    assert min(_neighbours_p_values()) > 0.01


def test_a_weak_hash_fails_the_same_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """One multiplication of a sum: neighbours get shifted copies of the same noise."""

    def weak_keys(seeds: list[int], positions: list[int], device: torch.device) -> torch.Tensor:
        return torch.tensor([(seed, position) for seed, position in zip(seeds, positions)], device=device)

    def weak_bits(keys: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return ((keys[..., 0] + keys[..., 1] + tokens) * 0x01000193) & 0xFFFFFFFF

    monkeypatch.setattr(sampling, "noise_keys", weak_keys)
    monkeypatch.setattr(sampling, "noise_bits", weak_bits)
    logits_V = _logits(1)
    assert _p_value(_draw(logits_V, RULES[0], range(100_000)), _oracle(logits_V, RULES[0])) < 1e-6
    assert max(_neighbours_p_values()) < 1e-6


def test_noise_bits_are_the_integers_of_the_published_hash() -> None:
    """Against the same hash in Python's unbounded integers: no lane overflowed, no sign crept in."""

    def lowbias32(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        return x ^ (x >> 16)

    seeds, positions, tokens = [0, 7, 2**63 - 1], [0, 10**6, 3], [0, 1, 151_935]
    bits_RV = noise_bits(noise_keys(seeds, positions, torch.device("cpu"))[:, None], torch.tensor(tokens))
    for row, (seed, position) in enumerate(zip(seeds, positions)):
        key = mix64(mix64(seed) ^ position)
        expected = [lowbias32(lowbias32(token ^ (key & 0xFFFFFFFF)) ^ (key >> 32)) for token in tokens]
        assert bits_RV[row].tolist() == expected
    assert mix64(0) == 0xE220A8397B1DCDAF  # first output of SplitMix64 with seed 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_finite_at_both_ends_and_keeps_its_upper_tail(dtype: torch.dtype) -> None:
    noise = gumbel(torch.tensor([0, 1, 2, 2**31, 2**32 - 1]), dtype)
    assert bool(noise.isfinite().all())
    assert noise[0] > noise[1] > noise[2] > noise[3] > noise[4]
    assert float(noise[0]) == pytest.approx(33 * math.log(2), abs=1e-6)


def _match_probability(p: np.ndarray, q: np.ndarray) -> float:
    """Exact for Gumbel coupling: sum over j of 1 / sum over i of max(p_i / p_j, q_i / q_j)."""
    return float(sum(1 / np.maximum(p / p[j], q / q[j]).sum() for j in range(len(p))))


@pytest.mark.parametrize("sharpness", [0.1, 0.5, 1.0, 2.0])
def test_coupled_draws_match_as_often_as_promised(sharpness: float) -> None:
    rule = RULES[0]
    independent = Sampling(seed=999, temperature=1.0, top_k=0, top_p=1.0)
    target_V = _logits(5)
    draft_V = target_V + sharpness * _logits(6)
    p, q = _oracle(target_V, rule), _oracle(draft_V, rule)
    variation = 0.5 * np.abs(p - q).sum()
    exact, promised, draws = _match_probability(p, q), (1 - variation) / (1 + variation), 40_000
    assert exact >= promised
    said = _draw(target_V, rule, range(draws))
    agreed = int((said == _draw(draft_V, rule, range(draws))).sum())
    assert stats.binomtest(agreed, draws, exact).pvalue > 0.001
    uncoupled = int((said == _draw(draft_V, independent, range(draws))).sum())  # the control: own noise
    assert stats.binomtest(uncoupled, draws, exact, alternative="less").pvalue < 1e-6


@functools.cache
def _logged_pairs() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits of a model, and of its first three layers of four, at twelve places of a text: target and drafter."""
    text = torch.tensor([[(7 * index) % 97 for index in range(12)]])
    with torch.inference_mode():
        target: Any = random_model("llama", torch.float64)
        drafter: Any = random_model("llama", torch.float64, num_hidden_layers=3)
        return list(zip(target(text).logits[0], drafter(text).logits[0]))


def _matches(seed_of_the_drafter: int, draws: int) -> list[tuple[int, float]]:
    """Of each logged pair: how often both say the same, and the least share that is promised."""
    rule = Sampling(seed=11, temperature=1.5, top_k=0, top_p=1.0)
    found = []
    for target_V, draft_V in _logged_pairs():
        said = _draw(target_V, rule, range(draws))
        guessed = _draw(draft_V, replace(rule, seed=seed_of_the_drafter), range(draws))
        variation = 0.5 * float(np.abs(_oracle(target_V, rule) - _oracle(draft_V, rule)).sum())
        found.append((int((said == guessed).sum()), (1 - variation) / (1 + variation)))
    return found


def test_on_logged_pairs_coupled_draws_match_at_least_as_often_as_promised() -> None:
    for agreed, promised in _matches(11, 5_000):
        assert 0.02 < promised < 0.98, "nearly equal or apart: nothing is proved"
        assert stats.binomtest(agreed, 5_000, promised, alternative="less").pvalue > 0.001


def test_noise_of_its_own_breaks_that_promise() -> None:
    broken = [
        stats.binomtest(agreed, 5_000, least, alternative="less").pvalue < 1e-6 for agreed, least in _matches(12, 5_000)
    ]
    assert sum(broken) > len(broken) / 2


@pytest.mark.parametrize("rule", [*RULES, Sampling.greedy(), Sampling(seed=3, temperature=1.0, top_k=0, top_p=0.999)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_row_does_not_depend_on_the_rows_beside_it(rule: Sampling, dtype: torch.dtype) -> None:
    logits_RV = (torch.randn(12, 3000, generator=torch.Generator().manual_seed(3)) * 2).to(dtype)
    others = [RULES[row % 4] if row % 3 else rule for row in range(12)]
    positions, followers = list(range(100, 112)), list(range(12))
    together = choose(logits_RV, others, positions, followers)
    for row in range(12):
        alone = choose(logits_RV[row : row + 1], [others[row]], [positions[row]], [followers[row]])
        assert (alone.ids[0], alone.nll[0], alone.margins[0], alone.follower_nll[0]) == (
            together.ids[row],
            together.nll[row],
            together.margins[row],
            together.follower_nll[row],
        )


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 0.99), (300, 1.0), (700, 0.97), (2999, 0.9), (3000, 0.9), (5000, 0.9), (1, 1.0), (0, 1e-9)]
)
def test_survivors_are_right_when_they_are_many_or_few(top_k: int, top_p: float) -> None:
    rule = Sampling(seed=1, temperature=1.0, top_k=top_k, top_p=top_p)
    logits_V = torch.randn(3000, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    scores_RM, tokens_RM = sampling._survivors(logits_V[None], top_k, top_p, 1.0)
    kept = tokens_RM[0][scores_RM[0] > -math.inf].sort().values
    assert kept.tolist() == np.flatnonzero(_oracle(logits_V, rule)).tolist()


def test_equal_tokens_stay_or_go_together() -> None:
    logits_V = torch.tensor([0.0, 2.0, 1.0, 1.0, 1.0, -1.0])
    drawn = {
        *_draw(logits_V, Sampling(seed=1, temperature=1.0, top_k=2, top_p=1.0), range(2000)),
    }
    assert drawn == {1, 2, 3, 4}


def test_more_equal_tokens_than_are_sorted_first_count_for_the_nucleus() -> None:
    logits_V = torch.cat([torch.tensor([math.log(600)]), torch.zeros(600), torch.full((50,), -3.0)])
    scores_RM, tokens_RM = sampling._survivors(
        logits_V[None], 2, 0.6, 1.0
    )  # the first alone has half of what top-k leaves
    assert sorted(tokens_RM[0][scores_RM[0] > -math.inf].tolist()) == list(range(601))


def test_temperature_zero_takes_the_lowest_of_the_best() -> None:
    logits_RV = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 1.0, 2.0, 4.5]])
    choice = choose(logits_RV, [Sampling.greedy()] * 2, [0, 1], [-1, 3])
    assert choice.ids == [1, 0]
    assert choice.margins == [0.0, 0.5]
    assert math.isnan(choice.follower_nll[0])
    expected = torch.nn.functional.cross_entropy(logits_RV, torch.tensor([1, 3]), reduction="none").tolist()
    assert nll(logits_RV, [1, 3]) == pytest.approx(expected, abs=1e-6)
    assert choice.follower_nll[1] == pytest.approx(expected[1], abs=1e-6)
    assert logits_RV[0].tolist() == [1.0, 3.0, 3.0, 2.0], "the caller's logits were changed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-45, 1e-38, 1e-30, 1e-7])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.5), (40, 1e-300), (0, math.nextafter(1, 0))])
def test_a_tiny_temperature_takes_the_best_token(
    dtype: torch.dtype, temperature: float, top_k: int, top_p: float
) -> None:
    """Also between the ends of the dtype; two logits of a row differ by at least 0.01."""
    generator = torch.Generator().manual_seed(9)
    logits_RV = torch.stack([torch.randperm(300, generator=generator) / 10 - 10 for _ in range(6)]).to(dtype)
    logits_RV[4], logits_RV[5, 7] = torch.finfo(dtype).min, torch.finfo(dtype).max
    logits_RV[4, 200] = torch.finfo(dtype).min / 2
    rule = Sampling(seed=2**63 - 1, temperature=temperature, top_k=top_k, top_p=top_p)
    found = choose(logits_RV, [rule] * 6, list(range(6)), [-1] * 6)
    best = choose(logits_RV, [Sampling.greedy()] * 6, list(range(6)), [-1] * 6)
    assert found.ids == best.ids
    assert all(found.finite)
    assert not any(math.isnan(number) for number in (*found.margins, *found.nll))
    if top_p == 1:
        assert found.margins == pytest.approx(best.margins, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e30, 1e39, 1e300, 1.7e308])
def test_a_huge_temperature_draws_all_tokens_alike(dtype: torch.dtype, temperature: float) -> None:
    logits_V = _logits(1).to(dtype)
    for top_p in (1.0, 0.999999):
        rule = Sampling(seed=0, temperature=temperature, top_k=0, top_p=top_p)
        assert _p_value(_draw(logits_V, rule, range(5_000)), np.full(VOCABULARY, 1 / VOCABULARY)) > 0.001
        choice = choose(logits_V[None], [rule], [0], [-1])
        assert not math.isnan(choice.margins[0])


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_row_that_is_not_finite_is_named_and_touches_no_other(wrong: float, dtype: torch.dtype) -> None:
    logits_RV = (torch.randn(8, 3000, generator=torch.Generator().manual_seed(3)) * 2).to(dtype)
    rules = [*RULES, Sampling.greedy(), *RULES[:3]]
    positions, followers = list(range(8)), [1] * 8
    clean = choose(logits_RV, rules, positions, followers)
    logits_RV[2, 17] = wrong
    spoilt = choose(logits_RV, rules, positions, followers)
    assert spoilt.finite == [row != 2 for row in range(8)]
    assert all(clean.finite)
    for row in {*range(8)} - {2}:
        assert (spoilt.ids[row], spoilt.nll[row], spoilt.margins[row]) == (
            clean.ids[row],
            clean.nll[row],
            clean.margins[row],
        )


def test_the_margin_is_what_an_error_in_the_logits_must_exceed() -> None:
    rule = Sampling(seed=5, temperature=0.5, top_k=0, top_p=1.0)
    logits_RV = _logits(8).double().expand(200, -1)
    positions, nothing = list(range(200)), [-1] * 200
    choice = choose(logits_RV, [rule] * 200, positions, nothing)
    for share, changed in ((0.999, False), (1.001, True)):
        moved_RV = logits_RV.clone()
        for row, (token, margin) in enumerate(zip(choice.ids, choice.margins)):
            moved_RV[row, token] -= share * margin
        after = choose(moved_RV, [rule] * 200, positions, nothing).ids
        assert all((now != before) == changed for now, before in zip(after, choice.ids))
    alone = choose(logits_RV[:1], [Sampling(seed=5, temperature=1.0, top_k=1, top_p=1.0)], [0], [-1])
    assert alone.margins == [math.inf]


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("seed", -1, r"seed must be in \[0, 2\^63\), got -1"),
        ("seed", 2**63, "seed must be in"),
        ("temperature", -0.1, "temperature must be finite and at least 0, got -0.1"),
        ("temperature", math.nan, "temperature must be"),
        ("temperature", math.inf, "temperature must be finite"),
        ("top_k", -1, r"top_k must be in \[0, 2\*\*32\), got -1"),
        ("top_p", 0.0, r"top_p must be in \(0, 1\], got 0.0"),
        ("top_p", 1.1, "top_p must be in"),
    ],
)
def test_settings_that_make_no_sense_are_refused(field: str, value: float, rule: str) -> None:
    values: dict[str, float] = {"seed": 0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, field: value}
    with pytest.raises(ValueError, match=rule):
        Sampling(**values)  # type: ignore[arg-type]  # wrong values are the point
