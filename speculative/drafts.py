"""Draft sources, and those that need no model.

A source holds its own copy of the text. It receives the verified text, proposes tokens to follow it, and counts these
as text, too, until `correct(position, ids)` reports a rejection. Going back costs nothing.
Knows nothing about networks or verifiers.
"""

import random
from collections.abc import Sequence
from typing import Protocol

from typing_extensions import override

from lab.engine.sampling import mix64


class Drafts(Protocol):
    """A source of draft tokens for one text."""

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """Start a new text."""
        return

    def propose(self, count: int) -> list[int]:
        """Draft up to `count` tokens after the text, and add them to it. Fewer if the source has no more."""

    def correct(self, position: int, ids: Sequence[int]) -> None:
        """Replace the text from `position` on by `ids`."""
        return

    def close(self) -> None:
        """Release everything that is held."""
        return


class NoDrafts(Drafts):
    """No draft tokens."""

    @override
    def propose(self, count: int) -> list[int]:
        return []


class NgramDrafts(Drafts):
    """Prompt lookup (Saxena, https://github.com/apoorvumang/prompt-lookup-decoding): repeats what followed last time.

    Takes the longest n-gram at the end of the text that occurred before, and proposes the tokens that followed it. An
    index keeps the positions of every n-gram; adding or removing a token costs the same at any length of the text.
    """

    def __init__(self, longest: int, shortest: int) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._text: list[int] = []
        self._positions: dict[tuple[int, ...], list[int]] = {}
        """Positions after each n-gram, in order."""

    @override
    def begin(self, prompt_ids: Sequence[int]) -> None:
        self._text, self._positions = [], {}
        self._append(prompt_ids)

    @override
    def propose(self, count: int) -> list[int]:
        drafted: list[int] = []
        while len(drafted) < count and (position := self._look_up()) is not None:
            found = self._text[position : position + count - len(drafted)]
            self._append(found)
            drafted += found
        return drafted

    @override
    def correct(self, position: int, ids: Sequence[int]) -> None:
        while len(self._text) > position:
            for gram in self._last_grams():
                self._positions[gram].pop()
            self._text.pop()
        self._append(ids)

    def _look_up(self) -> int | None:
        for gram in self._last_grams():
            positions = self._positions[gram]
            if len(positions) > 1:  # the last position is the end of the text itself
                return positions[-2]
        return None

    def _append(self, ids: Sequence[int]) -> None:
        for token in ids:
            self._text.append(token)
            for gram in self._last_grams():
                self._positions.setdefault(gram, []).append(len(self._text))

    def _last_grams(self) -> list[tuple[int, ...]]:
        return [tuple(self._text[-size:]) for size in self._sizes if size <= len(self._text)]


class RandomDrafts(Drafts):
    """Ids from a hash of seed and position: hardly ever right."""

    def __init__(self, seed: int, vocabulary_size: int) -> None:
        self._seed, self._vocabulary_size = mix64(seed), vocabulary_size
        self._length = 0

    @override
    def begin(self, prompt_ids: Sequence[int]) -> None:
        self._length = len(prompt_ids)

    @override
    def propose(self, count: int) -> list[int]:
        positions = range(self._length, self._length + count)
        self._length += count
        return [mix64(self._seed ^ position) % self._vocabulary_size for position in positions]

    @override
    def correct(self, position: int, ids: Sequence[int]) -> None:
        self._length = position + len(ids)


class RecordedDrafts(Drafts):
    """Tokens of a known text, each right with probability `agreement`, independently."""

    def __init__(self, ids: Sequence[int], agreement: float, seed: int, vocabulary_size: int) -> None:
        self._ids, self._agreement, self._vocabulary_size = list(ids), agreement, vocabulary_size
        self._generator = random.Random(seed)
        self._begin = self._length = 0

    @override
    def begin(self, prompt_ids: Sequence[int]) -> None:
        self._begin = self._length = len(prompt_ids)

    @override
    def propose(self, count: int) -> list[int]:
        known = self._ids[self._length - self._begin :][:count]
        self._length += len(known)
        return [self._draw(token) for token in known]

    @override
    def correct(self, position: int, ids: Sequence[int]) -> None:
        self._length = position + len(ids)

    def _draw(self, token: int) -> int:
        if self._generator.random() < self._agreement:
            return token
        return (token + self._generator.randrange(1, self._vocabulary_size)) % self._vocabulary_size
