"""Sampling as a function of position: a token depends on its position, not on the machine that draws it.

A token is ``argmax(logits + temperature * g(seed, position, token))`` over the tokens that top-k, top-p and min-p
leave, with ``g`` Gumbel noise from a counter-based hash. (Above 1 the temperature divides the logits instead, so that
no finite temperature turns a finite number into infinity.) There is no generator state: a drafter and a target that
share the seed draw the same noise on every machine, so that they agree with probability at least ``(1 - TV) / (1 +
TV)`` (TV: the total variation between their distributions; Daliri et al., arXiv 2408.07978) and only token ids need to
travel.

Knows nothing about models, sessions or networks.

Shapes: R rows (one position of one session each), V vocabulary, M tokens that are considered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lab.text.logit_rules import LogitRules, check_ranges

_LANE = 0xFFFFFFFF  # 32-bit arithmetic in int64 lanes: MPS has no uint64, and torch has few uint32 operations
_WORD = 0xFFFFFFFFFFFFFFFF
MOST_TOP_TOKENS = 20
"""Most of `Sampling.top_tokens`."""
_FIRST_SORTED = 256
"""Number of best tokens that are sorted first for top-k and top-p; 16 times as many while they are too few."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The sampling settings of one session. Equal settings and equal logits give equal text."""

    seed: int
    """Seed of the noise, in [0, 2^63)."""
    temperature: float
    """Multiplies the noise; 0 takes the best token, and the lowest id among equals. So does a temperature so
    small that the noise is lost in rounding."""
    top_k: int
    """Only the k best tokens can be drawn (all that equal the k-th); 0 switches it off."""
    top_p: float
    """Only the best tokens whose probabilities, after top-k, first add up to this can be drawn; 1 switches it off."""
    min_p: float = 0.0
    """Only tokens at least so probable, relative to the best one, can be drawn (Nguyen et al., arXiv 2407.01082; as in
    transformers after top-k and top-p, at the same temperature); 0 switches it off."""
    logit_rules: LogitRules | None = None
    """Changes to the logits before all other settings, by the text before them; None: no changes."""
    top_tokens: int = 0
    """How many of the most probable tokens are reported with each token drawn (`Choice.top`). Changes no token."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2^63), got {self.seed}")
        if not 0 <= self.top_tokens <= MOST_TOP_TOKENS:
            raise ValueError(f"top_tokens must be in [0, {MOST_TOP_TOKENS}], got {self.top_tokens}")
        check_ranges(self)

    @classmethod
    def greedy(cls) -> Sampling:
        """Sampling that always takes the best token."""
        return cls(seed=0, temperature=0.0, top_k=0, top_p=1.0)


@dataclass(frozen=True, slots=True)
class Choice:
    """The token drawn in each of R rows."""

    ids: list[int]
    """The token drawn."""
    nll: list[float]
    """Cross-entropy of the drawn token under the plain softmax of the logits (no temperature, no top-k), in nats."""
    margins: list[float]
    """Gap between the two best candidates, logit rules and noise included, in units of the logits: while top-k, top-p
    and min-p leave the same tokens, only an error of more than half of it can change the choice (of the logits after a
    repetition penalty). Infinite when one candidate was left."""
    follower_nll: list[float]
    """Cross-entropy of the follower, the token that is in the text at that position; NaN without one."""
    finite: list[bool]
    """Whether all logits were finite; if not, the other results of the row are meaningless."""
    top: list[list[tuple[int, float]]]
    """The `Sampling.top_tokens` most probable tokens of the plain softmax with their cross-entropies, best first, and
    of equal ones the lowest id first. A token's number is, to the bit, the one that `nll` and `follower_nll` have."""


def choose(
    logits_RV: Tensor,
    samplings: Sequence[Sampling],
    positions: Sequence[int],
    followers: Sequence[int],
    changed: Mapping[int, Tensor] | None = None,
) -> Choice:
    """Draw one token in every row.

    Args:
        logits_RV: Plain logits, of any floating dtype and device. Not changed.
        samplings: The settings of the session that each row belongs to.
        positions: Position of each drawn token in its text, counted from the first prompt token.
        followers: The token that is already there (a draft token); -1: none.
        changed: Scores, V each, that replace the logits of some rows, by row: `lab.text.logit_rules`.

    Returns:
        R ids, their cross-entropies and margins. A row's result does not depend on the other rows.
    """
    logits_RV = widened(logits_RV)
    log_total_R = logits_RV.logsumexp(-1)
    finite_R = log_total_R.isfinite() & logits_RV.amin(-1).isfinite()  # NaN and +inf show in the sum, -inf does not
    ids_R = torch.empty(len(samplings), dtype=torch.int64, device=logits_RV.device)
    margins_R = torch.empty_like(log_total_R)
    changed = changed or {}
    for (rule, is_changed), rows in _rows_by_rule(samplings, changed).items():
        whole = len(rows) == len(samplings)
        index_R = torch.tensor(rows, device=logits_RV.device)
        if is_changed:
            drawn_RV = torch.stack([changed[row] for row in rows])
        else:
            drawn_RV = logits_RV if whole else logits_RV[index_R]
        seeds = [samplings[row].seed for row in rows]
        places = [positions[row] for row in rows]
        ids, margins = _choose_by_one_rule(drawn_RV, rule, seeds, places)
        ids_R[index_R], margins_R[index_R] = ids, margins
    follower_R = torch.tensor(followers, dtype=torch.int64, device=logits_RV.device)
    follower_nll_R = (log_total_R - _pick(logits_RV, follower_R.clamp(min=0))).masked_fill(follower_R < 0, math.nan)
    nll_R = log_total_R - _pick(logits_RV, ids_R)
    top = [
        _top(logits_RV[row], log_total_R[row], one.top_tokens) if one.top_tokens else []
        for row, one in enumerate(samplings)
    ]
    return Choice(ids_R.tolist(), nll_R.tolist(), margins_R.tolist(), follower_nll_R.tolist(), finite_R.tolist(), top)


def nll(logits_RV: Tensor, ids: Sequence[int]) -> list[float]:
    """Cross-entropy, in nats, of one given token under the softmax of each row."""
    logits_RV = widened(logits_RV)
    ids_R = torch.tensor(ids, dtype=torch.int64, device=logits_RV.device)
    nll_R: list[float] = (logits_RV.logsumexp(-1) - _pick(logits_RV, ids_R)).tolist()
    return nll_R


def mix64(value: int) -> int:
    """Scramble 64 bits: the finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable generators, 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)


def noise_keys(seeds: Sequence[int], positions: Sequence[int], device: torch.device) -> Tensor:
    """A 64-bit key of each (seed, position), as R x 2 lanes of 32 bits in int64."""
    keys = [mix64(mix64(seed) ^ position) for seed, position in zip(seeds, positions, strict=True)]
    return torch.tensor([(key & _LANE, key >> 32) for key in keys], dtype=torch.int64, device=device)


def noise_bits(keys_x2: Tensor, tokens_x: Tensor) -> Tensor:
    """32 random bits for each token under its key, as int64; the same integers on every device.

    Two rounds of mixing. For one key they are a bijection of 32-bit tokens, so that no two tokens of a row tie.

    Args:
        keys_x2: From `noise_keys`; its leading dimensions broadcast with the tokens.
        tokens_x: int64 token ids.
    """
    return _mix32(_mix32(tokens_x ^ keys_x2[..., 0]) ^ keys_x2[..., 1])


def gumbel(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard Gumbel noise from 32-bit integers.

    ``-log(-log(1 - v))`` with ``v`` the uniform number: the best candidates have a small ``v``, where floats are dense,
    so that the upper tail keeps all its 32 bits even in float32. ``v`` is never 0 or 1.
    """
    uniform = ((bits.to(dtype) + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _mix32(lanes: Tensor) -> Tensor:
    """One round of mixing of 32-bit lanes: lowbias32 by Chris Wellons, nullprogram.com/blog/2018/07/31.

    The second constant, 0x846ca68b, stands as its negative equal modulo 2^32: then no product leaves int64.
    """
    lanes = ((lanes ^ (lanes >> 16)) * 0x7FEB352D) & _LANE
    lanes = ((lanes ^ (lanes >> 15)) * (0x846CA68B - 2**32)) & _LANE
    return lanes ^ (lanes >> 16)


def _top(logits_V: Tensor, log_total: Tensor, count: int) -> list[tuple[int, float]]:
    """The `count` best tokens of a row with their cross-entropies.

    Which of several equal tokens `topk` takes is not said; so it finds the last logit that counts, and no more.
    """
    least = logits_V.topk(min(count, len(logits_V))).values[-1]
    ids_M = (logits_V >= least).nonzero()[:, 0]  # in the order of ids
    best_M = logits_V[ids_M].sort(descending=True, stable=True).indices[:count]
    ids_K = ids_M[best_M]
    return list(zip(ids_K.tolist(), (log_total - logits_V[ids_K]).tolist(), strict=True))


def _pick(logits_RV: Tensor, ids_R: Tensor) -> Tensor:
    return logits_RV.gather(-1, ids_R[:, None])[:, 0]


def widened(logits_RV: Tensor) -> Tensor:
    """The logits in the precision in which tokens are drawn."""
    return logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()


_Rule = tuple[float, int, float, float]


def _rows_by_rule(samplings: Sequence[Sampling], changed: Mapping[int, Tensor]) -> dict[tuple[_Rule, bool], list[int]]:
    rows: dict[tuple[_Rule, bool], list[int]] = {}
    for row, sampling in enumerate(samplings):
        rule = sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
        rows.setdefault((rule, row in changed), []).append(row)
    return rows


def _choose_by_one_rule(
    logits_RV: Tensor, rule: _Rule, seeds: Sequence[int], positions: Sequence[int]
) -> tuple[Tensor, Tensor]:
    temperature, top_k, top_p, min_p = rule
    if temperature == 0:
        return _best_and_margin(logits_RV.clone())
    divisor, heat = min(max(temperature, 1.0), torch.finfo(logits_RV.dtype).max), min(temperature, 1.0)
    scores_RM, tokens_RM = _survivors(logits_RV / divisor if divisor > 1 else logits_RV, top_k, top_p, heat)
    if min_p:
        least_R1 = scores_RM.amax(-1, True) + heat * math.log(min_p)
        scores_RM = scores_RM.masked_fill(scores_RM < least_R1, -math.inf)
    bits_RM = noise_bits(noise_keys(seeds, positions, logits_RV.device)[:, None], tokens_RM)
    best_R, margins_R = _best_and_margin(gumbel(bits_RM, scores_RM.dtype).mul_(heat).add_(scores_RM))
    ids_R = tokens_RM.expand(len(seeds), -1).gather(-1, best_R[:, None])[:, 0]
    return ids_R, margins_R * divisor


def _best_and_margin(scores_RM: Tensor) -> tuple[Tensor, Tensor]:
    """The best index and its lead over the next one. Overwrites the scores, which is far cheaper than a top-2."""
    best_R = scores_RM.argmax(-1)  # torch documents: the first of equals
    best_R1 = scores_RM.gather(-1, best_R[:, None])
    scores_RM.scatter_(-1, best_R[:, None], -math.inf)
    return best_R, best_R1[:, 0] - scores_RM.amax(-1)


def _survivors(scores_RV: Tensor, top_k: int, top_p: float, heat: float) -> tuple[Tensor, Tensor]:
    """The tokens that can be drawn: scores (-inf: cannot) and ids, of all tokens or of the M best. Only these need
    noise.

    Both rules keep what reaches a threshold and do not count: which of several equal tokens a sort puts first differs
    between devices. So M must reach below the threshold. `heat` is the temperature that the scores still have.
    """
    vocabulary_size = scores_RV.shape[-1]
    if top_k >= vocabulary_size:
        top_k = 0
    if not top_k and top_p == 1:
        return scores_RV, torch.arange(vocabulary_size, device=scores_RV.device)[None]
    count = max(_FIRST_SORTED, top_k + 1)
    while True:
        best_RM, tokens_RM = scores_RV.topk(min(count, vocabulary_size))
        by_count_RM = best_RM >= best_RM[:, top_k - 1, None]  # top_k = 0: the last one, so that all remain
        inside_RM = by_count_RM
        if top_p < 1:
            counted_RX = best_RM.masked_fill(~by_count_RM, -math.inf) if top_k else scores_RV
            inside_RM = by_count_RM & (best_RM >= _nucleus_threshold(best_RM, counted_RX, top_p, heat))
        cut_off_RM = by_count_RM if top_k else inside_RM
        if count >= vocabulary_size or not bool(cut_off_RM[:, -1].any()):
            return best_RM.masked_fill(~inside_RM, -math.inf), tokens_RM
        count *= 16


def _nucleus_threshold(best_RM: Tensor, counted_RX: Tensor, top_p: float, heat: float) -> Tensor:
    """The last of the sorted scores that is needed to reach the probability, R x 1.

    Scores are taken from the best one down, so that dividing by the smallest heat makes nothing but -inf of them.
    """
    heat = max(heat, torch.finfo(best_RM.dtype).tiny)
    best_R1 = best_RM[:, :1]
    log_total_R1 = ((counted_RX - best_R1) / heat).logsumexp(-1, True)
    probability_RM = ((best_RM - best_R1) / heat - log_total_R1).exp()
    needed_RM = probability_RM.cumsum(-1) - probability_RM < top_p
    return best_RM.gather(-1, needed_RM.sum(-1, True).clamp_(min=1) - 1)
