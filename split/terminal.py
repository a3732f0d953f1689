"""A text as it comes, on a terminal: each token once the characters it completes are whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TextIO

from lab.running_text import RunningText


class TextStream:
    """Writes tokens to `stream`."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stream: TextIO, stops: Sequence[str] = ()) -> None:
        self.text, self._stream = RunningText(decode, stops), stream

    def add(self, token: int) -> None:
        """Write what `token` completes."""
        self._write(self.text.add(token))

    def finish(self) -> None:
        """Write what is left, and end the line."""
        self._write(self.text.finish() + "\n")

    def _write(self, text: str) -> None:
        self._stream.write("".join(c if c.isprintable() or c in "\n\t" else "?" for c in text))
        self._stream.flush()
