"""A toy-size run of the benchmark, so that it does not rot. No time is asserted: the machine is shared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.split.bench.benchmark import rows_of

SIZES = [
    "project.cut=2", "project.placements=[1,2]", "project.context=256", "project.prompt_tokens=64",
    "project.prefill_chunk=16", "project.repeats=1", "project.new_tokens=3", "project.rtt_seconds=[0.0,0.2]",
    "project.added_tokens=3", "project.added_repeats=1",
    "project.perplexity_tokens=40", "project.speculation_tokens=40",
    "project.memory_model.hidden_size=1024", "project.memory_model.intermediate_size=2048",
    "project.memory_model.head_dim=64",
]  # fmt: skip


PARTS = (
    *("added_tcp", "link", "prefill", "batch", "plan", "boundary", "times"),
    *("speculation", "added_rpc", "memory"),
)


@pytest.mark.real
@pytest.mark.timeout(600)
def test_every_part_runs(tmp_path: Path) -> None:
    """One run, whose parts share their shards."""
    rows = _rows(tmp_path)
    slow, fast = rows["link"]["token_seconds"][1], rows["link"]["token_seconds"][0]
    assert slow - fast > 0.5 * 0.2, "the link's delay is in no token's time"
    assert rows["batch"]["texts_identical"]
    assert rows["boundary"]["holds"]
    assert rows["boundary"]["perplexity_change"]["float32"] == 0 != rows["boundary"]["perplexity_change"]["int8"]
    assert [placement["cut"] for placement in rows["plan"]["placements"]] == [1, 2]
    assert rows["speculation"]["texts_identical"]
    assert 0.2 < rows["speculation"]["alpha"] < 1, "some of so few guesses are right, some are wrong"
    assert rows["speculation"]["drafted_over_alone"] > 1
    assert rows["added_rpc"]["rpc_token_seconds"]["low"] > 0
    memory = rows["memory"]
    assert memory["holds"]
    assert all(memory["model_bytes"] > shard["limit_bytes"] for shard in memory["shards"]), "all of it would fit, too"
    assert memory["model_bytes"] > 3e8


def _rows(folder: Path) -> dict[str, dict[str, Any]]:
    words = ["model=random", f"model.cache_dir={folder}/models", "tracking=none", *SIZES]
    words += [f"project.parts=[{','.join(PARTS)}]", "project.report=all.json"]
    rows = rows_of("split.bench", words, folder, seconds=560)
    assert tuple(rows) == PARTS
    assert {row["row"] for row in json.loads((folder / "all.json").read_text())["rows"]} >= set(PARTS)
    assert all(row["target"] and row["holds"] in (True, False) for row in rows.values())
    return rows
