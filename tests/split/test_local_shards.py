"""Shards that do not start: whose fault it is, and where to look."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lab.command import processes
from lab.command.processes import LOG, NotReady
from lab.settings import UserError
from split.chain.local_shards import LocalShards


def _started(module: str, folder: Path, *overrides: str) -> None:
    with LocalShards([range(1)], folder, 60, overrides, module=module):
        pytest.fail("must not start")


def test_a_shard_that_ends_without_a_word_names_its_empty_log(tmp_path: Path) -> None:
    """Nor is that the user's fault, although nothing failed by its exit code."""
    log = re.escape(str(tmp_path / "shard-1" / LOG))
    with pytest.raises(NotReady, match=rf"^shard 1 did not start: it wrote nothing to {log} \(is the disk full\?\)$"):
        _started("lab.command.explain", tmp_path)


def test_a_shard_that_fails_is_not_the_users_fault(tmp_path: Path) -> None:
    with pytest.raises(NotReady, match=r"^shard 1 did not start: .*No module named split\.no_such_module$") as caught:
        _started("split.no_such_module", tmp_path)
    assert caught.value.exit_code == 1


def test_a_shard_that_refuses_its_settings_is_the_users_fault(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^shard 1 did not start: error: project\.layers must be a setting "):
        _started("simulations.link", tmp_path)


def test_what_a_shard_is_doing_is_said_while_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(processes, "SAY_SECONDS", 0.05)
    caplog.set_level("INFO")
    words = ["model=random", f"model.cache_dir={tmp_path}/models", "model.quantization=int4", "tracking=none"]
    with LocalShards([range(0, 2), range(2, 4)], tmp_path, 60, words):
        lines = [record.message for record in caplog.records]
    assert "waiting for shard 1 (layers 0:2)" in lines, "it says nothing before it has begun"
    assert any(line.startswith("waiting for shard 1 (layers 0:2): ") and "INFO" in line for line in lines)
