"""One text on its way to a client: tokens in, pieces of text out, each at a position that a broken stream returns to.

A piece depends on the tokens before it only, not on how many arrived together: so the pieces after a position are the
same when the text is told again from its journal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lab.text.running_text import RunningText
from serve.models.tokens import ModelTexts
from serve.models.writer import NewTokens, Top


@dataclass(frozen=True)
class TokenReport:
    """One token with its log probability."""

    id: int
    nll: float
    top: Top


@dataclass(frozen=True)
class Piece:
    """Characters of a text that can be shown."""

    position: int
    """Number of tokens that the text had then; one more for what is shown only when it ends."""
    text: str
    tokens: Sequence[TokenReport] = ()
    """Tokens of these characters, where log probabilities are asked for."""
    is_guess: bool = False
    """Whether its last token was a draft token that the target accepted."""


class Choice:
    """One text.

    Args:
        texts: The tokenizer.
        stops: Stop strings.
        most: Most new tokens.
        has_reports: Whether pieces have log probabilities.
    """

    def __init__(self, texts: ModelTexts, stops: Sequence[str], most: int, *, has_reports: bool) -> None:
        self._ends = texts.end_ids
        self._running = RunningText(texts.decode, stops)
        self._most, self._has_reports = most, has_reports
        self._unsaid: list[TokenReport] = []
        self._said = 0
        """Number of tokens whose reports were given."""
        self.ids: list[int] = []
        self.guesses = 0
        """Draft tokens among them."""
        self.finish: str | None = "length" if most == 0 else None
        """`stop` or `length` once the text is complete."""

    @property
    def position(self) -> int:
        """Number of new tokens."""
        return len(self.ids)

    @property
    def text(self) -> str:
        """The text so far."""
        return self._running.text

    def add(self, new: NewTokens) -> list[Piece]:
        """Continue the text; tokens after its end are dropped. Returns the pieces that can be shown now."""
        found: list[Piece] = []
        for place, token in enumerate(new.ids):
            if self.finish is not None:
                break
            self.ids.append(token)
            self.guesses += place < new.guesses
            if token in self._ends:
                self.finish = "stop"
                break
            nll = new.nll[place] if place < len(new.nll) else math.nan
            self._unsaid.append(TokenReport(token, nll, new.top[place] if place < len(new.top) else ()))
            shown = self._running.add(token)
            if self._running.stopped:
                self.finish = "stop"
            elif len(self.ids) >= self._most:
                self.finish = "length"
            if shown:
                found.append(Piece(self.position, shown, self._reports(), place < new.guesses))
        if self.finish is not None:
            shown = self._running.finish()
            reports = self._reports()
            if shown or reports:
                found.append(Piece(self.position + 1, shown, reports))
        return found

    def _reports(self) -> Sequence[TokenReport]:
        """Reports that were not given yet, of tokens that are part of the text."""
        if not self._has_reports:
            self._unsaid = []
            return ()
        unsaid, self._unsaid = self._unsaid, []
        if self._running.stopped:
            unsaid = unsaid[: max(0, self._running.whole_tokens - self._said)]
        self._said += len(unsaid)
        return unsaid
