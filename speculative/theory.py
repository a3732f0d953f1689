"""What speculation should give, from measured figures.

Notation: a acceptance (each guess is right with this probability, independently), k guesses a round, t_T the target's
pass over one token, t_V its pass over k + 1, t_D the drafter's pass, R the round-trip time.

A round yields the guesses up to the first wrong one and a token of the target's own behind them. The n-th guess counts
with probability a^n, so that E(k) = 1 + a + ... + a^k = (1 - a^(k+1)) / (1 - a) tokens are expected (Leviathan et al.,
arXiv 2211.17192, equation 1). In the synchronous loop nothing overlaps: k guesses, there, the check, and back, one
after the other, take k t_D + t_V + R. The target alone streams a token every t_T, whatever R is.
"""

from __future__ import annotations


def expected_tokens(alpha: float, draft_length: int) -> float:
    """Tokens a round, E(k)."""
    if alpha == 1:
        return draft_length + 1.0
    return float((1 - alpha ** (draft_length + 1)) / (1 - alpha))


def verify_seconds(step_seconds: float, row_seconds: float, draft_length: int) -> float:
    """A pass over the last token and k guesses, when each row beyond the first costs the same."""
    return step_seconds + row_seconds * draft_length


def sync_round_seconds(
    draft_length: int, *, draft_step_seconds: float, verify_pass_seconds: float, rtt_seconds: float
) -> float:
    """One round of the synchronous loop."""
    return draft_length * draft_step_seconds + verify_pass_seconds + rtt_seconds


def sync_speedup(
    alpha: float,
    draft_length: int,
    *,
    step_seconds: float,
    row_seconds: float,
    draft_step_seconds: float,
    rtt_seconds: float,
) -> float:
    """Tokens per second of the synchronous loop over those of the target alone."""
    round_seconds = sync_round_seconds(
        draft_length,
        draft_step_seconds=draft_step_seconds,
        verify_pass_seconds=verify_seconds(step_seconds, row_seconds, draft_length),
        rtt_seconds=rtt_seconds,
    )
    return expected_tokens(alpha, draft_length) * step_seconds / round_seconds
