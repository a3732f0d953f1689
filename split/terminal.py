"""A text as it comes, on a terminal: each token once the characters it completes are whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import TextIO

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Writes tokens to `stream`."""

    def __init__(self, decode: Callable[[list[int]], str], stream: TextIO) -> None:
        self._decode, self._stream = decode, stream
        self._ids: list[int] = []
        """Tokens since the last place where characters were whole, and the one before it."""
        self._written = ""

    def add(self, token: int) -> None:
        """Write what `token` completes."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(INCOMPLETE):
            return
        self._write(text[len(self._written) :])
        # A tokenizer may treat the first token of a text apart: the last one stays as context for the next.
        self._ids = [token]
        self._written = self._decode(self._ids)

    def finish(self) -> None:
        """Write what is left, and end the line."""
        self._write(self._decode(self._ids)[len(self._written) :] + "\n")

    def _write(self, text: str) -> None:
        self._stream.write("".join(c if c.isprintable() or c in "\n\t" else "?" for c in text))
        self._stream.flush()
