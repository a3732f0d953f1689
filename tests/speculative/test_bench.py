"""The benchmark runs, at toy size; the formulas are those of the papers. No time is asserted: machines are shared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab.entry import Run, compose_settings
from speculative import bench
from speculative.settings import SpeculativeSettings
from speculative.theory import expected_tokens, sync_speedup


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


def test_formulas() -> None:
    assert expected_tokens(0.0, 5) == 1
    assert expected_tokens(1.0, 5) == 6
    assert expected_tokens(0.5, 3) == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    times = {"step_seconds": 0.04, "row_seconds": 0.0008, "draft_step_seconds": 0.004}
    # The table of synchronous speed-ups at the best k: 2.31, 1.78, 1.35, 0.97 for acceptance 0.8.
    best = [max(sync_speedup(0.8, k, rtt_seconds=rtt, **times) for k in range(1, 20)) for rtt in (0.0, 0.02, 0.05, 0.1)]
    assert best == pytest.approx([2.31, 1.78, 1.35, 0.98], abs=0.01)
