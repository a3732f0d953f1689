"""The benchmark runs, at toy size. No time is asserted: machines are shared."""

from __future__ import annotations

import json
from pathlib import Path

from lab.entry import Run, compose_settings
from speculative import bench
from speculative.settings import SpeculativeSettings


def _settings(*words: str) -> SpeculativeSettings:
    return compose_settings("spec_decoding", " ".join(("tracking=none", *words)), SpeculativeSettings)


def test_every_row_is_there(tmp_path: Path) -> None:
    settings = _settings(
        "project.bench.rtt_seconds=[0.0,0.03]",
        "project.bench.draft_lengths=[3]",
        "project.bench.new_tokens=12",
        "project.bench.repeats=2",
        "project.bench.frame_rounds=20",
        "project.synthetic.step_seconds=0.01",
    )
    result = bench.run(settings, Run(tmp_path))
    rows = result["rows"]
    assert [(row["row"], row.get("mode"), row.get("rtt_seconds")) for row in rows] == [
        ("sync", "target_only", 0.0),
        ("sync", "target_only", 0.03),
        ("sync", "sync", 0.0),
        ("sync", "sync", 0.03),
        ("frame", None, None),
    ]
    for row in rows[:4]:
        assert row["tokens_per_second"]["n"] == row["n"] == 2
        assert 0 < row["formula_over_measured"]["median"] < 1.05, "faster than its own formula"
        assert 0 < row["formula_over_median_round"]["median"] < 1.05
    assert rows[3]["tokens_per_second"]["median"] < rows[2]["tokens_per_second"]["median"], "the delay was not there"
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == rows
    assert rows[-1]["frame_seconds"] > 0
