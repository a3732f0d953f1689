"""One sweep: which runs are missing, in which order they run, what is kept of each.

An interrupted sweep continues where it stopped; of two concurrent sweeps, each uses the other's results
(`matrix.claims`). Runs of different cells are interleaved (A, B, ..., A, B, ...): drift affects all cells alike.
"""

import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.command.overrides import override
from lab.device import choose_device, hardware, open_device
from lab.environment import commit
from lab.files import require_writable
from lab.settings import DeviceName, DeviceSettings, TrackingSettings, UserError, to_plain
from lab.tracking import Tracker, progress
from matrix.claims import Claims
from matrix.contents import Contents, sources_digest
from matrix.grid import QUIET, Cell, CommandLine, make_cells
from matrix.launching import CellLauncher, LocalLauncher, places
from matrix.on_ray import RayLauncher
from matrix.results import CellRun, Record, Result, outgrown
from matrix.settings import Launcher, MatrixSettings, SweepSettings
from matrix.supervisor import Job, Outcome

log = logging.getLogger(__name__)

WAIT_SECONDS = 0.2
"""Seconds between two looks at the results of another sweep."""


@dataclass(frozen=True)
class CellTracking:
    """Settings of one cell for the tracker."""

    tracking: TrackingSettings
    cell: dict[str, Any]


@dataclass(frozen=True)
class SweepResult:
    """The results of a sweep, and how it ended."""

    document: dict[str, Any]
    """`sweep`: its settings; `results`: the result of every run. The content of sweep.json."""
    skipped: int
    """Cells of which all runs were already kept."""
    ended_by: BaseException | None
    """The exception that ended it early; None if it is complete."""


def run_sweep(settings: MatrixSettings, command_line: CommandLine, folder: Path) -> SweepResult:
    """Run what is missing. `folder` names the sweep; cells are kept in `matrix.results`.

    UserError before the first run. Any later exception is in the result, with the runs that are done.
    """
    began = time.monotonic()
    sweep = settings.matrix
    device = hardware(open_device(settings.device))
    cells = make_cells(sweep, command_line)
    runs = plan(sweep, cells)
    records = {run.signature: run.record() for run in runs}
    missing = list({run.signature: run for run in runs if _is_missing(records[run.signature], sweep)}.values())
    log.info("%d cells, %d runs; %d of them to do", len(cells), len(runs), len(missing))
    ran, ended_by = set[str](), None
    try:
        if missing:
            _Missing(missing, settings, folder, records, ran).run()
    except UserError:
        raise
    except BaseException as error:  # Ctrl+C, a full disk, a lost cluster: results so far are kept
        ended_by = error
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
        "asked": command_line.asked,
        "seconds": time.monotonic() - began,
    }
    skipped = len(cells) - len({id(run.cell) for run in runs if run.signature in ran})
    return SweepResult({"sweep": about, "results": _results(runs, records, sweep.command, ended_by)}, skipped, ended_by)


def plan(sweep: SweepSettings, cells: Sequence[Cell]) -> list[CellRun]:
    """Every run of every cell, in the order in which they run. UserError for a device that this machine lacks."""
    sources, results = sources_digest(sweep.sources), Path(sweep.results).expanduser().absolute()
    contents, runs = Contents(sweep.contents), []
    devices = {name: _device(name) for name in {cell.settings["device"]["name"] for cell in cells}}
    for repeat in range(sweep.repeats):
        for cell in cells:
            device = devices[cell.settings["device"]["name"]]
            signature = cell.signature(sweep, repeat, sources, device, contents.of(cell.settings))
            runs.append(CellRun(cell, repeat, signature, results / signature, device))
    return runs


def _device(name: str) -> str:
    return hardware(choose_device(DeviceSettings(name=DeviceName[name], threads=0, compile=False)))


def _is_missing(record: Record | None, sweep: SweepSettings) -> bool:
    return record is None or outgrown(record, sweep) or (sweep.retry_failed and record["status"] == "failed")


def _results(
    runs: Sequence[CellRun], records: Mapping[str, Record | None], command: str, ended_by: BaseException | None
) -> list[Result]:
    """Results in the order of the plan. After an early end only of runs that are done; a cell without any says so."""
    done = {id(run.cell) for run in runs if records[run.signature] is not None}
    why = "the sweep was interrupted" if isinstance(ended_by, KeyboardInterrupt) else f"the sweep ended: {ended_by!r}"
    results = []
    for run in runs:
        if (record := records[run.signature]) is not None:
            results.append(run.used(record))
        elif id(run.cell) not in done and run.repeat == 0:
            results.append(run.not_run(why, command))
    return results


class _Missing:
    """Runs what is missing, and keeps each result at once."""

    def __init__(
        self,
        runs: Sequence[CellRun],
        settings: MatrixSettings,
        folder: Path,
        records: dict[str, Record | None],
        ran: set[str],
    ) -> None:
        """`records` collects the results, `ran` the signatures of the runs of this sweep."""
        self._runs, self._settings, self._folder = runs, settings, folder
        self._before, self._records, self._ran = dict(records), records, ran
        self._seconds: list[float] = []

    def run(self) -> None:
        """Continue until each run has a record, made by this sweep or by a concurrent one."""
        results, left, said = self._runs[0].folder.parent, list(self._runs), ""
        require_writable(results, "matrix.results")
        enabled = self._settings.tracking.progress
        with Claims(results, self._folder) as claims, progress("runs", len(left), enabled) as self._advance:
            while left:
                theirs = claims.take([run.signature for run in left])
                ours = [run for run in left if run.signature not in theirs and not self._was_done(run, claims)]
                left = [run for run in left if run.signature in theirs]
                if ours:
                    self._run_all(ours, claims)
                elif left:
                    if said != (said := theirs[left[0].signature]):
                        log.info("waiting for %d runs of another sweep: %s", len(left), said)
                    time.sleep(WAIT_SECONDS)

    def _was_done(self, run: CellRun, claims: Claims) -> bool:
        """Whether another sweep has finished the run since ours began."""
        record = run.record()
        if record is None or record == self._before[run.signature] or outgrown(record, self._settings.matrix):
            return False
        self._records[run.signature] = record
        claims.give_back(run.signature)
        self._advance(f"{_title(run)}: by another sweep")
        return True

    def _run_all(self, runs: Sequence[CellRun], claims: Claims) -> None:
        sweep = self._settings.matrix
        launcher = open_launcher(sweep)
        with closing(launcher.run([_job(run, sweep) for run in runs])) as outcomes:
            for index, outcome in outcomes:
                run = runs[index]
                record = self._records[run.signature] = run.keep(outcome, sweep.command)
                self._ran.add(run.signature)
                claims.give_back(run.signature)
                self._seconds.append(outcome.seconds)
                _track(run, record, self._settings.tracking, group=f"matrix-{sweep.name}-{self._folder.name}")
                left = seconds_left(self._seconds, len(runs), launcher.at_once)
                self._advance(f"{_title(run)}: {_ending(outcome)}; about {left:.0f} s left")


def open_launcher(settings: SweepSettings) -> CellLauncher:
    """The launcher that `settings` select. UserError for a Ray cluster that does not answer."""
    return RayLauncher(settings) if settings.launcher is Launcher.ray else LocalLauncher(places(settings))


def seconds_left(done: Sequence[float], runs: int, at_once: int) -> float:
    """Estimated time of the missing runs: the mean duration so far, `at_once` concurrently."""
    mean = sum(done) / len(done)
    return math.ceil((runs - len(done)) / at_once) * mean


def _job(run: CellRun, sweep: SweepSettings) -> Job:
    folder = run.new_folder()
    return Job(
        arguments=[
            *(sys.executable, "-m", sweep.command),
            *(*run.cell.words, *QUIET, override("hydra.run.dir", folder)),
        ],
        working_folder=str(Path.cwd()),
        folder=str(folder),
        time_limit_seconds=sweep.time_limit_seconds,
        memory_limit_bytes=int(sweep.memory_limit_gib * 2**30),
        omp_threads=os.environ.get("OMP_NUM_THREADS"),
    )


def _track(run: CellRun, record: Record, tracking: TrackingSettings, group: str) -> None:
    """Log the cell as a separate run, grouped by sweep."""
    tracked = CellTracking(tracking, {"point": run.cell.point, "repeat": run.repeat, **record["settings"]})
    with Tracker(tracked, group, run.folder) as tracker:
        tracker.result({key: record[key] for key in _TRACKED} | record["figures"])


_TRACKED = ("status", "failure", "detail", "seconds", "peak_rss_bytes", "signature", "commit", "device")


def _title(run: CellRun) -> str:
    return " ".join(f"{key}={value}" for key, value in run.cell.point.items())


def _ending(outcome: Outcome) -> str:
    return f"{outcome.failure} ({outcome.detail})" if outcome.failure else f"{outcome.seconds:.1f} s"
