"""A text during generation: complete characters, up to the first stop string.

Where a stop string ends the text depends on its characters only, not on how tokens divide them or how many arrive
together: the first complete one counts; of several, the one that began first. A possible beginning of one is held back.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""The character that decoders write for bytes of an incomplete character."""


class RunningText:
    """Tokens in, characters out.

    Args:
        decode: The text of some ids.
        stops: Stop strings; the text ends before the first of them.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self.stopped = False
        """Whether a stop string has ended the text; later characters are not part of it."""
        self._decode, self._stops = decode, list(stops)
        self._before: list[int] = []
        """The tokens of the last piece, decoded with the next: tokenizers treat the first token differently."""
        self._ids: list[int] = []
        """Tokens since then."""
        self._text = ""
        self._given = 0
        """Number of characters returned so far."""
        self._cut = 0
        """Number of characters from the stop string on, which are not part of the text."""
        self._ends = [0]
        """[n] is the length of the text of n tokens; -1 if its last character is incomplete."""

    @property
    def text(self) -> str:
        """The whole text so far, without incomplete characters."""
        return self._text

    @property
    def whole_tokens(self) -> int:
        """Number of tokens that are completely in the text."""
        fitting = (count for count, end in enumerate(self._ends) if 0 <= end <= len(self._text))
        return max(fitting)

    def add(self, token: int) -> str:
        """Add a token; return the characters that can be shown now."""
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
        # A stop string that is not found yet cannot begin before the characters that were returned.
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
    """The tokens that are completely in the text."""
    stopped: bool
    """Whether a stop string ended it."""

    def ended_by(self, end_ids: Collection[int]) -> str:
        """`stop`, `end_token` or `length`, for `ended_by` in the last line."""
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
