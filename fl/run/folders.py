"""The folders of a run: one per finished round, and one per attempt of a run that `fl.run` watches."""

import json
import os
import re
from pathlib import Path

import psutil

from lab.files import write_whole

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


def say_process(folder: Path) -> None:
    """Write into a run's folder which process runs it, for `process_is_gone`."""
    write_whole(folder / PROCESS, json.dumps({"pid": os.getpid(), "created": psutil.Process().create_time()}))


def process_is_gone(folder: Path) -> bool:
    """Whether the process of the run in this folder has begun, and is there no more. Flower itself notices that after a
    minute without heartbeats."""
    try:
        said = json.loads((folder / PROCESS).read_text(encoding="utf-8"))
        process = psutil.Process(said["pid"])
        return bool(process.create_time() != said["created"] or process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
    except (OSError, ValueError):  # not begun
        return False


def latest_rounds(root: Path) -> Path | None:
    """The folder with the most finished rounds among a run folder and its attempts; None if there is no round."""
    folders = [*reversed(attempts_of(root)), root.absolute()]  # of two with as many rounds, the later one has more
    best = max(folders, key=lambda folder: len(round_folders(folder / "adapters")))
    return best if round_folders(best / "adapters") else None
