"""Figures of one request: acceptance, speed, waste; with all definitions.

alpha                   right draft tokens / checked ones. Checked means compared with the text: the right ones and the
                        first wrong one of each epoch; those after it were never compared.
alpha_by_position[i]    the same for the i-th draft token of a run only: conditional on all before it having been right.
                        A run begins with each draft (sync), after a wrong draft token, and where the target was ahead
                        (async).
mean_accepted_length    accepted draft tokens / rounds that had some. Accepted are the right ones that had arrived when
                        the target chose the same, in a pass over them or (async) in the one just before.
drafts_late             right draft tokens that are not accepted: the target had chosen the token before (async).
drafts_stale            draft tokens that were sent and never compared: one before them was wrong.
draft_step_seconds      time of drafting / draft tokens made.
draft_waste             draft tokens that were made and not accepted / those made.
epochs                  wrong draft tokens that were sent: each ended an epoch.
ms_per_token_p50        median over tokens; each of the n tokens of a round took 1/n of the time since the round before.
tokens_per_second       new tokens / generation_seconds: from the request (connected, models loaded) to the last token.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from speculative.drafter.loop import Round


@dataclass
class Tally:
    """Collects the rounds of one request as they arrive. The clock starts when it is made."""

    clock: Callable[[], float] = time.perf_counter
    rounds: list[Round] = field(default_factory=list)
    _times: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._began = self.clock()

    def add(self, done: Round) -> None:
        """Add a round that has just arrived."""
        self.rounds.append(done)
        self._times.append(self.clock())

    @property
    def token_ids(self) -> list[int]:
        """The new tokens."""
        return [token for done in self.rounds for token in done.tokens]

    def figures(self) -> dict[str, Any]:
        """All figures, by their names in the last line; None if there is nothing to divide by."""
        drafted = [done for done in self.rounds if done.draft_ids]
        accepted = sum(done.accepted for done in drafted)
        right = sum(done.right for done in drafted)
        made = sum(done.made for done in self.rounds)
        checked = sum(done.checked for done in drafted)
        new_tokens = len(self.token_ids)
        seconds = self._times[-1] - self._began if self._times else 0.0
        nll = [value for done in self.rounds for value in done.draft_nll]
        return {
            "new_tokens": new_tokens,
            "generation_seconds": seconds,
            "tokens_per_second": _over(new_tokens, seconds),
            "ms_per_token_p50": self._ms_per_token_p50(),
            "time_to_first_token_seconds": self._times[0] - self._began if self._times else None,
            "rounds": len(self.rounds),
            "epochs": self.rounds[-1].epoch if self.rounds else 0,
            "drafts_made": made,
            "draft_step_seconds": _over(sum(done.draft_seconds for done in self.rounds), made),
            "drafts_sent": sum(done.sent for done in self.rounds),
            "drafts_stale": sum(done.stale for done in self.rounds),
            "drafts_checked": checked,
            "drafts_accepted": accepted,
            "drafts_late": right - accepted,
            "alpha": _over(right, checked),
            "alpha_by_position": self._alpha_by_position(drafted),
            "mean_accepted_length": _over(accepted, len(drafted)),
            "draft_waste": _over(made - accepted, made),
            "guess_cross_entropy": _over(sum(nll), len(nll)),
        }

    def rows(self) -> list[dict[str, Any]]:
        """Figures of each round, for metrics."""
        return [self.row(index) for index in range(len(self.rounds))]

    def row(self, index: int) -> dict[str, Any]:
        """Figures of round `index`; lists only where the verifier reported them."""
        done, before = self.rounds[index], self._times[index - 1] if index else self._began
        row: dict[str, Any] = {
            "round_seconds": self._times[index] - before,
            "round_guesses": len(done.draft_ids),
            "round_accepted": done.accepted,
            "round_tokens": len(done.tokens),
        }
        if done.margins:
            row |= {"round_guess_cross_entropy": done.draft_nll, "round_margins": done.margins}
        return row

    @staticmethod
    def _alpha_by_position(drafted: list[Round]) -> list[float]:
        reached: Counter[int] = Counter()
        right: Counter[int] = Counter()
        for done in drafted:
            reached.update(range(done.place, done.place + done.checked))
            right.update(range(done.place, done.place + done.right))
        return [right[place] / reached[place] for place in sorted(reached)]

    def _ms_per_token_p50(self) -> float | None:
        times: list[float] = []
        for before, now, done in zip([self._began, *self._times], self._times, self.rounds):
            times += [(now - before) * 1000 / len(done.tokens)] * len(done.tokens)
        return statistics.median(times) if times else None


def _over(count: float, of: float) -> float | None:
    return count / of if of else None
