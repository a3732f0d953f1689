"""What takes long and is looked at by several tests is made once, for all test processes of a run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that whoever asks first fills; the others wait for it. One that was not finished is `make`'s own error.

    pytest-xdist's workers are processes, whose temporary folders lie below that of the whole run.
    """
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    finished = folder.with_suffix(".finished")
    with FileLock(folder.with_suffix(".lock")):
        if not finished.exists():
            folder.mkdir()
            make(folder)
            finished.touch()
    return folder
