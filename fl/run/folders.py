"""The folders of a run: one per finished round, and one per attempt of a run that `fl.run` watches."""

import json
import os
import re
from pathlib import Path
from typing import Any

import psutil

from lab.command.starts import start_of

ATTEMPT = "attempt-{}"
PROCESS = "process.json"


def round_folders(root: Path) -> dict[int, Path]:
    """The absolute folder of every finished round below root, by the round's number."""
    found = {path: re.fullmatch(r"round-(\d+)", path.name) for path in root.absolute().glob("round-*")}
    return {int(name[1]): path for path, name in found.items() if name}


def attempts_of(root: Path) -> list[Path]:
    """The folders of the attempts below a run folder."""
    found = {
        path: re.fullmatch(ATTEMPT.format(r"(\d+)"), path.name) for path in root.absolute().glob(ATTEMPT.format("*"))
    }
    return sorted((path for path, name in found.items() if name), key=lambda path: int(path.name.rpartition("-")[2]))


def claim(folder: Path, run_id: str) -> None:
    """Write into a run's folder which run it is of, and its process. FileExistsError if it is another run's."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / PROCESS).open("x", encoding="utf-8") as file:
        json.dump({"run_id": run_id, "pid": os.getpid(), "created": start_of(psutil.Process())}, file)


def claimed_by(folder: Path) -> str | None:
    """The run that has claimed a folder; None if none has."""
    return _claim(folder).get("run_id")


def process_is_gone(folder: Path) -> bool:
    """Whether the process of the run in this folder has begun, and is there no more. Flower itself notices that after a
    minute without heartbeats."""
    if not (said := _claim(folder)):
        return False
    try:
        process = psutil.Process(said["pid"])
        return bool(start_of(process) != said["created"] or process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _claim(folder: Path) -> dict[str, Any]:
    try:
        said: dict[str, Any] = json.loads((folder / PROCESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or one that is being written
        return {}
    return said


def latest_rounds(root: Path) -> Path | None:
    """The folder with the most finished rounds among a run folder and its attempts; None if there is no round."""
    folders = [*reversed(attempts_of(root)), root.absolute()]  # of two with as many rounds, the later one has more
    best = max(folders, key=lambda folder: len(round_folders(folder / "adapters")))
    return best if round_folders(best / "adapters") else None
