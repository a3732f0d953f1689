"""Full windows over two shard processes, as a command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.real
def test_two_shards_are_timed(tmp_path: Path) -> None:
    words = ["model=random", "tracking=none", "project.local_shards=2", "project.context=64", "project.sessions=2",
             "project.max_new_tokens=8"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "split.decode", *words], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["context"], last["sessions"], last["prompt_tokens"]) == (64, 2, 56)
    assert last["token_seconds_p50"] > 0
    assert last["tokens_per_second"] > 0
