"""A benchmark as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def rows_of(module: str, words: Sequence[str], folder: Path, seconds: float) -> dict[str, dict[str, Any]]:
    """Runs it in `folder`; its rows by name, in their order. It counts rightly those that do not hold."""
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.strip().splitlines()[-1])
    rows = {row["row"]: row for row in last["rows"]}
    assert last["missed"] == [row["holds"] for row in rows.values()].count(False)
    return rows
