"""One text through the whole chain, while its processes are killed. 60 kills are in the soak."""

from __future__ import annotations

from pathlib import Path

from tests.serve.adapters import make_adapter
from tests.serve.kills import chain, kill_at_random


def test_a_shard_the_verifier_and_the_server_are_killed_and_no_text_changes(tmp_path: Path) -> None:
    with chain(tmp_path, make_adapter(tmp_path / "adapter", 0), rtt_seconds=0.05) as behind:
        came = kill_at_random(behind, ["first", "verifier", "server"], seed=1)
    assert (came.texts, came.differing) == (3, 0)
    assert came.returns == 1
