"""A text during generation: characters once they are complete, and an end where a stop string occurs.

Where a stop string ends the text depends on its characters only, not on how tokens divide them or how many arrive
together: the first complete one counts, or the one that began first. A possible beginning of one is held back.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""The character that decoders put for bytes that are no character yet."""


class RunningText:
    """Tokens in, characters out.

    Args:
        decode: The text of some ids.
        stops: The text ends before the first of these; none: it never does.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self.stopped = False
        """Whether a stop string has ended the text; later characters are not part of it."""
        self._decode, self._stops = decode, list(stops)
        self._before: list[int] = []
        """The tokens of the last piece: a tokenizer may treat the first one of a text apart."""
        self._ids: list[int] = []
        """Tokens since then."""
        self._text = ""
        self._given = 0
        """Characters of it that were given out."""
        self._cut = 0
        """Characters that came and are not of the text."""
        self._ends = [0]
        """Where characters were whole: [n] is the length of the text of n tokens, or -1."""

    @property
    def text(self) -> str:
        """The whole text so far, without incomplete characters."""
        return self._text

    @property
    def whole_tokens(self) -> int:
        """Number of tokens that are in the text with all of their characters."""
        fitting = (count for count, end in enumerate(self._ends) if 0 <= end <= len(self._text))
        return max(fitting)

    def add(self, token: int) -> str:
        """Returns what can be shown now."""
        if self.stopped:
            return ""
        self._ids.append(token)
        piece = self._piece()
        if piece.endswith(INCOMPLETE):
            self._ends.append(-1)
            return ""
        if piece:
            self._before, self._ids = self._ids, []
        shown = self._grow(piece)
        self._ends.append(len(self._text) + self._cut)
        return shown

    def finish(self) -> str:
        """End the text; returns the characters that were not shown yet."""
        if self.stopped:
            return ""
        shown = self._grow(self._piece())
        rest = self._text[self._given :]
        self._given = len(self._text)
        return shown + rest

    def _piece(self) -> str:
        return self._decode([*self._before, *self._ids])[len(self._decode(self._before)) :]

    def _grow(self, piece: str) -> str:
        # No stop string that is not found yet begins before what was given out.
        self._text += piece
        found = [(at + len(stop), at) for stop in self._stops if (at := self._text.find(stop, self._given)) >= 0]
        if found:
            self.stopped = True
            end = min(found)[1]
            self._cut = len(self._text) - end
            self._text = self._text[:end]
        end = len(self._text) - (0 if self.stopped else self._held())
        shown = self._text[self._given : end]
        self._given = max(self._given, end)
        return shown

    def _held(self) -> int:
        """Number of characters at the end that may begin a stop string."""
        waiting = self._text[self._given :]
        for length in range(min(len(waiting), max(map(len, self._stops), default=1) - 1), 0, -1):
            end = waiting[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0


@dataclass(frozen=True)
class FinalText:
    """A generated text up to its end."""

    text: str
    ids: list[int]
    """The tokens that are in it with all of their characters."""
    stopped: bool
    """Whether a stop string ended it."""

    def ended_by(self, end_ids: Collection[int]) -> str:
        """`stop`, `end_token` or `length`: `ended_by` of the last line."""
        if self.stopped:
            return "stop"
        return "end_token" if self.ids and self.ids[-1] in end_ids else "length"


def final_text(decode: Callable[[Sequence[int]], str], ids: Sequence[int], stops: Sequence[str]) -> FinalText:
    """The text of all tokens, up to the stop string that ends it."""
    running = RunningText(decode, stops)
    for token in ids if stops else ():
        running.add(token)
    running.finish()
    if running.stopped:
        return FinalText(running.text, list(ids[: running.whole_tokens]), stopped=True)
    return FinalText(decode(ids), list(ids), stopped=False)
