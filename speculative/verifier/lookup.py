"""The verifier's own draft tokens of one sequence, for passes without a drafter's: prompt lookup, and forced tokens."""

from collections.abc import Sequence

from speculative.acceptance import common_length
from speculative.drafts import Drafts
from speculative.policy import AcceptanceByPosition, PassCosts


class Lookup:
    """Proposes the tokens of a source that needs no model, as many as pay off, and all that are forced.

    All found tokens are compared with the text, whether or not a pass checked them: so acceptance is known at no cost,
    and rows are spent on them only if that pays off.

    Args:
        drafts: The source.
        costs: Measured passes of the target.
    """

    def __init__(self, drafts: Drafts, costs: PassCosts) -> None:
        self._drafts = drafts
        self._costs = costs
        self._acceptance = AcceptanceByPosition()
        self._found: list[int] = []
        self._forced = 0
        """Number of them that are forced: the first ones."""

    def begin(self, ids: Sequence[int]) -> None:
        """Start a new text."""
        self._drafts.begin(ids)

    def propose(self, most: int) -> list[int]:
        """Draft tokens for the next pass, at most `most`."""
        self._found = self._drafts.propose(most)
        self._forced = self._drafts.forced
        most -= self._forced
        rows = self._acceptance.worth(most, self._costs) if self._costs.known else most
        return self._found[: self._forced + rows]

    def extend(self, position: int, new: Sequence[int]) -> None:
        """Continue the text with `new` from `position` on."""
        right = common_length(self._found, new)
        if right >= self._forced:  # how often forced tokens are right says nothing about the others
            self._acceptance.add(right - self._forced, int(right < min(len(self._found), len(new))))
        self._found = []
        self._drafts.correct(position, new)
