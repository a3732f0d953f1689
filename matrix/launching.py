"""Launchers of cells: each takes jobs and yields their outcomes as they end; closing it ends the jobs still running."""

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


class SupervisedJob:
    """A job under its supervisor, both with `environment`. Closing it ends both."""

    def __init__(self, job: Job, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "matrix.supervisor"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl+C must reach only us
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(job)) + "\n")
        self._process.stdin.flush()

    def outcome(self) -> Outcome:
        """Wait for the end. If the supervisor itself was killed, its cell has failed."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return Outcome(**json.loads(line))
        detail = f"its supervisor ended with code {self._process.wait()}"
        return Outcome(failure="error", detail=detail, figures={}, seconds=0.0, peak_rss_bytes=0, host="")

    def close(self) -> None:
        """End its stdin: the supervisor kills the command, then exits."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def run_job(job: Job) -> Outcome:
    """Run one job from start to end."""
    with closing(SupervisedJob(job, os.environ)) as supervised:
        return supervised.outcome()


class CellLauncher(Protocol):
    """Starts jobs in their order, at most `at_once` concurrently."""

    at_once: int

    def run(self, jobs: Sequence[Job]) -> Generator[tuple[int, Outcome]]:
        """Index and outcome of every job, as they end. Closing the iterator ends the jobs that run."""


class LocalLauncher(CellLauncher):
    """Runs cells on this machine."""

    def __init__(self, at_once: int) -> None:
        self.at_once = at_once
        self._environment = dict(os.environ)
        """A copy: the threads below start cells while W&B changes the original for a cell that has ended."""
        self._running: set[SupervisedJob] = set()
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
            supervised = SupervisedJob(job, self._environment)
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
    """Number of concurrent cells on this machine: as set, or limited by its cores and memory; at least one."""
    by_cores = int((os.cpu_count() or 1) / settings.cores)
    by_memory = int(psutil.virtual_memory().available / (settings.memory_limit_gib * 2**30))
    room = max(1, min(by_cores, by_memory))
    return min(settings.at_once, room) if settings.at_once else room
