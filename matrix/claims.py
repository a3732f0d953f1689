"""Records which sweep is about to run which cells, so that two sweeps in one results folder run none twice.

A sweep holds an operating-system lock on its own file, which is released when its process ends in any way. Next to it,
it lists the cells that it has claimed. A sweep that claims cells reads the lists of all live sweeps, one at a time.
"""

import json
import logging
import os
import platform
import time
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from lab.files import write_whole

log = logging.getLogger(__name__)


class Claims:
    """The runs that one sweep has claimed, as a context manager: leaving it releases those that are left."""

    def __init__(self, results: Path, sweep: Path) -> None:
        """`results`: the folder of the cells; `sweep`: that of the sweep, shown to others."""
        self._folder = results / ".sweeps"
        self._list = self._folder / f"{uuid.uuid4().hex}.json"
        self._alive = FileLock(self._list.with_suffix(".lock"))
        self._all_claims = FileLock(self._folder / "all_claims")
        self._about: dict[str, Any] = {"pid": os.getpid(), "host": platform.node(), "folder": str(sweep)}
        self._about["since"] = time.strftime("%Y-%m-%d %H:%M:%S")
        self._taken: set[str] = set()

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._all_claims:  # else another sweep might find our file before it is locked, and take us for dead
            self._alive.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._all_claims:
            self._list.unlink(missing_ok=True)
            self._alive.release()
            Path(self._alive.lock_file).unlink(missing_ok=True)

    def take(self, signatures: Collection[str]) -> dict[str, str]:
        """Claim these cells, except those that another sweep has claimed: returns them, with the name of that sweep."""
        with self._all_claims:
            others = self._others()
            theirs = {signature: others[signature] for signature in signatures if signature in others}
            if not self._taken.issuperset(free := set(signatures) - set(theirs)):
                self._taken |= free
                self._write()
        return theirs

    def give_back(self, signature: str) -> None:
        """Release a cell that is done."""
        self._taken.discard(signature)
        self._write()

    def _write(self) -> None:
        write_whole(self._list, json.dumps(self._about | {"signatures": sorted(self._taken)}) + "\n")

    def _others(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for file in self._folder.glob("*.lock"):
            listed = file.with_suffix(".json")
            if listed == self._list:
                continue
            if _is_dead(file):
                listed.unlink(missing_ok=True)
                file.unlink(missing_ok=True)
            elif listed.exists():
                try:
                    about = json.loads(listed.read_text(encoding="utf-8"))
                    owner = f"process {about['pid']} on {about['host']}, since {about['since']}, {about['folder']}"
                    found |= dict.fromkeys(about["signatures"], owner)
                except (ValueError, LookupError, TypeError):
                    log.warning("%s is damaged: runs of that sweep may run here, too", listed)
        return found


def _is_dead(lock_file: Path) -> bool:
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    lock.release()
    return True
