"""The text as it is verified, on a terminal: what a drafter guessed right and what the target put, in two colours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TextIO

from lab.running_text import RunningText
from speculative.drafting import Round

ACCEPTED, CORRECTED, PLAIN = "\x1b[32m", "\x1b[33m", "\x1b[0m"


class TextStream:
    """Writes each token once the characters it completes are whole; plain text where `stream` is no terminal."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stream: TextIO, stops: Sequence[str] = ()) -> None:
        self.text = RunningText(decode, stops)
        self._stream = stream
        self._coloured = stream.isatty()

    def show(self, done: Round) -> None:
        """Write a round: accepted guesses in one colour, what the target put in the other."""
        for index, token in enumerate(done.tokens):
            self._write(self.text.add(token), ACCEPTED if index < done.accepted else CORRECTED)
        self._stream.flush()

    def finish(self) -> None:
        """Write what is left, and end the line."""
        self._write(self.text.finish(), CORRECTED)
        self._stream.write("\n")
        self._stream.flush()

    def _write(self, text: str, colour: str) -> None:
        if text:
            safe = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
            self._stream.write(f"{colour}{safe}{PLAIN}" if self._coloured else safe)
