"""Standard input, output and error as streams of UTF-8 that no locale changes and no reader ends by leaving.

What a stream cannot encode is escaped, line ends stay as they are, and what cannot be written any more is dropped.
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
"""Errors of a stream that nobody reads any more (EINVAL is Windows' word for a closed pipe)."""


_OPENED: list[TextIO] = []
"""All of this process: one that is forgotten would close what is below, which is not ours alone."""


class StreamLeft(Exception):
    """The reader of our standard output is gone."""


class Forgiving(io.TextIOWrapper):
    """A stream on its way out. After the first error nothing is written any more, and nothing is raised: print,
    logging, progress and the interpreter's own last flush need not know of it.

    What is below is the interpreter's own: a signal that is raised in the middle of a write writes nothing twice.
    """

    lost: OSError | None = None
    """Why nothing is written any more."""
    ends_line = True
    """Whether what comes next begins a line."""
    is_over = False
    """Whether all that is written from here on is dropped."""

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
    """Make standard output and error of this process streams of this module; closed ones swallow what is written.
    Returns standard output, before others wrap it."""
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
    buffer: Any = None
    if stream is None:
        buffer = io.BufferedWriter(io.FileIO({"stdout": 1, "stderr": 2}[name], "w", closefd=False))
    elif isinstance(stream, Forgiving):  # by a run before this one in the same process
        stream.is_over = False
    else:
        stream.flush()
        buffer = getattr(stream, "buffer", None)
    if not isinstance(buffer, io.BufferedWriter | io.FileIO):  # a stand-in
        assert stream is not None
        return stream
    if os.name == "posix":  # others at the other end of a pipe may have made it non-blocking
        os.set_blocking(buffer.fileno(), True)
    named = os.environ.get("PYTHONIOENCODING", "").partition(":")[0]  # somebody's own word for this very stream
    opened = Forgiving(
        buffer,  # of `python -u` the raw stream, which does as well
        encoding=named or "utf-8",
        errors="backslashreplace",
        newline="\n",  # never translated
        line_buffering=stream is None or bool(getattr(stream, "line_buffering", False)),
        write_through=isinstance(buffer, io.FileIO),
    )
    _OPENED.append(opened)
    return opened


def lost(stream: TextIO) -> OSError | None:
    """Why `stream` takes nothing any more; None while it does."""
    return stream.lost if isinstance(stream, Forgiving) else None


def is_left(stream: TextIO) -> bool:
    """Whether nobody reads `stream` any more: the other end of its pipe is closed."""
    error = lost(stream)
    return error is not None and error.errno in GONE


def print_last_line(text: str, stream: TextIO) -> None:
    """`text` on a line of its own, wherever the cursor was left, and nothing behind it."""
    begin = "\n" if isinstance(stream, Forgiving) and not stream.ends_line else ""
    print(begin + text, file=stream, flush=True)
    if isinstance(stream, Forgiving):
        stream.is_over = True


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
