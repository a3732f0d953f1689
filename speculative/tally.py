"""The figures of one text: acceptance, speed, waste. Every definition stands here.

alpha                   accepted guesses / checked guesses. Checked are the accepted ones and the first of each draft
                        that was not; what stands behind it was never compared with anything.
alpha_by_position[i]    the same for the i-th guess of a draft alone: conditional on all before it having been accepted.
mean_accepted_length    accepted guesses / rounds that had guesses; without the token that the target adds.
draft_waste             guesses that are not in the text / guesses made.
ms_per_token_p50        median over tokens; the n tokens of a round took 1/n of the time since the round before, each.
tokens_per_second       new tokens / generation_seconds: from asking (connection and models are there) to the last one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from speculative.drafting import Round


@dataclass
class Tally:
    """Takes every round of one text as it comes. The clock starts when it is made."""

    clock: Callable[[], float] = time.perf_counter
    rounds: list[Round] = field(default_factory=list)
    _times: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._began = self.clock()

    def add(self, done: Round) -> None:
        """A round that has just come."""
        self.rounds.append(done)
        self._times.append(self.clock())

    @property
    def token_ids(self) -> list[int]:
        """The new tokens."""
        return [token for done in self.rounds for token in done.tokens]

    def figures(self) -> dict[str, Any]:
        """All figures, by the names of the last line; None where there was nothing to divide by."""
        drafted = [done for done in self.rounds if done.guesses]
        accepted = sum(done.accepted for done in drafted)
        made = sum(len(done.guesses) for done in drafted)
        by_position = self._alpha_by_position(drafted)
        checked = sum(_checked(done) for done in drafted)
        new_tokens = len(self.token_ids)
        seconds = self._times[-1] - self._began if self._times else 0.0
        nll = [value for done in self.rounds for value in done.guess_nll]
        return {
            "new_tokens": new_tokens,
            "generation_seconds": seconds,
            "tokens_per_second": _over(new_tokens, seconds),
            "ms_per_token_p50": self._ms_per_token_p50(),
            "time_to_first_token_seconds": self._times[0] - self._began if self._times else None,
            "rounds": len(self.rounds),
            "drafts_made": made,
            "drafts_checked": checked,
            "drafts_accepted": accepted,
            "alpha": _over(accepted, checked),
            "alpha_by_position": by_position,
            "mean_accepted_length": _over(accepted, len(drafted)),
            "draft_waste": _over(made - accepted, made),
            "guess_cross_entropy": _over(sum(nll), len(nll)),
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row of figures a round, for metrics; lists only where the verifier reported them."""
        for before, now, done in zip([self._began, *self._times], self._times, self.rounds):
            row: dict[str, Any] = {
                "round_seconds": now - before,
                "round_guesses": len(done.guesses),
                "round_accepted": done.accepted,
                "round_tokens": len(done.tokens),
            }
            if done.margins:
                row |= {"round_guess_cross_entropy": done.guess_nll, "round_margins": done.margins}
            yield row

    @staticmethod
    def _alpha_by_position(drafted: list[Round]) -> list[float]:
        longest = max((_checked(done) for done in drafted), default=0)
        rates = []
        for position in range(longest):
            reached = [done for done in drafted if _checked(done) > position]
            rates.append(sum(done.accepted > position for done in reached) / len(reached))
        return rates

    def _ms_per_token_p50(self) -> float | None:
        times: list[float] = []
        for before, now, done in zip([self._began, *self._times], self._times, self.rounds):
            times += [(now - before) * 1000 / len(done.tokens)] * len(done.tokens)
        return statistics.median(times) if times else None


def _checked(done: Round) -> int:
    """Guesses that were looked at. A text that ended inside a draft looked at no more than it took."""
    ended_inside = not done.ids
    return min(len(done.guesses), done.accepted + (not ended_inside))


def _over(count: float, of: float) -> float | None:
    return count / of if of else None
