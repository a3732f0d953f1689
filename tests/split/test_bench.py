"""A toy-size run of the benchmark, so that it does not rot. No time is asserted: the machine is shared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.real
def test_every_part_runs(tmp_path: Path) -> None:
    words = [
        "model=random", f"model.cache_dir={tmp_path}/models", "project.cut=2", "project.context=256",
        "project.prompt_tokens=64", "project.prefill_chunk=16", "project.repeats=1", "project.new_tokens=3",
        "project.rtt_seconds=[0.0,0.05]",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "split.bench", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    rows = {row["row"]: row for row in json.loads(done.stdout.strip().splitlines()[-1])["rows"]}
    assert set(rows) == {"added", "link", "prefill", "batch", "plan"}
    slow, fast = rows["link"]["token_seconds"][1], rows["link"]["token_seconds"][0]
    assert slow - fast > 0.5 * 0.05, "the link's delay is in no token's time"
