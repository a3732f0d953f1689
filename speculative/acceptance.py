"""Rules of acceptance, and the hash that tells both sides whether they hold the same text."""

from collections.abc import Sequence

from lab.engine.sampling import mix64


def prefix_hash(ids: Sequence[int], before: int = 0) -> int:
    """A 64-bit hash over the ids of a text, in order; `before` is the hash of the ids in front of them."""
    for token in ids:
        before = mix64(before ^ token)
    return before


def common_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common prefix."""
    for count, (a, b) in enumerate(zip(left, right)):
        if a != b:
            return count
    return min(len(left), len(right))


def accepted_length(
    draft_ids: Sequence[int], chosen: Sequence[int], nll: Sequence[float], threshold: float | None
) -> int:
    """Number of draft tokens that are accepted: the longest prefix that equals the target's choices.

    With a `threshold`, draft tokens whose cross-entropy `nll` under the target is at most that are accepted, too; then
    the text is no longer the target's own.
    """
    for count, (token, choice, cost) in enumerate(zip(draft_ids, chosen, nll)):
        if token != choice and (threshold is None or not cost <= threshold):
            return count
    return len(draft_ids)


def until_end(ids: Sequence[int], end_ids: frozenset[int]) -> list[int]:
    """The ids up to and including the first end token."""
    for index, token in enumerate(ids):
        if token in end_ids:
            return list(ids[: index + 1])
    return list(ids)
