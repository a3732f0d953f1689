"""What a run of a cell left: `<results>/<signature>/result.json`, written whole or not at all."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.environment import describe_environment
from lab.files import write_whole
from lab.matrix.grid import Cell
from lab.matrix.supervisor import Outcome
from lab.tracking import finite

log = logging.getLogger(__name__)

Result = dict[str, Any]
"""A result.json: `status` is `ok` or `failed`, `failure` and `detail` say why."""

_ABOUT_THE_PROCESS = ("status", "run_folder", "settings_digest")


@dataclass(frozen=True)
class CellRun:
    """One run of one cell, and where its result is."""

    cell: Cell
    repeat: int
    signature: str
    folder: Path

    def result(self) -> Result | None:
        """What a run before this one left; None for nothing."""
        file = self.folder / "result.json"
        if not file.exists():
            return None
        try:
            found: Result = json.loads(file.read_text(encoding="utf-8"))
            return found
        except ValueError:
            log.warning("%s is no JSON document; its cell runs again", file)
            return None

    def keep(self, outcome: Outcome, command: str, device: str) -> Result:
        """Writes what came of it, and returns it."""
        environment = describe_environment()
        said = {key: value for key, value in outcome.figures.items() if key not in _ABOUT_THE_PROCESS}
        where = {key: said.pop(key, value) for key, value in environment.items()}  # a node's own, where it said it
        result = {
            "status": "failed" if outcome.failure else "ok",
            "failure": outcome.failure,
            "detail": outcome.detail,
            "point": self.cell.point,
            "repeat": self.repeat,
            "figures": said,
            "seconds": outcome.seconds,
            "peak_rss_bytes": outcome.peak_rss_bytes,
            "peak_device_bytes": said.get("peak_device_bytes"),
            "device": device,
            "host": outcome.host,
            "date": time.strftime("%Y-%m-%d %H:%M:%S"),
            "command": command,
            "words": self.cell.words,
            "signature": self.signature,
            **where,
            "settings": self.cell.settings,
        }
        plain: Result = finite(result)
        write_whole(self.folder / "result.json", json.dumps(plain, indent=1, allow_nan=False) + "\n")
        return plain
