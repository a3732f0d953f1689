"""Kills at random points, the small size of the soak."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.split.kills import kill_at_random


def test_four_kills_at_random_points_change_no_token(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    came = kill_at_random(4, seed=2, folder=tmp_path)
    assert came.same_tokens
    assert came.recoveries >= 4 - 1, "two kills may fall into one recovery"
