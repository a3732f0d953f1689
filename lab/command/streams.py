"""Standard input, output and error as UTF-8 streams, in any locale, that survive the loss of their reader.

Characters that a stream cannot encode are escaped, line ends stay as they are, and output without a reader is dropped.
"""

import errno
import io
import os
import sys
from typing import Any, TextIO

from typing_extensions import override

from lab.settings import UserError

BYTE_ORDER_MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"
GONE = frozenset({errno.EPIPE, errno.ESHUTDOWN, errno.ECONNRESET, errno.EBADF, errno.EINVAL})
"""Errors of a stream whose reader is gone (EINVAL is Windows' error for a closed pipe)."""


_OPENED: list[TextIO] = []
"""All streams of this process: a stream that is garbage-collected would close its buffer, which is not only ours."""


class StreamLeft(Exception):
    """The reader of our standard output is gone."""


class Forgiving(io.TextIOWrapper):
    """An output stream. After the first error it writes nothing more, and never raises: print, logging, progress and
    the interpreter's last flush need not know.

    Its buffer is the interpreter's own: a signal that interrupts a write does not make it write anything twice.
    """

    lost: OSError | None = None
    """The error after which nothing is written any more."""
    ends_line = True
    """Whether the next character begins a line."""
    is_over = False
    """Whether all further output is dropped."""

    @override
    def write(self, text: str, /) -> int:
        if text and self.lost is None and not self.is_over:
            self.ends_line = text.endswith("\n")
            try:
                super().write(text)
            except OSError as error:
                self.lost = error
        return len(text)

    @override
    def flush(self) -> None:
        if self.lost is None:
            try:
                super().flush()
            except OSError as error:
                self.lost = error


def open_streams() -> TextIO:
    """Make standard output and error of this process streams of this module; closed ones drop what is written. Returns
    standard output as it was before other code wraps it."""
    _fill_closed()
    sys.stdout, sys.stderr = _opened(sys.stdout, "stdout"), _opened(sys.stderr, "stderr")
    return sys.stdout


def _fill_closed() -> None:
    """Open closed descriptors (`>&-`) as os.devnull, before one of our files or sockets gets their number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number: this one
            if number == 0:
                sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 (lives as long as the process)


def _opened(stream: TextIO | None, name: str) -> TextIO:
    buffer: Any = None
    if stream is None:
        buffer = io.BufferedWriter(io.FileIO({"stdout": 1, "stderr": 2}[name], "w", closefd=False))
    elif isinstance(stream, Forgiving):  # from an earlier run in the same process
        stream.is_over = False
    else:
        stream.flush()
        buffer = getattr(stream, "buffer", None)
    if not isinstance(buffer, io.BufferedWriter | io.FileIO):  # a replacement
        assert stream is not None
        return stream
    if os.name == "posix":  # another process may have made the pipe non-blocking
        os.set_blocking(buffer.fileno(), True)
    named = os.environ.get("PYTHONIOENCODING", "").partition(":")[0]  # set by the user for these streams
    opened = Forgiving(
        buffer,  # under `python -u` the raw stream, which works too
        encoding=named or "utf-8",
        errors="backslashreplace",
        newline="\n",  # never translated
        line_buffering=stream is None or bool(getattr(stream, "line_buffering", False)),
        write_through=isinstance(buffer, io.FileIO),
    )
    _OPENED.append(opened)
    return opened


def lost(stream: TextIO) -> OSError | None:
    """The reason why `stream` no longer writes; None while it does."""
    return stream.lost if isinstance(stream, Forgiving) else None


def is_left(stream: TextIO) -> bool:
    """Whether the reader of `stream` is gone: the other end of its pipe is closed."""
    error = lost(stream)
    return error is not None and error.errno in GONE


def print_last_line(text: str, stream: TextIO) -> None:
    """Print `text` on a new line, wherever the cursor is, with nothing after it."""
    begin = "\n" if isinstance(stream, Forgiving) and not stream.ends_line else ""
    print(begin + text, file=stream, flush=True)
    if isinstance(stream, Forgiving):
        stream.is_over = True


def read_stdin() -> str:
    """All of standard input as text. UserError if it is not UTF-8."""
    try:
        return as_text(sys.stdin.buffer.read())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt must be readable UTF-8 text, got '-' ({error})") from None


def as_text(data: bytes) -> str:
    """UTF-8 without its byte order mark; line ends stay. UnicodeDecodeError for other bytes."""
    return data.decode("utf-8").removeprefix(BYTE_ORDER_MARK)


def in_utf8_mode() -> None:
    """Start this process again in Python's UTF-8 mode (PEP 540) if the locale has another encoding for file names,
    arguments and pipes. Does not return then."""
    if os.name == "posix" and sys.getfilesystemencoding() != "utf-8" and not sys.flags.utf8_mode:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def check_arguments(arguments: list[str]) -> None:
    """UserError for an argument that is not UTF-8."""
    for argument in arguments:
        if not is_text(argument):
            raise UserError(f"arguments must be UTF-8 text, got {argument!a}")


def is_text(text: str) -> bool:
    """Whether a text can be encoded: it has no lone surrogates, which Python makes of bytes that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
