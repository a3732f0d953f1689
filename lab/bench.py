"""What every benchmark shares: warm-up, interleaved runs, median with spread, cores, environment, JSON.

Timings on a shared machine drift, so cases run in turn (A, B, A, B, ...) and are compared by ratios of the same turn.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.environment import describe_environment
from lab.settings import to_plain
from lab.tracking import finite

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """n repeated readings of one figure."""

    median: float
    low: float
    """Smallest of the n."""
    high: float
    """Largest of the n."""
    n: int

    @classmethod
    def of(cls, readings: Sequence[float]) -> Sample:
        """ValueError when there is no reading."""
        if not readings:
            raise ValueError("readings must hold at least one figure, got none")
        return cls(statistics.median(readings), min(readings), max(readings), len(readings))


def interleaved(cases: Mapping[str, Callable[[], float | None]], warmup: int, repeats: int) -> dict[str, list[float]]:
    """Readings of every case, in turn: `warmup` turns thrown away, then `repeats` kept.

    A case returns its own figure, or None to be timed by the wall clock (seconds).
    """
    readings: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warmup + repeats):
        for name, case in cases.items():
            begin = time.perf_counter()
            figure = case()
            seconds = time.perf_counter() - begin
            if turn >= warmup:
                readings[name].append(seconds if figure is None else figure)
    return readings


def ratio(over: Sequence[float], under: Sequence[float]) -> Sample:
    """over / under turn by turn: drift of the machine falls out."""
    return Sample.of([a / b for a, b in zip(over, under, strict=True)])


@functools.cache
def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Keep this thread, and what it starts meanwhile, on one core: number `core` of those we may use, counted around.
    Nothing happens on systems without it."""
    if sys.platform != "linux":
        log.warning("processes are not pinned to a core each: %s has no call for it", sys.platform)
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {_cores()[core % len(_cores())]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def judged(name: str, row: Mapping[str, Any], target: str, holds: bool) -> dict[str, Any]:
    """The row with what it was to show, and whether it did; says so."""
    log.info("%s: %s (%s)", name, "holds" if holds else "DOES NOT HOLD", target)
    return {**row, "target": target, "holds": holds}


def missed(rows: Sequence[Mapping[str, Any]]) -> int:
    """How many rows do not show what they were to show; a row without a judgement misses nothing."""
    return sum(not row.get("holds", True) for row in rows)


def write_report(path: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The benchmark's document (rows beside where they were measured), written to `path` and returned."""
    figures = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%d"),
        **describe_environment(),
        "rows": list(rows),
    }
    document: dict[str, Any] = finite(to_plain(figures))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return document
