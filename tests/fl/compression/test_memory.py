"""A site's memory on its disk: what it removes, and what it never touches."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fl.compression.memory import ERROR, SiteMemory
from lab.settings import UserError

LONG_AGO = 1.0


def test_a_site_that_has_gone_further_refuses_an_older_round(tmp_path: Path) -> None:
    """Its error feedback would begin at zero, and the run would end with other bytes and nothing said."""
    memory = SiteMemory(tmp_path, "ab12", 0, keep_days=1)
    memory.write({ERROR: {9: torch.ones(3), 10: torch.ones(3)}})
    assert torch.equal(memory.error_after(9, 3), torch.ones(3))
    with pytest.raises(UserError, match=r"project\.resume must be the newest continuation .* at round 5"):
        memory.error_after(5, 3)
    assert not memory.error_after(12, 3).any(), "a folder that was lost begins anew"


def test_only_what_old_runs_left_is_removed(tmp_path: Path) -> None:
    """The setting may name a folder that holds other things."""
    thesis = tmp_path / "thesis"
    (thesis / "site-plans").mkdir(parents=True)
    (thesis / "chapter-1.tex").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "linked").symlink_to(thesis)
    old = SiteMemory(tmp_path, "ab12", 0, keep_days=1)
    old.write({ERROR: {1: torch.ones(3)}})
    (old.folder / "site-0-adapter").mkdir()
    for path in (thesis, tmp_path / "empty", tmp_path / "notes.txt", old.folder):
        os.utime(path, (LONG_AGO, LONG_AGO))
    new = SiteMemory(tmp_path, "cd34", 0, keep_days=1)
    new.write({ERROR: {1: torch.ones(3)}})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cd34",
        "empty",
        "gone",
        "linked",
        "notes.txt",
        "thesis",
    ]
    assert sorted(path.name for path in thesis.iterdir()) == ["chapter-1.tex", "site-plans"]
    assert SiteMemory(tmp_path, "cd34", 0, keep_days=1).vector(ERROR, 1) is not None
