"""The long fault and fuzz runs: `make soak` (about 20 minutes). Each of them at a small size is a test too.

Writes benchmarks/results/soak-<commit>.json; exit code 1 when a run found something.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lab.bench import write_report
from lab.environment import commit
from tests.speculative.identity import compare_everything
from tests.split.kills import kill_at_random
from tests.wire_fuzz import fuzz, server_process

HOSTILE_FRAMES = 200_000
COMPARED_TOKENS = 50_000
KILLS = 50


def hostile_frames() -> dict[str, Any]:
    """Frames meant to break a listener: no crash, no allocation over the cap, others served throughout."""
    with server_process(handshake_seconds=3) as target:
        report = fuzz(target, frames=HOSTILE_FRAMES, seed=1)
    return {"ok": report.is_harmless(), **asdict(report)}


def speculative_identity() -> dict[str, Any]:
    """Tokens of speculative text that differ from the target's own, float64, all sources and lengths."""
    compared = compare_everything(COMPARED_TOKENS)
    sources = sorted(map(str, compared.sources))
    return {"ok": compared.differing == 0, **asdict(compared), "sources": sources}


def shards_killed() -> dict[str, Any]:
    """One text over three shards, of which one goes at 50 random points: the same tokens, nothing raised."""
    with tempfile.TemporaryDirectory() as folder:
        came = kill_at_random(KILLS, seed=1, folder=Path(folder))
    return {"ok": came.same_tokens, **asdict(came)}


def measured(name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """One run's row; says when it begins and what came of it."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    begin = time.monotonic()
    row = {"run": name, **run(), "seconds": time.monotonic() - begin}
    print(f"{name}: {'ok' if row['ok'] else 'FAILED'} after {row['seconds']:.0f} s", file=sys.stderr, flush=True)
    return row


def main() -> int:
    """All runs in turn."""
    rows = [
        measured("hostile frames", hostile_frames),
        measured("speculative identity", speculative_identity),
        measured("shards killed", shards_killed),
    ]
    path = Path(f"benchmarks/results/soak-{commit() or 'unknown'}.json")
    write_report(path, "soak", rows)
    print(path)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
