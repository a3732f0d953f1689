"""Launchers of cells: each takes jobs and yields their outcomes as they end; closing it ends those that still run."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict
from typing import Protocol

import psutil
from typing_extensions import override

from matrix.settings import SweepSettings
from matrix.supervisor import Job, Outcome


class Supervised:
    """A job under its supervisor, both with `environment`. Closing it ends both."""

    def __init__(self, job: Job, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "matrix.supervisor"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl+C is for us
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(job)) + "\n")
        self._process.stdin.flush()

    def outcome(self) -> Outcome:
        """Waits for the end. A supervisor that was killed itself is a failure of its cell."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return Outcome(**json.loads(line))
        detail = f"its supervisor ended with code {self._process.wait()}"
        return Outcome(failure="error", detail=detail, figures={}, seconds=0.0, peak_rss_bytes=0, host="")

    def close(self) -> None:
        """End of stdin: the supervisor kills what runs, and goes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def run_job(job: Job) -> Outcome:
    """One job, from its start to its end."""
    with closing(Supervised(job, os.environ)) as supervised:
        return supervised.outcome()


class CellLauncher(Protocol):
    """Starts jobs in their order, as many at once as it has places."""

    at_once: int

    def run(self, jobs: Sequence[Job]) -> Generator[tuple[int, Outcome]]:
        """Index and outcome of every job, as they end. Closing the iterator ends what runs."""


class LocalLauncher(CellLauncher):
    """Cells on this machine."""

    def __init__(self, at_once: int) -> None:
        self.at_once = at_once
        self._environment = dict(os.environ)
        """A copy, since the threads below start cells while W&B changes our own for the cell that has ended."""
        self._running: set[Supervised] = set()
        self._lock = threading.Lock()
        self._stopped = False

    @override
    def run(self, jobs: Sequence[Job]) -> Generator[tuple[int, Outcome]]:
        with ThreadPoolExecutor(self.at_once) as pool:
            futures = {pool.submit(self._run_one, job): index for index, job in enumerate(jobs)}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                self._stop()

    def _run_one(self, job: Job) -> Outcome:
        with self._lock:
            if self._stopped:
                raise CancelledError
            supervised = Supervised(job, self._environment)
            self._running.add(supervised)
        try:
            return supervised.outcome()
        finally:
            with self._lock:
                self._running.discard(supervised)
            supervised.close()

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            for supervised in self._running:
                supervised.close()


def places(settings: SweepSettings) -> int:
    """Cells at once on this machine: what is asked for, where cores and memory have room for them; at least one."""
    by_cores = int((os.cpu_count() or 1) / settings.cores)
    by_memory = int(psutil.virtual_memory().available / (settings.memory_limit_gib * 2**30))
    room = max(1, min(by_cores, by_memory))
    return min(settings.at_once, room) if settings.at_once else room
