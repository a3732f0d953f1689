"""The text as it is verified, on a terminal: what a drafter guessed right and what the target put, in two colours."""

from __future__ import annotations

from collections.abc import Callable
from typing import TextIO

from speculative.drafting import Round

ACCEPTED, CORRECTED, PLAIN = "\x1b[32m", "\x1b[33m", "\x1b[0m"
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Writes each token once the characters it completes are whole; plain text where `stream` is no terminal."""

    def __init__(self, decode: Callable[[list[int]], str], stream: TextIO) -> None:
        self._decode = decode
        self._stream = stream
        self._coloured = stream.isatty()
        self._ids: list[int] = []
        """Tokens since the last place where characters were whole, and the one before it."""
        self._written = ""
        """What of their text stands on the terminal."""

    def show(self, done: Round) -> None:
        """Write a round: accepted guesses in one colour, what the target put in the other."""
        for index, token in enumerate(done.tokens):
            self._add(token, ACCEPTED if index < done.accepted else CORRECTED)
        self._stream.flush()

    def finish(self) -> None:
        """Write what is left, and end the line."""
        self._write(self._decode(self._ids)[len(self._written) :], CORRECTED)
        self._stream.write("\n")
        self._stream.flush()

    def _add(self, token: int, colour: str) -> None:
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(INCOMPLETE):
            return
        self._write(text[len(self._written) :], colour)
        # A tokenizer may treat the first token of a text apart: the last one stays as context for the next.
        self._ids = [token]
        self._written = self._decode(self._ids)

    def _write(self, text: str, colour: str) -> None:
        if text:
            safe = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
            self._stream.write(f"{colour}{safe}{PLAIN}" if self._coloured else safe)
