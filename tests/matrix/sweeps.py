"""Sweeps over the fake cell, in this process or as a command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from lab.command.entry import compose_settings
from matrix.grid import sort_overrides
from matrix.settings import MatrixSettings
from matrix.sweep import SweepResult, run_sweep

ROOT = Path(__file__).resolve().parents[2]
SPEED = {"figure": "figures.speed", "title": "speed", "unit": "m/s", "scale": 1.0, "better": "higher"}
TRACKING = ("tracking=none",)
LOSS = {"figure": "figures.loss.end", "title": "loss", "unit": "nats", "scale": 1.0, "better": "lower"}


def preset(folder: Path, axes: dict[str, list[Any]], **more: Any) -> str:
    """Makes a preset of the fake cell; the word that lets Hydra find it."""
    (folder / "conf" / "matrix").mkdir(parents=True, exist_ok=True)
    content = {
        "name": "fake",
        "command": "tests.matrix.fake_cell",
        "config": "doctor",
        "axes": axes,
        "metrics": [SPEED, LOSS],
        **more,
    }
    (folder / "conf" / "matrix" / "fake.yaml").write_text(yaml.safe_dump(content))
    return f"hydra.searchpath=[file://{folder}/conf]"


def sweep_here(folder: Path, axes: dict[str, list[Any]], *typed: str, **more: Any) -> SweepResult:
    """A sweep in this process; its cells are in folder/cells."""
    typed = (f"matrix.results={folder}/cells", *typed) if not any("matrix.results=" in w for w in typed) else typed
    words = sort_overrides([preset(folder, axes, **more), "matrix=fake", *typed])
    told = " ".join(f"'{word}'" for word in (*TRACKING, "tracking.progress=false", *words.sweep))
    settings = compose_settings("matrix", told, MatrixSettings)
    return run_sweep(settings, words, folder / "sweep")


def words_of(folder: Path, axes: dict[str, list[Any]], *typed: str, **more: Any) -> list[str]:
    """The words of a command line."""
    return [preset(folder, axes, **more), "matrix=fake", "tracking=none", *typed]


def command(folder: Path, axes: dict[str, list[Any]], *typed: str, **more: Any) -> list[str]:
    """The same as a process of its own."""
    return [sys.executable, str(ROOT / "run_matrix.py"), *words_of(folder, axes, *typed, **more)]


def environment(folder: Path) -> dict[str, str]:
    """FAKE_LOG is folder/log."""
    return os.environ | {"PYTHONPATH": str(ROOT), "FAKE_LOG": str(folder / "log")}


def sweep_as_command(folder: Path, axes: dict[str, list[Any]], *typed: str, **more: Any) -> dict[str, Any]:
    """A whole command; its last line."""
    done = subprocess.run(
        command(folder, axes, *typed, **more), cwd=folder, env=environment(folder), capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


def started(folder: Path) -> list[str]:
    """What every start of a fake cell was told."""
    return [line.rpartition(" ")[0] for line in (folder / "log").read_text().splitlines()]
