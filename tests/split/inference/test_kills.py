"""SIGKILL of shard processes at random points, the small size of the soak."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from split.inference.sharded_model import ShardedModel
from tests.split.forked import ForkedShards
from tests.split.inference.kills import kill_at_random, settings_of


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def processes(cache: Path) -> Iterator[ForkedShards]:
    torch.set_num_threads(1)
    with ForkedShards(str(cache)) as forked:
        yield forked


@pytest.mark.real
def test_four_kills_at_random_points_change_no_token(cache: Path, processes: ForkedShards) -> None:
    came = kill_at_random(4, 2, settings_of(str(cache)), processes)
    assert came.same_tokens
    assert came.recoveries == came.kills == 4
    assert came.slowest_detection_seconds <= 2.0


@pytest.mark.real
def test_a_journal_that_is_off_by_one_fails_the_same_comparison(
    cache: Path, processes: ForkedShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    rebuild = ShardedModel._rebuild

    def shifted(engine: ShardedModel, journal: Any, deadline: float) -> None:
        right = journal.ids
        journal.ids = [*right[1:], *right[:1]]
        rebuild(engine, journal, deadline)
        journal.ids = right

    monkeypatch.setattr(ShardedModel, "_rebuild", shifted)
    assert not kill_at_random(2, 2, settings_of(str(cache)), processes).same_tokens
