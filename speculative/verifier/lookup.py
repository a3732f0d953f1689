"""The verifier's own draft tokens for one sequence: prompt lookup, for passes without a drafter's."""

from collections.abc import Sequence

from speculative.acceptance import common_length
from speculative.drafts import NgramDrafts
from speculative.policy import AcceptanceByPosition, PassCosts


class Lookup:
    """Proposes the tokens that followed the same tokens last time, as many as pay off.

    All found tokens are compared with the text, whether or not a pass checked them: so acceptance is known at no cost,
    and rows are spent on them only if that pays off.

    Args:
        longest: N-gram that is looked for first.
        shortest: N-gram that is looked for last.
        costs: Measured passes of the target.
    """

    def __init__(self, longest: int, shortest: int, costs: PassCosts) -> None:
        self._drafts = NgramDrafts(longest, shortest)
        self._costs = costs
        self._acceptance = AcceptanceByPosition()
        self._found: list[int] = []

    def begin(self, ids: Sequence[int]) -> None:
        """Start a new text."""
        self._drafts.begin(ids)

    def propose(self, most: int) -> list[int]:
        """Draft tokens for the next pass, at most `most`."""
        self._found = self._drafts.propose(most)
        rows = self._acceptance.worth(most, self._costs) if self._costs.known else most
        return self._found[:rows]

    def extend(self, position: int, new: Sequence[int]) -> None:
        """Continue the text with `new` from `position` on."""
        right = common_length(self._found, new)
        self._acceptance.add(right, int(right < min(len(self._found), len(new))))
        self._found = []
        self._drafts.correct(position, new)
