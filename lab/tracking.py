"""Sinks of figures during a run: metrics.jsonl always, Weights & Biases if possible, progress on stderr.

No sink can change a result: if W&B is absent, offline or broken, or a disk full, one warning says so.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lab.command.terminal import has_room
from lab.settings import TrackingSettings, WandbMode, digest, to_plain

log = logging.getLogger(__name__)

Advance = Callable[[str], None]
"""Counts one unit more of a loop, as `progress` yields it; the text says what stands now."""


class JsonLines:
    """One JSON object per line, written at once, so that a killed run keeps its rows. Raises OSError."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append `row`, or nothing: a full disk leaves no partial line."""
        line, size = json.dumps(row, allow_nan=False).encode() + b"\n", os.fstat(self._file.fileno()).st_size
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError:
            self._file.truncate(size)
            raise

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class HasTracking(Protocol):
    """Settings of a command, or of one cell of a sweep, which become the config of its W&B run."""

    @property
    def tracking(self) -> TrackingSettings:
        """The sinks of its figures."""


class Wandb:
    """A Weights & Biases run that keeps all its files in the run folder; scalars are logged, the rest is summary."""

    def __init__(self, settings: HasTracking, group: str, folder: Path) -> None:
        places = ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR")
        self._variables = {name: str(folder) for name in places if name not in os.environ}
        self._variables |= {} if "WANDB_SILENT" in os.environ else {"WANDB_SILENT": "true"}
        os.environ.update(self._variables)
        try:
            import wandb

            self._run = wandb.init(
                mode=settings.tracking.wandb.value,
                project=settings.tracking.wandb_project,
                group=settings.tracking.wandb_group or group,
                dir=str(folder),
                config=to_plain(settings) | {"settings_digest": digest(settings)},
            )
        except BaseException:
            self._restore()
            raise

    def _restore(self) -> None:
        """Takes back our variables: the next run of this process has another folder."""
        for name in self._variables:
            os.environ.pop(name, None)

    def write(self, row: Mapping[str, Any]) -> None:
        """Logs the row's numbers at its step; what is no number goes to the run's summary."""
        numbers = {
            key: value for key, value in row.items() if isinstance(value, int | float) and key not in ("step", "time")
        }
        self._run.log(numbers, step=row.get("step"))
        self._run.summary.update({key: value for key, value in row.items() if key not in numbers})

    def close(self) -> None:
        """Finishes the run."""
        try:
            self._run.finish()
        finally:
            self._restore()


class Tracker:
    """All sinks of one run, as a context manager."""

    def __init__(self, settings: HasTracking, name: str, folder: Path) -> None:
        self._tracking: TrackingSettings = settings.tracking
        self._reported: set[str] = set()
        self._jsonl = self._open_jsonl(folder / "metrics.jsonl")
        self._wandb = self._open_wandb(settings, name, folder)

    def log(self, step: int, **figures: Any) -> None:
        """One row of figures at `step` (a round, a training step, a cell)."""
        self._write({"step": step, "time": time.time()} | self._finite(figures))

    def result(self, figures: Mapping[str, Any]) -> None:
        """The figures of the last line, so that every sink holds all of them."""
        self._write({"time": time.time(), "result": True} | self._finite(dict(figures)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._jsonl is not None:
            self._jsonl.close()
        if self._wandb is not None:
            self._never_fatal("close", self._wandb.close)

    def _write(self, row: dict[str, Any]) -> None:
        try:
            if self._jsonl is not None:
                self._jsonl.write(row)
        except OSError as error:  # rows that come when there is room again are written
            self._warn_of_jsonl(error)
        if (sink := self._wandb) is not None:
            self._never_fatal("log to", lambda: sink.write(row))

    def _open_jsonl(self, path: Path) -> JsonLines | None:
        try:
            return JsonLines(path)
        except OSError as error:
            self._warn_of_jsonl(error)
            return None

    def _warn_of_jsonl(self, error: OSError) -> None:
        if "metrics.jsonl" not in self._reported:
            self._reported.add("metrics.jsonl")
            log.warning("metrics.jsonl lacks rows: %s", error)

    def _open_wandb(self, settings: HasTracking, name: str, folder: Path) -> Wandb | None:
        if settings.tracking.wandb is WandbMode.disabled:
            return None
        try:
            return Wandb(settings, name, folder)
        except Exception as error:  # absent, offline or broken: the run continues without it
            log.warning(
                "Weights & Biases is off for this run (%s: %s); metrics.jsonl holds every figure",
                type(error).__name__,
                error,
            )
            return None

    def _never_fatal(self, what: str, call: Any) -> None:
        try:
            call()
        except Exception as error:
            log.warning(
                "could not %s Weights & Biases (%s: %s); off for the rest of this run",
                what,
                type(error).__name__,
                error,
            )
            self._wandb = None

    def _finite(self, figures: dict[str, Any]) -> dict[str, Any]:
        plain: dict[str, Any] = finite(to_plain(figures))
        for key in figures:
            if finite(to_plain(figures[key])) != to_plain(figures[key]) and key not in self._reported:
                self._reported.add(key)
                log.warning("%s is not finite: %s", key, figures[key])
        return plain


def finite(value: Any) -> Any:
    """JSON has no NaN: non-finite numbers become their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list) else value


def picture(draw: Callable[[], Path]) -> list[Path]:
    """The picture that `draw` makes, alone in a list; none, and one warning, where it cannot be made."""
    try:
        return [draw()]
    except Exception as error:  # no picture is worth a result
        log.warning("a picture is missing (%s: %s)", type(error).__name__, error)
        return []


@contextmanager
def progress(title: str, total: int, enabled: bool) -> Iterator[Advance]:
    """Counts to `total` on stderr: a live bar on a terminal that has room, else a line a unit (at most about a
    hundred)."""
    if not enabled:
        yield lambda detail: None
    elif has_room(sys.stderr):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, TextColumn("{task.fields[detail]}"), console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total, detail="")
            yield lambda detail: bar.update(task, advance=1, detail=detail)
    else:
        yield _plain_lines(title, total)


def _plain_lines(title: str, total: int) -> Advance:
    since, done = time.monotonic(), 0
    every = max(1, total // 100)

    def advance(detail: str) -> None:
        nonlocal done
        done += 1
        if done % every:
            return
        print(
            f"{title} {done}/{total} after {time.monotonic() - since:.0f} s {detail}".rstrip(),
            file=sys.stderr,
            flush=True,
        )

    return advance
