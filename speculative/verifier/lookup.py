"""The verifier's own guesses for one text: prompt lookup, for when no drafter's guess has come."""

from __future__ import annotations

from collections.abc import Sequence

from speculative.drafts import NgramDrafts
from speculative.policy import AcceptanceByPlace, PassCosts


class Lookup:
    """Guesses what followed the last time, as far as it pays.

    What is found is compared with the text whether a pass took it or not: so it is known for nothing how often it is
    right, and rows are spent on it only where they are worth it.

    Args:
        longest: N-gram that is looked for first.
        shortest: And last.
        costs: Of the target's passes.
    """

    def __init__(self, longest: int, shortest: int, costs: PassCosts) -> None:
        self._drafts = NgramDrafts(longest, shortest)
        self._costs = costs
        self._acceptance = AcceptanceByPlace()
        self._found: list[int] = []

    def begin(self, ids: Sequence[int]) -> None:
        """Take a new text."""
        self._drafts.begin(ids)

    def guesses(self, most: int) -> list[int]:
        """What to check in the next pass, at most so many."""
        self._found = self._drafts.propose(most)
        rows = self._acceptance.worth(most, self._costs) if self._costs.known else most
        return self._found[:rows]

    def grow(self, position: int, new: Sequence[int]) -> None:
        """From `position` on the text goes on with `new`."""
        right = 0
        while right < min(len(self._found), len(new)) and self._found[right] == new[right]:
            right += 1
        self._acceptance.add(right, int(right < min(len(self._found), len(new))))
        self._found = []
        self._drafts.correct(position, new)
