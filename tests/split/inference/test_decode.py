"""Full windows over two shard processes, as a command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from split.decode import main
from tests.in_process import exit_code


@pytest.mark.real
def test_two_shards_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=random", "tracking=none", "project.local_shards=2", "project.context=64", "project.sessions=2",
             "project.max_new_tokens=8"]  # fmt: skip
    assert exit_code(main, *words, f"hydra.run.dir={tmp_path}") == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["context"], last["sessions"], last["prompt_tokens"]) == (64, 2, 56)
    assert last["token_seconds_p50"] > 0
    assert last["tokens_per_second"] > 0
