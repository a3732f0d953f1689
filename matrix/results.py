"""The result of one run of a cell: `<results>/<signature>/result.json`, written whole or not at all.

It describes the run (settings, sources, device, limits), not the sweep or the cell's position in a grid: a sweep that
uses the result adds these.
"""

import json
import logging
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from lab.environment import describe_environment
from lab.files import write_whole
from lab.tracking import finite
from matrix.grid import Cell
from matrix.settings import SweepSettings
from matrix.supervisor import Outcome

log = logging.getLogger(__name__)

Record = dict[str, Any]
"""A result.json: `status` is `ok` or `failed`; `failure` and `detail` give the reason."""

Result = dict[str, Any]
"""A record as used by one sweep, with its `point`, `words` and `settings`. `status` may also be `not run`."""


class _Known(msgspec.Struct):
    """The fields of a record that are read; the others are kept unchanged."""

    signature: str
    status: Literal["ok", "failed"]
    failure: str | None
    detail: str
    figures: dict[str, Any]
    seconds: float
    device: str
    host: str
    commit: Any
    command: str
    limit: dict[Literal["time_limit_seconds", "memory_limit_gib"], float] = {}


_ABOUT_THE_PROCESS = ("status", "run_folder", "settings_digest")


@dataclass(frozen=True)
class CellRun:
    """One run of one cell, and the folder of its result."""

    cell: Cell
    repeat: int
    signature: str
    folder: Path
    device: str
    """Name of the device that it runs on."""

    def record(self) -> Record | None:
        """The result of an earlier run; None if there is none."""
        file = self.folder / "result.json"
        if not file.exists():
            return None
        try:
            found: Record = json.loads(file.read_text(encoding="utf-8"))
            known = msgspec.convert(found, _Known)
        except (ValueError, RecursionError):
            log.warning("%s is not a JSON document; its cell runs again", file)
            return None
        except msgspec.ValidationError as error:  # damaged, or of another version
            log.warning("%s is not a result (%s); its cell runs again", file, error)
            return None
        if known.signature != self.signature:
            log.warning("%s is not a result of this cell, which runs again", file)
            return None
        return found

    def new_folder(self) -> Path:
        """A new folder for the files of a run; removes those of earlier runs. The caller has claimed the cell."""
        for left in self.folder.glob("run*"):
            shutil.rmtree(left, ignore_errors=True)
        return self.folder / f"run-{uuid.uuid4().hex[:8]}"  # a run of a killed sweep may still write to the old one

    def keep(self, outcome: Outcome, command: str) -> Record:
        """Write the record of an outcome, and return it."""
        environment = describe_environment()
        said = {key: value for key, value in outcome.figures.items() if key not in _ABOUT_THE_PROCESS}
        where = {key: said.pop(key, value) for key, value in environment.items()}  # the node's own, if it reported any
        record = {
            "status": "failed" if outcome.failure else "ok",
            "failure": outcome.failure,
            "detail": outcome.detail,
            "limit": outcome.limit,
            "repeat": self.repeat,
            "figures": said,
            "seconds": outcome.seconds,
            "peak_rss_bytes": outcome.peak_rss_bytes,
            "peak_device_bytes": said.get("peak_device_bytes"),
            "device": self.device,
            "host": outcome.host,
            "date": time.strftime("%Y-%m-%d %H:%M:%S"),
            "command": command,
            "words": self.cell.words,
            "signature": self.signature,
            **where,
            "settings": self.cell.settings,
        }
        plain: Record = finite(record)
        write_whole(self.folder / "result.json", json.dumps(plain, indent=1, allow_nan=False) + "\n")
        return plain

    def used(self, record: Record) -> Result:
        """The record as a result of this sweep."""
        return {**record, "point": self.cell.point, "words": self.cell.words, "settings": self.cell.settings}

    def not_run(self, why: str, command: str) -> Result:
        """A result for a run that a sweep did not reach before it ended."""
        about = {"status": "not run", "failure": "not run", "detail": why, "repeat": self.repeat, "figures": {}}
        about |= {"seconds": 0.0, "device": self.device, "host": "", "commit": "", "command": command}
        return self.used(about | {"signature": self.signature})


def outgrown(record: Record, settings: SweepSettings) -> bool:
    """Whether the run failed on a limit that has been raised since."""
    return any(getattr(settings, name) > was for name, was in record.get("limit", {}).items())
