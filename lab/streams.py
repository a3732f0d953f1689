"""Standard input, output and error as streams of UTF-8 that no locale changes and no reader ends by leaving.

What a stream cannot encode is escaped, line ends stay as they are, and what cannot be written any more is dropped.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import Any, TextIO

from lab.settings import UserError

BYTE_ORDER_MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"
GONE = frozenset({errno.EPIPE, errno.ESHUTDOWN, errno.ECONNRESET, errno.EBADF, errno.EINVAL})
"""Errors of a stream that nobody reads any more (EINVAL is Windows' word for a closed pipe)."""


class StreamLeft(Exception):
    """Nobody reads any more what this process was to write."""


class Forgiving(io.RawIOBase):
    """A stream's bytes on their way out. After the first error nothing is written any more, and nothing is raised:
    print, logging, progress and the interpreter's own last flush need not know of it."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self.lost: OSError | None = None
        """Why nothing is written any more."""
        self.last = b"\n"
        """The last byte that was written."""
        self.is_over = False
        """What is written from here on is dropped."""

    def write(self, data: Any, /) -> int:
        """As of any raw stream, but all of it is taken."""
        left = memoryview(data).cast("B")
        size = len(left)
        while left and self.lost is None and not self.is_over:
            try:
                count = self._raw.write(left)
            except OSError as error:
                self.lost = error
                break
            if count is None:  # somebody at the other end has made it non-blocking, and it is full
                select.select([], [self._raw.fileno()], [])
            elif count:
                self.last, left = bytes(left[count - 1 : count]), left[count:]
        return size

    def writable(self) -> bool:
        """Always."""
        return True

    def fileno(self) -> int:
        """Of the stream behind."""
        return self._raw.fileno()

    def isatty(self) -> bool:
        """Of the stream behind."""
        return self._raw.isatty()


def open_streams() -> TextIO:
    """Make standard output and error of this process what the module says; closed ones swallow what is written.
    Returns standard output, which others may put something in front of."""
    _fill_closed()
    sys.stdout, sys.stderr = _opened(sys.stdout, "stdout"), _opened(sys.stderr, "stderr")
    return sys.stdout


def _fill_closed() -> None:
    """Closed descriptors (`>&-`) lead nowhere, before a file or socket of ours gets the number of one."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
            if number == 0:
                sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 (lives as long as the process)


def _opened(stream: TextIO | None, name: str) -> TextIO:
    raw: Any
    if stream is None:
        raw = io.FileIO({"stdout": 1, "stderr": 2}[name], "w", closefd=False)
    else:
        stream.flush()
        raw = _raw(stream)
        if isinstance(raw, Forgiving):  # by a run before this one in the same process
            raw.is_over = False
        if not isinstance(raw, io.RawIOBase) or isinstance(raw, Forgiving):
            return stream
    named = os.environ.get("PYTHONIOENCODING", "").partition(":")[0]  # somebody's own word for this very stream
    at_once = stream is not None and raw is getattr(stream, "buffer", None)  # python -u
    return io.TextIOWrapper(
        Forgiving(raw) if at_once else io.BufferedWriter(Forgiving(raw)),  # type: ignore[type-var] # as io has it
        write_through=at_once,
        encoding=named or "utf-8",
        errors="backslashreplace",
        newline="\n",  # never translated
        line_buffering=stream is None or bool(getattr(stream, "line_buffering", False)),
    )


def _raw(stream: TextIO) -> Any:
    """What is below the encoding and the buffer; without one, `python -u`."""
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def lost(stream: TextIO) -> OSError | None:
    """Why `stream` takes nothing any more; None while it does."""
    raw = _raw(stream)
    return raw.lost if isinstance(raw, Forgiving) else None


def is_left(stream: TextIO) -> bool:
    """Whether nobody reads `stream` any more: the other end of its pipe is closed."""
    error = lost(stream)
    return error is not None and error.errno in GONE


def print_last_line(text: str, stream: TextIO) -> None:
    """`text` on a line of its own, wherever the cursor was left, and nothing behind it."""
    stream.flush()
    raw = _raw(stream)
    begin = "\n" if isinstance(raw, Forgiving) and raw.last != b"\n" else ""
    print(begin + text, file=stream, flush=True)
    if isinstance(raw, Forgiving):
        raw.is_over = True


def read_stdin() -> str:
    """All of standard input as text. UserError when it is not UTF-8."""
    try:
        return as_text(sys.stdin.buffer.read())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt must be readable UTF-8 text, got '-' ({error})") from None


def as_text(data: bytes) -> str:
    """UTF-8 without its byte order mark; line ends stay. UnicodeDecodeError when it is something else."""
    return data.decode("utf-8").removeprefix(BYTE_ORDER_MARK)


def in_utf8_mode() -> None:
    """Begin this process again in Python's UTF-8 mode (PEP 540) where the locale has names of files, arguments and
    pipes in another encoding. Does not return then."""
    if os.name == "posix" and sys.getfilesystemencoding() != "utf-8" and not sys.flags.utf8_mode:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def check_arguments(arguments: list[str]) -> None:
    """UserError for an argument that is not UTF-8."""
    for argument in arguments:
        if not is_text(argument):
            raise UserError(f"arguments must be UTF-8 text, got {argument!a}")


def is_text(text: str) -> bool:
    """Whether UTF-8 has it: no lone surrogates, which Python makes of bytes that are none."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
