"""Draft sources, and those that need no model.

A source holds its own copy of the text. It receives the verified text, proposes tokens to follow it, and counts these
as text, too, until `correct(position, ids)` reports a rejection. Going back costs nothing.
Knows nothing about networks or verifiers.
"""

import contextlib
import random
from collections.abc import Sequence
from typing import Protocol

from typing_extensions import override

from lab.engine.sampling import mix64
from lab.text.grammars import GrammarFailed, Grammars, GrammarText
from lab.text.logit_rules import LogitRules


class Drafts(Protocol):
    """A source of draft tokens for one text."""

    forced: int = 0
    """Number of tokens at the beginning of the last proposal that a schema forces."""

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


class SchemaDrafts(Drafts):
    """The tokens that a schema forces; where it leaves a choice, those of another source that it allows.

    Forced tokens cost no pass of a draft model, and are right wherever the target writes the same bytes with the same
    tokens. A text that its grammar cannot follow any further has no more draft tokens: the target reports the reason.
    """

    def __init__(self, grammar: GrammarText, prompt_tokens: int, others: Drafts) -> None:
        """`grammar` is an empty text; it begins after `prompt_tokens`, as in the request's logit rules."""
        self._grammar, self._prompt_tokens, self._others = grammar, prompt_tokens, others
        self._length = 0

    @override
    def begin(self, prompt_ids: Sequence[int]) -> None:
        self._others.begin(prompt_ids)
        self._continue(0, prompt_ids)

    @override
    def propose(self, count: int) -> list[int]:
        drafted: list[int] = []
        self.forced = 0
        with contextlib.suppress(GrammarFailed):
            while len(drafted) < count and not self._grammar.is_over:
                new = self._grammar.forced()[: count - len(drafted)]
                if new:
                    self._others.correct(self._length, new)
                    self.forced += len(new) if self.forced == len(drafted) else 0
                else:
                    new = self._others.propose(1)
                    if not new:
                        break
                    if not self._grammar.allows(new[0]):
                        self._others.correct(self._length, [])
                        break
                drafted += new
                self._continue(self._length, new)
        return drafted

    @override
    def correct(self, position: int, ids: Sequence[int]) -> None:
        self._others.correct(position, ids)
        self._continue(position, ids)

    @override
    def close(self) -> None:
        self._others.close()

    def _continue(self, position: int, ids: Sequence[int]) -> None:
        self._length = position + len(ids)
        with contextlib.suppress(GrammarFailed):
            self._grammar.go_back(max(0, position - self._prompt_tokens))
            self._grammar.go_on(ids[max(0, self._prompt_tokens - position) :])


def with_schema(drafts: Drafts, rules: LogitRules | None, grammars: Grammars | None) -> Drafts:
    """The source, after the tokens that the schema of these rules forces, if they have one."""
    if rules is None or not rules.schema or grammars is None:
        return drafts
    return SchemaDrafts(grammars.begin(rules.schema), rules.prompt_tokens, drafts)
