"""Runs one command as a new process and watches its time, its memory and how it ends.

The supervisor is a separate process (`python -m matrix.supervisor`): it outlives its parent just long enough to end the
command. The job comes as one JSON line on stdin. When stdin ends, for whatever reason, the command and all its
descendants are killed. The outcome is one JSON line on stdout. Light: no torch, no Hydra.
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
"""Seconds between two searches for new children; each search reads the state of every process of the machine."""
OUT_OF_MEMORY = ("outofmemory", "out of memory", "memoryerror", "cannot allocate memory", "can't allocate memory")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of one command."""

    arguments: list[str]
    """The whole command line."""
    working_folder: str
    """Base of relative paths in its settings, if this machine has that folder."""
    folder: str
    """New folder of its stdout.log and stderr.log."""
    time_limit_seconds: float
    memory_limit_bytes: int
    """Resident memory of the command and all its children together."""
    omp_threads: str | None
    """OMP_NUM_THREADS of the process that started the sweep: Ray sets another one for a worker."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a job."""

    failure: str | None
    """None: it succeeded; else `out of memory`, `time-out` or `error`."""
    detail: str
    """Details of a failure: the limit, or the last line of stderr."""
    figures: dict[str, Any]
    """The document of its last line."""
    seconds: float
    peak_rss_bytes: int
    """Largest sum over its processes (memory-mapped weights included), read every 50 ms."""
    host: str
    limit: dict[str, float] = field(default_factory=dict)
    """The setting of the sweep that ended it, and its value then; with a larger value the job may succeed."""


class Family:
    """A process and all its descendants."""

    def __init__(self, root: psutil.Process) -> None:
        self._members = [root]
        self._looked = 0.0
        self.peak_bytes = 0

    def rss_bytes(self) -> int:
        """Resident memory of all of them now."""
        if time.monotonic() - self._looked > FAMILY_SECONDS:
            self._look()
        now = sum(_rss_bytes(member) for member in self._members)
        self.peak_bytes = max(self.peak_bytes, now)
        return now

    def _look(self) -> None:
        self._looked = time.monotonic()
        known = {member.pid for member in self._members}
        for member in self._members[:]:  # one whose parent has ended still belongs to us
            try:
                found = [child for child in member.children(recursive=True) if child.pid not in known]
            except psutil.Error:
                continue
            self._members += found
            known |= {child.pid for child in found}

    def kill(self) -> None:
        """Kill all of them, and no other process that was given the number of an ended one."""
        self._look()
        for member in self._members:
            try:
                member.kill()  # psutil compares the start time first
            except psutil.Error:
                continue


def _rss_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def supervise(job: Job, abandoned: threading.Event) -> Outcome | None:
    """Run the job until it ends or exceeds a limit. None when it was abandoned."""
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
    """Wait for the end; if a limit was exceeded, the limit with failure and detail."""
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
    """Failure and detail, from the exit code and the files that the command left."""
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
    """Read the job from stdin, write the outcome to stdout."""
    job = Job(**json.loads(sys.stdin.readline()))
    abandoned = threading.Event()

    def wait_for_the_end_of_stdin() -> None:
        sys.stdin.read()
        abandoned.set()

    threading.Thread(target=wait_for_the_end_of_stdin, daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: abandoned.set())
    outcome: Outcome | None
    try:
        outcome = supervise(job, abandoned)
    except OSError as error:  # a full disk: the cell could not begin, or be read
        outcome = Outcome(failure="error", detail=str(error), figures={}, seconds=0.0, peak_rss_bytes=0, host="")
    if outcome is not None:
        print(json.dumps(asdict(outcome)), flush=True)
    os._exit(0)  # Python's own exit would wait for the thread that reads stdin


if __name__ == "__main__":
    main()
