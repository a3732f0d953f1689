"""Kills at random points, the small size of the soak."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from split.sharded_model import ShardedModel
from tests.split.kills import kill_at_random


def test_four_kills_at_random_points_change_no_token(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    came = kill_at_random(4, seed=2, folder=tmp_path)
    assert came.same_tokens
    assert came.recoveries >= 4 - 1, "two kills may fall into one recovery"


def test_a_journal_that_is_off_by_one_fails_the_same_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    rebuild = ShardedModel._rebuild

    def shifted(engine: ShardedModel, journal: Any) -> None:
        right = journal.ids
        journal.ids = [*right[1:], *right[:1]]
        rebuild(engine, journal)
        journal.ids = right

    monkeypatch.setattr(ShardedModel, "_rebuild", shifted)
    assert not kill_at_random(2, seed=2, folder=tmp_path).same_tokens
