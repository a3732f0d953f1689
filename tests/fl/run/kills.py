"""A run whose process is killed (SIGKILL) at random points, and resumed each time, until it is done."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fl.run.folders import round_folders

AT_WORK = 0.7
BEGUN_AGAIN = 0.7
MOST_ENDED_EARLY = 10


class Process(Protocol):
    """A server at work."""

    def kill(self) -> None: ...

    def is_alive(self) -> bool: ...

    def join(self) -> None: ...


@dataclass
class Killed:
    """What a run looked like at each kill, and at its end."""

    kills: int = 0
    rounds_at_kill: list[int] = field(default_factory=list)
    """Rounds that were finished when the process was killed; -1: not even the start."""
    lost: list[str] = field(default_factory=list)
    """Rounds that were on disk before a kill or a resumption, and not, or otherwise, afterwards."""
    ended_early: int = 0
    """Runs that failed by themselves, and were resumed: on a machine that is too busy, Ray may not start in time."""
    adapters: dict[str, bytes] = field(default_factory=dict)


def adapters(run: Path) -> dict[str, bytes]:
    """The adapter of every finished round of a run folder, by the round's name."""
    files = sorted(run.glob("adapters/round-*/adapter_model.safetensors"))
    return {file.parent.name: file.read_bytes() for file in files}


def kill_at_random(
    kills: int,
    seed: int,
    folder: Path,
    rounds: int,
    most_seconds: float,
    start: Callable[[Path, Sequence[str]], Process],
) -> Killed:
    """`start(run folder, overrides)` begins a run or goes on with one.

    A kill comes up to `most_seconds` after the start, or, for `AT_WORK` of them, soon after one of the `rounds`. Of the
    runs that are killed after their last round, `BEGUN_AGAIN` are not resumed, and the next one begins anew.
    """
    came, moments = Killed(), random.Random(seed)
    left: Path | None = None
    number = 0
    while True:
        number += 1
        here = folder / f"attempt-{number:03d}"
        before = adapters(left) if left else {}
        process = start(here, [f"project.resume={left}"] if left else [])
        if came.kills < kills:
            least = max(round_folders((left or here) / "adapters"), default=-1)
            at_work, seconds = moments.random() < AT_WORK, moments.uniform(0, most_seconds / rounds)
            seen = moments.randint(max(0, least), max(0, least, rounds - 1)) if at_work else -1
            while process.is_alive() and max(round_folders(here / "adapters"), default=-1) < seen:
                time.sleep(0.005)
            deadline = time.monotonic() + (seconds if at_work else seconds * rounds)
            while process.is_alive() and time.monotonic() < deadline:
                time.sleep(0.005)
        else:
            process.join()
        if not process.is_alive():
            came.adapters = adapters(here)
            _compare(came, before, here)
            if max(round_folders(here / "adapters"), default=-1) < rounds:
                came.ended_early += 1
                assert came.ended_early < MOST_ENDED_EARLY, f"{here} ended before its last round"
                left = here if came.adapters else left
                continue
            if came.kills >= kills:
                return came
            left = None  # it was done before it was killed: begin again
            continue
        process.kill()
        process.join()
        came.kills += 1
        came.rounds_at_kill.append(max(round_folders(here / "adapters"), default=-1))
        if came.rounds_at_kill[-1] >= 0:
            _compare(came, before, here)
            left = here
        if came.rounds_at_kill[-1] == rounds and moments.random() < BEGUN_AGAIN:
            left = None  # else every later kill would come after the last round


def _compare(came: Killed, before: dict[str, bytes], here: Path) -> None:
    now = adapters(here)
    came.lost += [f"{here.name}: {name}" for name, held in before.items() if now.get(name) != held]
