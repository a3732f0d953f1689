"""Tools shared by all benchmarks: warm-up, interleaved runs, median with spread, cores, environment, JSON.

Timings on a shared machine drift, so cases are interleaved (A, B, A, B, ...) and compared by ratios within a turn.
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
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lab.command.processes import listening
from lab.environment import describe_environment
from lab.files import require_writable, write_whole
from lab.settings import LabSettings, UserError, to_plain
from lab.tracking import Tracker, finite

if TYPE_CHECKING:
    from lab.command.entry import Run

log = logging.getLogger(__name__)

Row = dict[str, Any]
Rig = TypeVar("Rig")
"""The processes and models that the parts of a benchmark use."""


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
        """The sample of some readings. ValueError for none."""
        if not readings:
            raise ValueError("readings must hold at least one figure, got none")
        return cls(statistics.median(readings), min(readings), max(readings), len(readings))


def interleaved(cases: Mapping[str, Callable[[], float | None]], warmup: int, repeats: int) -> dict[str, list[float]]:
    """Readings of every case, interleaved: `warmup` turns are discarded, then `repeats` turns kept.

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
    """over / under within each turn, so that drift of the machine cancels."""
    return Sample.of([a / b for a, b in zip(over, under, strict=True)])


@functools.cache
def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Keep this thread, and the processes it starts meanwhile, on one core: number `core` of those we may use, modulo
    their count. Has no effect on systems that cannot pin."""
    if sys.platform != "linux":
        log.warning("processes are not pinned to cores: %s has no call for it", sys.platform)
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {_cores()[core % len(_cores())]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def run_parts(
    name: str,
    parts: Mapping[str, Callable[[Rig], Row | list[Row]]],
    chosen: Sequence[str],
    rig: AbstractContextManager[Rig],
    *,
    settings: LabSettings,
    place: Run,
    report: Path,
    rule: str = "project.parts must be of {}",
) -> dict[str, Any]:
    """Measure the `chosen` parts of a benchmark, in order; return the figures of the last line.

    A part's measurement returns one row or several; the rig is opened once, for all parts. Rows of other parts in the
    file `report` are kept. UserError for an unknown part: `rule`, with {} for all names.
    """
    if unknown := [part for part in chosen if part not in parts]:
        raise UserError(f"{rule.format(', '.join(parts))}, got {unknown}")
    require_writable(report.parent, "the working folder")  # now, not after a part was measured
    rows: list[Row] = []
    place.so_far = lambda: {"rows": rows}
    before = json.loads(report.read_text(encoding="utf-8"))["rows"] if report.exists() else []
    kept = [row for row in before if row["row"] not in chosen]
    with rig as opened, Tracker(settings, f"{name}-bench", place.folder) as tracker:
        for part in chosen:
            log.info("measuring %s", part)
            measured = parts[part](opened)
            for row in measured if isinstance(measured, list) else [measured]:
                rows.append(finite(to_plain({"row": part, **row, "load_average": load_average()})))
                tracker.log(len(rows), **rows[-1])
            write_report(report, name, [*kept, *rows])  # at once, since the next part may fail
    return {"benchmark": name, "report": report, "missed": missed(rows), "rows": rows}


@contextmanager
def link_process(port: int, rtt_seconds: float, folder: Path, start_seconds: float, *more: str) -> Iterator[int]:
    """A process with a link to a port of this machine, half of the round-trip time each way; yields its own port."""
    delays = [f"project.{way}.delay_seconds={rtt_seconds / 2}" for way in ("up", "down")]
    overrides = ["network.port=0", "tracking=none", f"project.target_port={port}", *delays, *more]
    with listening("simulations.link", overrides, folder, start_seconds) as own:
        yield own


def load_average() -> float | None:
    """Average number of processes that were ready to run in the last minute; None on systems without this figure."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def judged(name: str, row: Mapping[str, Any], target: str, holds: bool) -> dict[str, Any]:
    """The row with its target, and whether it holds; logs both."""
    log.info("%s: %s (%s)", name, "holds" if holds else "DOES NOT HOLD", target)
    return {**row, "target": target, "holds": holds}


def missed(rows: Sequence[Mapping[str, Any]]) -> int:
    """Number of rows that missed their target; a row without a target counts as no miss."""
    return sum(not row.get("holds", True) for row in rows)


def write_report(path: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The document of a benchmark (rows, and where they were measured), written to `path` and returned."""
    figures = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%d"),
        **describe_environment(),
        "rows": list(rows),
    }
    document: dict[str, Any] = finite(to_plain(figures))
    write_whole(path, json.dumps(document, indent=2, allow_nan=False) + "\n", share=True)
    return document
