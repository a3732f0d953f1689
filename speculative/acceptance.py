"""Which draft tokens are accepted, and the hash by which both sides know that they hold the same text."""

from __future__ import annotations

from collections.abc import Sequence

from lab.engine.sampling import mix64


def prefix_hash(ids: Sequence[int], before: int = 0) -> int:
    """64 bits over all ids of a text, in order; `before` is the hash of those that stand before them."""
    for token in ids:
        before = mix64(before ^ token)
    return before


def common_length(left: Sequence[int], right: Sequence[int]) -> int:
    """How many ids at the beginning are the same."""
    for count, (a, b) in enumerate(zip(left, right)):
        if a != b:
            return count
    return min(len(left), len(right))


def accepted_length(
    guesses: Sequence[int], chosen: Sequence[int], nll: Sequence[float], threshold: float | None
) -> int:
    """How many of the guesses are accepted: the longest prefix that equals what the target chose.

    With a threshold also guesses that cost at most so much under the target are let through: then the text is no longer
    the target's.
    """
    for count, (guess, choice, cost) in enumerate(zip(guesses, chosen, nll)):
        if guess != choice and (threshold is None or not cost <= threshold):
            return count
    return len(guesses)


def until_end(ids: Sequence[int], end_ids: frozenset[int]) -> list[int]:
    """The ids up to the first that ends a text, that one included."""
    for index, token in enumerate(ids):
        if token in end_ids:
            return list(ids[: index + 1])
    return list(ids)
