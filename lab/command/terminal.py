"""Generated text on standard output, token by token. On a terminal in colours, without any control characters; in a
file or pipe exactly the text.
"""

import os
import re
import shutil
from collections.abc import Callable, Sequence
from typing import TextIO

from lab.command.streams import StreamLeft, is_left
from lab.text.running_text import RunningText

PLAIN = "\x1b[0m"
# C0 and C1 without line feed and tab, and the two characters that change the reading direction.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202d\u202e]")
NARROW = 60
"""With fewer columns, a log with times and levels, or a progress bar, leaves no room for its message."""


class TextStream:
    """Writes each token as soon as all of its characters are complete.

    Raises:
        StreamLeft: from `add`, when the other end of the stream is closed.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stream: TextIO, stops: Sequence[str] = ()) -> None:
        self.text = RunningText(decode, stops)
        self._stream = stream
        self._is_terminal, self._coloured = stream.isatty(), takes_colours(stream)

    def add(self, tokens: Sequence[int], colour: str = "") -> None:
        """Write the characters that `tokens` complete."""
        for token in tokens:
            self._write(self.text.add(token), colour)
        self._stream.flush()
        if is_left(self._stream):
            raise StreamLeft

    def finish(self, colour: str = "") -> None:
        """Write the rest, and end the line."""
        self._write(self.text.finish(), colour)
        self._stream.write("\n")
        self._stream.flush()

    def _write(self, text: str, colour: str) -> None:
        if not text:
            return
        if self._is_terminal:
            text = masked(text)
        self._stream.write(f"{colour}{text}{PLAIN}" if self._coloured and colour else text)


def masked(text: str) -> str:
    """`text` for a terminal, with `?` for control characters; a carriage return starts a new line."""
    return CONTROL.sub("?", text.replace("\r\n", "\n").replace("\r", "\n"))


def one_line(text: str) -> str:
    """`text` without line ends and control characters, for a message."""
    return CONTROL.sub("?", " ".join(text.split("\n")))


def takes_colours(stream: TextIO) -> bool:
    """Whether `stream` is a terminal, and colours are not switched off (no-color.org, TERM=dumb)."""
    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    return stream.isatty() and not dumb and not os.environ.get("NO_COLOR")


def has_room(stream: TextIO) -> bool:
    """Whether `stream` is a terminal for columns and bars: it shows colours and is wide enough."""
    return takes_colours(stream) and shutil.get_terminal_size().columns >= NARROW
