"""The end of a command: by itself, by a signal or by an exception; exit codes, and `ended_by` in the last line.

In the main thread a signal raises an exception (`Stopped`), or calls a function where one was registered
(`calling_on_signal`); a coroutine is cancelled (`run_async`). A later signal ends the process at once. So does a run
that takes too long to end after a signal; its last line then holds the figures so far.
"""

import _thread
import asyncio
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, Self, TypeVar

import psutil

from lab.command.starts import start_of
from lab.command.streams import StreamLeft
from lab.faults import EndedBy, Fault
from lab.settings import UserError

Returned = TypeVar("Returned")

SAME_SECONDS = 0.5
"""Signals within this time of the first count as the same one: `timeout`, or a signal to a group, may arrive twice."""
UNWIND_SECONDS = 7.0
"""Seconds between a signal and the forced end; containers kill after ten."""
AGAIN_SECONDS = 0.05
"""After this time a signal whose exception was lost in a finalizer, or put off, is sent again."""
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG} if hasattr(errno, "EDQUOT") else {errno.ENOSPC})


class Stopped(KeyboardInterrupt):
    """A signal that ends this process."""

    def __init__(self, number: int) -> None:
        super().__init__(EndedBy.interrupted.value if number == signal.SIGINT else EndedBy.terminated.value)
        self.number = number

    @property
    def ended_by(self) -> EndedBy:
        """Value of `ended_by` in the last line for this signal."""
        return EndedBy(str(self))


@dataclass(frozen=True)
class End:
    """Exit code, reason and message of a command that an exception ends."""

    code: int
    by: EndedBy
    line: str
    """Line for stderr; empty: none."""
    fault: BaseException | None = None
    """An unexpected exception, printed with its traceback."""


def end_of(error: BaseException) -> End:
    """The end of a run that raised `error`."""
    end = _end_of(error)
    if (end.fault is not None or isinstance(error, UserError)) and (stopped := signal_among(error)) is not None:
        return _end_of(stopped)
    return end


def signal_among(error: BaseException | None) -> Stopped | None:
    """The signal among an error and its causes: what it hit, a library say, may have made another exception of it."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__cause__ or error.__context__
    return error


def _end_of(error: BaseException) -> End:
    if isinstance(error, Stopped):
        return End(128 + error.number, error.ended_by, str(error))
    if isinstance(error, KeyboardInterrupt):
        return End(130, EndedBy.interrupted, "interrupted")
    if isinstance(error, Fault):
        return End(error.exit_code, EndedBy.refused if error.exit_code == 2 else error.ended_by, str(error))
    if isinstance(error, UserError):
        return End(2, EndedBy.refused, str(error))
    if isinstance(error, StreamLeft):
        return End(141, EndedBy.closed, "")  # like a process that SIGPIPE ended
    if full := disk_full(error):
        return End(1, EndedBy.disk_full, f"the disk is full: {full}")
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
        return End(code, EndedBy.failed, error.code if isinstance(error.code, str) else "")
    return End(1, EndedBy.failed, f"{type(error).__name__}: {error}", fault=error)


def disk_full(error: BaseException | None) -> str:
    """Text of the error that reports a full disk, among `error` and its causes; empty if there is none."""
    while error is not None:
        is_full = isinstance(error, OSError) and error.errno in DISK_FULL
        if is_full or os.strerror(errno.ENOSPC) in str(error):  # libraries wrap it in their own errors
            return str(error)
        error = error.__cause__ or error.__context__
    return ""


class Signals:
    """Handles the signals that end this process, within a block of the main thread.

    `forced` is called from another thread if the block has not ended in time after a signal; it ends the process.
    """

    def __init__(self, forced: Callable[[int], None]) -> None:
        self._forced = forced
        self.number: int | None = None
        """The signal that was received."""
        self.tell: Callable[[], object] | None = None
        """Called instead of raising."""
        self.grace_seconds = 0.0
        """Seconds that a role may take, besides `UNWIND_SECONDS`, to finish what it does for others."""
        self._heard_at = 0.0
        self._is_lost = False
        """Whether its exception was lost in a finalizer, or put off."""
        self._before: dict[int, Any] = {}
        self._heard, self._over = threading.Event(), threading.Event()

    def __enter__(self) -> Self:
        global _current
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
                number = getattr(signal, name, None)
                # Ignored by the process that started us (nohup, a shell's background job): stays ignored.
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._hear)
            self._hook_before, sys.unraisablehook = sys.unraisablehook, self._note_lost
            # Started now, since a thread cannot be started safely in a signal handler.
            threading.Thread(target=self._watch, name="signals", daemon=True).start()
        _current = self
        return self

    def __exit__(self, *exception: object) -> None:
        global _current
        _current = None
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if sys.unraisablehook == self._note_lost:
            sys.unraisablehook = self._hook_before
        self._over.set()
        self._heard.set()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and not self._is_lost:
            if time.monotonic() - self._heard_at > SAME_SECONDS:
                os._exit(128 + number)
            return
        if self.number is None:
            self.number, self._heard_at = number, time.monotonic()
        self._is_lost = False
        self._heard.set()
        if self.tell is not None:
            self.tell()
        elif _imports_torch(frame):
            self._is_lost = True
        else:
            raise Stopped(self.number)

    def _note_lost(self, unraisable: Any) -> None:
        """Python cannot raise out of a finalizer or a callback of its collector: it calls this hook, and goes on."""
        if isinstance(unraisable.exc_value, Stopped):
            self._is_lost = True
        else:
            self._hook_before(unraisable)

    def _watch(self) -> None:
        self._heard.wait()
        began = time.monotonic()
        while not self._over.wait(AGAIN_SECONDS):
            assert self.number is not None
            if time.monotonic() - began > UNWIND_SECONDS + self.grace_seconds:
                self._forced(self.number)
            elif self._is_lost:
                _send_to_main_thread(self.number)


def _imports_torch(frame: FrameType | None) -> bool:
    """Whether a module of torch is being imported. Its C++ code calls Python where it can take no exception: one that
    a signal raised there would abort the process, without a last line."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__", "").partition(".")[0] == "torch":
            return True
        frame = frame.f_back
    return False


def _send_to_main_thread(number: int) -> None:
    if hasattr(signal, "pthread_kill"):  # interrupts what it waits for
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, number)
    else:
        _thread.interrupt_main(signal.Signals(number))


_current: Signals | None = None


def is_ending() -> bool:
    """Whether a signal that ends this process has been received."""
    return _current is not None and _current.number is not None


def allow_grace(seconds: float) -> None:
    """Let the run take so many seconds more to end after a signal."""
    if _current is not None:
        _current.grace_seconds = seconds


@contextmanager
def calling_on_signal(call: Callable[[], object]) -> Iterator[None]:
    """Within the block a signal calls `call`, which must neither wait nor raise. Stopped is raised at the end of the
    block, even if the block raised something else."""
    signals = _current
    if signals is None or signals.number is not None:
        yield
        return
    before, signals.tell = signals.tell, call
    try:
        yield
    finally:
        signals.tell = before
        if signals.number is not None:
            raise Stopped(signals.number)


def run_async(work: Coroutine[Any, Any, Returned]) -> Returned:
    """Run `work` in a new event loop. A signal cancels it, and is raised once it has ended."""
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        task = loop.create_task(work)
        with calling_on_signal(partial(loop.call_soon_threadsafe, task.cancel)):
            return loop.run_until_complete(task)


CLOCK_TICK = 20
"""Resolution of the start times of processes, in milliseconds."""


def end_children(since: int) -> None:
    """Kill all processes that this one has started since then (`lab.command.starts.now`), and their descendants.

    Older children are not ours: they belong to a program that runs a command as a part of itself.
    """
    try:
        children = psutil.Process().children(recursive=True)
    except psutil.Error:
        return
    ended = []
    for child in children:
        try:
            if start_of(child) >= since - CLOCK_TICK:
                child.kill()
                ended.append(child)
        except psutil.Error:  # already gone
            continue
    psutil.wait_procs(ended, timeout=1)


def leave_at_once(code: int) -> None:
    """End the process without waiting for its threads."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
