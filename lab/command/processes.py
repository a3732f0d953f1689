"""Commands of the lab as separate processes: how to start one, read its first line, and its last."""

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from lab.command.overrides import override
from lab.faults import Fault
from lab.settings import UserError

LOG = "stderr.log"
"""File in a role's run folder that holds its stderr."""
SAY_SECONDS = 10.0
"""Seconds after which it is said again what a command waits for."""


class NotReady(Fault):
    """A role did not announce that it serves: it ended first (`ended`), or took too long."""

    def __init__(self, why: str, *, ended: bool) -> None:
        super().__init__(why)
        self.ended = ended


def start(
    module: str,
    overrides: Sequence[str],
    folder: Path | None,
    *,
    log: bool = True,
    follows_stdin: bool = False,
    own_session: bool = False,
) -> subprocess.Popen[str]:
    """`python -m module overrides`, with its standard output for us to read.

    Args:
        module: A command of ours.
        overrides: Overrides, such as `lab.command.overrides.override` makes.
        folder: Its run folder; None for a module that keeps no files.
        log: Its stderr goes to a file there; else to our own stderr.
        follows_stdin: It ends when we close its standard input, or end; else it has no standard input.
        own_session: Ctrl+C in our terminal does not reach it.
    """
    command = [sys.executable, "-m", module, *overrides]
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        command.append(override("hydra.run.dir", folder))
    stderr = (folder / LOG).open("ab") if folder is not None and log else None
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE if follows_stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            encoding="utf-8",
            start_new_session=own_session,
        )
    finally:
        if stderr is not None:
            stderr.close()


def own_overrides(but: tuple[str, ...] = ()) -> list[str]:
    """The overrides of our own command line, for a process that needs them too, without those that begin with one of
    `but`; `--config-dir` is among them."""
    own = HydraConfig.get()
    folders = [source.path for source in own.runtime.config_sources if source.provider == "command-line"]
    overrides = [word for word in own.overrides.task if not word.startswith(but)]
    return [*(f"--config-dir={folder}" for folder in folders), *overrides]


def say_ready(status: str, role: str, host: str, port: int, **about: Any) -> None:
    """Print, when a role is ready, one line of JSON on stdout for `first_line`."""
    print(json.dumps({"status": status, "role": role, "host": host, "port": port, **about}), flush=True)


def say_listening(role: str, host: str, port: int, hint: str, **about: Any) -> None:
    """Say that a role listens, and print on stderr what to type next."""
    say_ready("listening", role, host, port, **about)
    print(hint, file=sys.stderr, flush=True)


def first_line(
    process: subprocess.Popen[str], seconds: float, waiting: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """The line of JSON that a role prints when it is ready. NotReady when it ends first, or takes longer.

    `waiting` is called every `SAY_SECONDS` until then.
    """
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    out = process.stdout
    assert out is not None
    threading.Thread(target=lambda: lines.put(out.readline()), daemon=True).start()
    deadline, line = time.monotonic() + max(0.1, seconds), None
    while line is None:
        try:
            line = lines.get(timeout=max(0.0, min(SAY_SECONDS, deadline - time.monotonic())))
        except queue.Empty:
            if time.monotonic() >= deadline:
                raise NotReady(f"it was not ready within {seconds:g} s", ended=False) from None
            waiting()
    if not line:
        raise NotReady("it ended before it was ready", ended=True)
    ready: dict[str, Any] = json.loads(line)
    if "ended_by" in ready:  # its last line already: a fault, or a signal, before it was ready
        raise NotReady("it ended before it was ready", ended=True)
    return ready


def last_line(folder: Path) -> str:
    """The last line of a role's log, for the message that it did not start."""
    return last_said(folder) or f"it wrote nothing to {folder / LOG} (is the disk full?)"


def last_said(folder: Path) -> str:
    """The last line of a role's log so far; empty if there is none."""
    said = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return said[-1] if said else ""


@contextmanager
def listening(module: str, overrides: Sequence[str], folder: Path, start_seconds: float) -> Iterator[int]:
    """Run a role until the end of the block; yields the port that it listens on.

    Raises:
        UserError: it refuses its overrides, for the reason that it gives.
        NotReady: it does not listen within `start_seconds`.
    """
    process = start(module, overrides, folder)
    try:
        yield int(first_line(process, start_seconds)["port"])
    except NotReady as error:
        if error.ended and process.wait(start_seconds) == 2:
            raise UserError(f"{module} did not start: {last_line(folder).removeprefix('error: ')}") from None
        raise NotReady(f"{module}: {error} ({folder / LOG} says why)", ended=error.ended) from None
    finally:
        process.kill()
        process.communicate()


def run_to_end(
    module: str, overrides: Sequence[str], folder: Path | None, timeout_seconds: float
) -> tuple[list[str], dict[str, Any]]:
    """Run a command to its end, with its progress on our stderr. Returns the lines of its standard output, and the
    figures of the last one.

    Raises:
        CalledProcessError, TimeoutExpired: as from `subprocess.run`.
    """
    with start(module, overrides, folder, log=False) as process:
        try:
            output, _ = process.communicate(timeout=timeout_seconds)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args, output)
    *text, last = output.splitlines()
    figures: dict[str, Any] = json.loads(last)
    return text, figures
