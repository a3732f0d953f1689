"""One sweep: which runs are missing, in which order they go, what is kept of each.

Interrupted, it goes on where it was. Runs of a cell are interleaved with those of the others (A, B, ..., A, B, ...), so
that a machine that drifts disturbs all of them alike.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.device import hardware, open_device
from lab.environment import commit
from lab.matrix.contents import Contents
from lab.matrix.grid import QUIET, Cell, Words, make_cells
from lab.matrix.launching import open_launcher
from lab.matrix.results import CellRun, Result
from lab.matrix.settings import MatrixSettings, SweepSettings
from lab.matrix.sources import sources_digest
from lab.matrix.supervisor import Job, Outcome
from lab.settings import TrackingSettings, to_plain
from lab.tracking import Tracker, progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CellTracking:
    """What a sink is told of one cell."""

    tracking: TrackingSettings
    cell: dict[str, Any]


@dataclass(frozen=True)
class SweepResult:
    """All that a sweep has."""

    document: dict[str, Any]
    """`sweep`: what was asked; `results`: every run's result.json. The content of sweep.json."""
    skipped: int
    """Cells of which nothing had to run now."""


def run_sweep(settings: MatrixSettings, words: Words, folder: Path) -> SweepResult:
    """Runs what is missing. `folder` names the sweep; cells are kept in `matrix.results`. UserError before any ran."""
    began = time.monotonic()
    sweep = settings.matrix
    device = hardware(open_device(settings.device))
    cells = make_cells(sweep, words)
    runs = plan(sweep, cells, device)
    results: dict[str, Result | None] = {run.signature: run.result() for run in runs}
    missing = [run for run in runs if _is_missing(results[run.signature], sweep.retry_failed)]
    log.info("%d cells, %d runs; %d of them to do", len(cells), len(runs), len(missing))
    if missing:
        results |= _run_all(missing, settings, device, group=f"matrix-{sweep.name}-{folder.name}")
    about = {
        "name": sweep.name,
        "command": sweep.command,
        "axes": list(cells[0].point),
        "labels": sweep.labels,
        "metrics": to_plain(sweep.metrics),
        "repeats": sweep.repeats,
        "model": ", ".join(dict.fromkeys(cell.settings["model"]["name"] for cell in cells)),
        "device": device,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "launcher": sweep.launcher.name,
        "asked": words.asked,
        "seconds": time.monotonic() - began,
    }
    ran = {id(run.cell) for run in missing}
    return SweepResult({"sweep": about, "results": [results[run.signature] for run in runs]}, len(cells) - len(ran))


def plan(sweep: SweepSettings, cells: Sequence[Cell], device: str) -> list[CellRun]:
    """Every run of every cell in the order in which they go."""
    sources, results = sources_digest(sweep.sources), Path(sweep.results).expanduser().absolute()
    contents, runs = Contents(sweep.contents), []
    for repeat in range(sweep.repeats):
        for cell in cells:
            signature = cell.signature(sweep, repeat, sources, device, contents.of(cell.settings))
            runs.append(CellRun(cell, repeat, signature, results / signature))
    return runs


def _is_missing(result: Result | None, retry_failed: bool) -> bool:
    return result is None or (retry_failed and result["status"] == "failed")


def _run_all(runs: Sequence[CellRun], settings: MatrixSettings, device: str, group: str) -> dict[str, Result]:
    """The results of these runs by signature, each kept as soon as it is there."""
    sweep, results = settings.matrix, dict[str, Result]()
    launcher = open_launcher(sweep)
    with (
        progress("runs", len(runs), settings.tracking.progress) as counter,
        closing(launcher.run([_job(run, sweep) for run in runs])) as outcomes,
    ):
        for index, outcome in outcomes:
            run = runs[index]
            result = results[run.signature] = run.keep(outcome, sweep.command, device)
            _track(run, result, settings.tracking, group)
            left = seconds_left(list(results.values()), len(runs), launcher.at_once)
            counter.advance(f"{_title(run)}: {_ending(outcome)}; about {left:.0f} s left")
    return results


def seconds_left(done: Sequence[Result], runs: int, at_once: int) -> float:
    """As many of the mean length as are missing, so many at once."""
    mean: float = sum(result["seconds"] for result in done) / len(done)
    return math.ceil((runs - len(done)) / at_once) * mean


def _job(run: CellRun, sweep: SweepSettings) -> Job:
    folder = run.folder / "run"
    return Job(
        arguments=[
            *(sys.executable, "-m", sweep.command),
            *(*run.cell.words, *QUIET, f"hydra.run.dir={json.dumps(str(folder))}"),
        ],
        working_folder=str(Path.cwd()),
        folder=str(folder),
        time_limit_seconds=sweep.time_limit_seconds,
        memory_limit_bytes=int(sweep.memory_limit_gib * 2**30),
        omp_threads=os.environ.get("OMP_NUM_THREADS"),
    )


def _track(run: CellRun, result: Result, tracking: TrackingSettings, group: str) -> None:
    """The cell as a run of its own, in the group of its sweep."""
    told = CellTracking(tracking, {"point": result["point"], "repeat": run.repeat, **result["settings"]})
    with Tracker(told, group, run.folder) as tracker:
        tracker.result({key: result[key] for key in _TRACKED} | result["figures"])


_TRACKED = ("status", "failure", "detail", "seconds", "peak_rss_bytes", "signature", "commit", "device")


def _title(run: CellRun) -> str:
    return " ".join(f"{key}={value}" for key, value in run.cell.point.items())


def _ending(outcome: Outcome) -> str:
    return f"{outcome.failure} ({outcome.detail})" if outcome.failure else f"{outcome.seconds:.1f} s"
