"""One command as a fresh process, watched from outside: its time, its memory, how it ended.

A process of its own (`python -m matrix.supervisor`), so that it survives whoever asked for the cell just long
enough to end what that one had started: the job comes as one JSON line on stdin, and when stdin ends, however that
came, the command is killed with everything below it. The outcome is one JSON line on stdout. Light: no torch, no Hydra.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

POLL_SECONDS = 0.05
FAMILY_SECONDS = 0.5
"""How often to look for new children: that reads the state of every process of the machine."""
OUT_OF_MEMORY = ("outofmemory", "out of memory", "memoryerror", "cannot allocate memory", "can't allocate memory")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of one command."""

    arguments: list[str]
    """The whole command line."""
    working_folder: str
    """Where relative paths of its settings begin, if this machine has it."""
    folder: str
    """Where its stdout.log and stderr.log go: its own, and new."""
    time_limit_seconds: float
    memory_limit_bytes: int
    """Resident memory of the command and all its children together."""
    omp_threads: str | None
    """OMP_NUM_THREADS as the one who asked has it: Ray sets its own for a worker."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How it ended."""

    failure: str | None
    """None: it did what it was to do; else `out of memory`, `time-out` or `error`."""
    detail: str
    """About a failure: the limit, or the last line of its stderr."""
    figures: dict[str, Any]
    """The document of its last line."""
    seconds: float
    peak_rss_bytes: int
    """Largest sum over its processes (memory-mapped weights included), read every 50 ms."""
    host: str
    limit: dict[str, float] = field(default_factory=dict)
    """The setting of the sweep that ended it, with the value it had: a larger one may have let it go on."""


class Family:
    """A process and all that came of it."""

    def __init__(self, root: psutil.Process) -> None:
        self._members = [root]
        self._looked = 0.0
        self.peak_bytes = 0

    def rss_bytes(self) -> int:
        """Resident memory of all of them, now."""
        if time.monotonic() - self._looked > FAMILY_SECONDS:
            self._look()
        now = sum(_rss_bytes(member) for member in self._members)
        self.peak_bytes = max(self.peak_bytes, now)
        return now

    def _look(self) -> None:
        self._looked = time.monotonic()
        known = {member.pid for member in self._members}
        for member in self._members[:]:  # one whose parent has ended stays ours
            try:
                found = [child for child in member.children(recursive=True) if child.pid not in known]
            except psutil.Error:
                continue
            self._members += found
            known |= {child.pid for child in found}

    def kill(self) -> None:
        """End everyone at once; a process that took the number of one that had ended is not one of them."""
        self._look()
        for member in self._members:
            try:
                member.kill()  # psutil compares the time of birth first
            except psutil.Error:
                continue


def _rss_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def supervise(job: Job, abandoned: threading.Event) -> Outcome | None:
    """Runs the job to its end, or to a limit. None when it was abandoned."""
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with (folder / "stdout.log").open("w") as out, (folder / "stderr.log").open("w") as err:
        process = subprocess.Popen(
            job.arguments,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=job.working_folder if Path(job.working_folder).is_dir() else None,
            env=_environment(job),
            start_new_session=True,
        )
    family = Family(psutil.Process(process.pid))
    try:
        passed = _watch(process, family, job, began, abandoned)
    finally:
        family.kill()
        process.wait()
    if abandoned.is_set():
        return None
    limit, (failure, detail) = passed or ({}, _said(process.returncode, folder))
    return Outcome(
        failure=failure,
        detail=detail,
        figures={} if failure else json.loads(_last_line(folder / "stdout.log")),
        seconds=time.monotonic() - began,
        peak_rss_bytes=family.peak_bytes,
        host=os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", ""),
        limit=limit,
    )


def _watch(
    process: subprocess.Popen[bytes], family: Family, job: Job, began: float, abandoned: threading.Event
) -> tuple[dict[str, float], tuple[str, str]] | None:
    """Waits for the end; which limit was passed, if one was, with failure and detail."""
    while process.poll() is None:
        resident = family.rss_bytes()
        if resident > job.memory_limit_bytes:
            gib, most = resident / 2**30, job.memory_limit_bytes / 2**30
            said = f"{gib:.2f} GiB resident, the limit is {most:g} GiB"
            return {"memory_limit_gib": most}, ("out of memory", said)
        if time.monotonic() - began > job.time_limit_seconds:
            most = job.time_limit_seconds
            return {"time_limit_seconds": most}, ("time-out", f"not done after {most:g} s")
        if abandoned.wait(POLL_SECONDS):
            return None
    return None


def _said(code: int, folder: Path) -> tuple[str | None, str]:
    """Failure and its last line, out of what the command left."""
    last = _last_line(folder / "stderr.log")
    if code < 0:
        number = -code
        name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
        hint = " (often the system's own out-of-memory killer)" if number == 9 else ""
        return "error", f"killed by {name}{hint}"
    if code:
        short = any(word in last.lower() for word in OUT_OF_MEMORY)
        return "out of memory" if short else "error", last or f"exit code {code}"
    try:
        return (None, "") if isinstance(json.loads(_last_line(folder / "stdout.log")), dict) else _NO_DOCUMENT
    except ValueError:
        return _NO_DOCUMENT


_NO_DOCUMENT = ("error", "its last line is no JSON document")


def _last_line(file: Path) -> str:
    lines = [line for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def _environment(job: Job) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return environment if job.omp_threads is None else environment | {"OMP_NUM_THREADS": job.omp_threads}


def main() -> None:
    """Job on stdin, outcome on stdout."""
    job = Job(**json.loads(sys.stdin.readline()))
    abandoned = threading.Event()

    def wait_for_the_end_of_stdin() -> None:
        sys.stdin.read()
        abandoned.set()

    threading.Thread(target=wait_for_the_end_of_stdin, daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: abandoned.set())
    outcome = supervise(job, abandoned)
    if outcome is not None:
        print(json.dumps(asdict(outcome)), flush=True)
    os._exit(0)  # the thread that reads stdin holds its lock; nothing is left to be done


if __name__ == "__main__":
    main()
