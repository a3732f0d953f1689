"""Who guesses: sources of guesses that hold their own copy of the text, and go back in it at no cost.

A source is told the text as far as it is verified, proposes what may come next, and holds its own guesses as text until
it is told otherwise: a rejection is `correct(position, ids)`. Knows nothing about networks or verifiers; those
here need no model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

from lab.engine.sampling import mix64


class Drafts(Protocol):
    """A source of guesses for one text."""

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """Take a new text."""
        ...

    def propose(self, count: int) -> list[int]:
        """Guess up to `count` tokens behind what is held; they are held now, too. Fewer when there is no guess."""
        ...

    def correct(self, position: int, ids: Sequence[int]) -> None:
        """From `position` on the text is `ids`: what was held there is forgotten."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class NoDrafts:
    """Nobody guesses."""

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """See `Drafts.begin`."""

    def propose(self, count: int) -> list[int]:
        """See `Drafts.propose`."""
        return []

    def correct(self, position: int, ids: Sequence[int]) -> None:
        """See `Drafts.correct`."""

    def close(self) -> None:
        """See `Drafts.close`."""


class NgramDrafts:
    """Prompt lookup (Saxena, https://github.com/apoorvumang/prompt-lookup-decoding): what followed the last time.

    The longest n-gram at the end of the text that stood in it before is looked up, and what followed it is the guess.
    An index of places is kept by n-gram; adding and taking back a token costs the same at any length of the text.
    """

    def __init__(self, longest: int, shortest: int) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._text: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}
        """Where what follows each n-gram stands, in order."""

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """See `Drafts.begin`."""
        self._text, self._places = [], {}
        self._append(prompt_ids)

    def propose(self, count: int) -> list[int]:
        """See `Drafts.propose`."""
        guesses: list[int] = []
        while len(guesses) < count and (place := self._look_up()) is not None:
            found = self._text[place : place + count - len(guesses)]
            self._append(found)
            guesses += found
        return guesses

    def correct(self, position: int, ids: Sequence[int]) -> None:
        """See `Drafts.correct`."""
        while len(self._text) > position:
            for gram in self._last_grams():
                self._places[gram].pop()
            self._text.pop()
        self._append(ids)

    def close(self) -> None:
        """See `Drafts.close`."""

    def _look_up(self) -> int | None:
        for gram in self._last_grams():
            places = self._places[gram]
            if len(places) > 1:  # the last one is the end of the text itself
                return places[-2]
        return None

    def _append(self, ids: Sequence[int]) -> None:
        for token in ids:
            self._text.append(token)
            for gram in self._last_grams():
                self._places.setdefault(gram, []).append(len(self._text))

    def _last_grams(self) -> list[tuple[int, ...]]:
        return [tuple(self._text[-size:]) for size in self._sizes if size <= len(self._text)]


class RandomDrafts:
    """Ids from a hash of seed and position: hardly ever right."""

    def __init__(self, seed: int, vocabulary_size: int) -> None:
        self._seed, self._vocabulary_size = mix64(seed), vocabulary_size
        self._length = 0

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """See `Drafts.begin`."""
        self._length = len(prompt_ids)

    def propose(self, count: int) -> list[int]:
        """See `Drafts.propose`."""
        places = range(self._length, self._length + count)
        self._length += count
        return [mix64(self._seed ^ place) % self._vocabulary_size for place in places]

    def correct(self, position: int, ids: Sequence[int]) -> None:
        """See `Drafts.correct`."""
        self._length = position + len(ids)

    def close(self) -> None:
        """See `Drafts.close`."""


class RecordedDrafts:
    """A text that is known beforehand; each guess is right with probability `agreement`, independently."""

    def __init__(self, ids: Sequence[int], agreement: float, seed: int, vocabulary_size: int) -> None:
        self._ids, self._agreement, self._vocabulary_size = list(ids), agreement, vocabulary_size
        self._generator = random.Random(seed)
        self._begin = self._length = 0

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """See `Drafts.begin`."""
        self._begin = self._length = len(prompt_ids)

    def propose(self, count: int) -> list[int]:
        """See `Drafts.propose`. None behind the end of what is known."""
        known = self._ids[self._length - self._begin :][:count]
        self._length += len(known)
        return [self._guess(token) for token in known]

    def correct(self, position: int, ids: Sequence[int]) -> None:
        """See `Drafts.correct`."""
        self._length = position + len(ids)

    def close(self) -> None:
        """See `Drafts.close`."""

    def _guess(self, token: int) -> int:
        if self._generator.random() < self._agreement:
            return token
        return (token + self._generator.randrange(1, self._vocabulary_size)) % self._vocabulary_size
