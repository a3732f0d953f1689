"""Real verifiers and drafters for tests: started, checked to live, given a deadline, and ended by who started them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.command import entry
from lab.command.entry import compose_settings
from speculative.drafter import __main__ as drafter
from speculative.settings import SpeculativeSettings

START_SECONDS = 120.0
END_SECONDS = 60.0
RANDOM = (
    "model=random",
    "model.dtype=float64",
    "tracking=none",
    "device.threads=1",
    "project.sessions=8",
    "project.client.texts=4",
)


@dataclass
class Role:
    """A running role."""

    process: subprocess.Popen[str]
    ready: dict[str, Any]
    """Its line on stdout when it listened."""
    errors: Path
    """Where its stderr goes."""

    @property
    def port(self) -> int:
        return int(self.ready["port"])

    def interrupt(self) -> tuple[int, dict[str, Any]]:
        """Ctrl+C; returns the exit code and the last line."""
        self.process.send_signal(signal.SIGINT)
        out, _ = self.process.communicate(timeout=END_SECONDS)
        return self.process.returncode, json.loads(out.splitlines()[-1])

    def stderr(self) -> str:
        """What it wrote to stderr so far."""
        return self.errors.read_text()


@contextmanager
def role(module: str, *words: str, environment: Mapping[str, str] | None = None) -> Iterator[Role]:
    """A role that listens, until the end of the block."""
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "stderr").open("w") as errors:
        told = Path(errors.name)
        process = subprocess.Popen(
            [sys.executable, "-m", module, f"hydra.run.dir={folder}/run", *words],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | dict(environment or {}),
        )
        watchdog = threading.Timer(START_SECONDS, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            watchdog.cancel()
            assert line, f"{module} ended before it listened: {told.read_text()[-2000:]}"
            yield Role(process, json.loads(line), told)
            if process.poll() is not None and process.returncode not in (0, -signal.SIGKILL):
                raise AssertionError(f"{module} ended by itself: {told.read_text()[-2000:]}")
        finally:
            watchdog.cancel()
            process.kill()
            process.communicate(timeout=END_SECONDS)


@contextmanager
def verifier(*words: str, environment: Mapping[str, str] | None = None) -> Iterator[Role]:
    """A verifier on a free port."""
    with role("speculative.verifier", "network.port=0", *words, environment=environment) as running:
        yield running


def drafter_process(*words: str, folder: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """A drafter as people start it; whoever calls this ends it."""
    return subprocess.Popen(
        [sys.executable, "-m", "speculative.drafter", f"hydra.run.dir={folder}", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | dict(environment or {}),
    )


def drafted(
    port: int, words: Sequence[str], place: Path | entry.Run, prompt: str = "def add(a, b):\n    return a"
) -> dict[str, Any]:
    """The result of a drafter that runs in this process; its sockets are real."""
    overrides = " ".join(f"'{word}'" for word in (f"network.port={port}", *words))
    settings = compose_settings("spec_decoding", overrides, SpeculativeSettings)
    settings.prompt = prompt
    return drafter.run(settings, place if isinstance(place, entry.Run) else entry.Run(place))


def wait_until(holds: Any, what: str, seconds: float = 20.0) -> None:
    """Waits for a condition."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.02)
