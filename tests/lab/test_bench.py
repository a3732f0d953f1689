"""Benchmarks run in turn, drop the warm-up, and report medians with spread as JSON."""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.bench import Sample, interleaved, judged, missed, ratio, write_report


@given(st.lists(st.floats(-1e9, 1e9), min_size=1))
def test_sample(readings: list[float]) -> None:
    assert Sample.of(readings) == Sample(statistics.median(readings), min(readings), max(readings), len(readings))


def test_sample_of_nothing() -> None:
    with pytest.raises(ValueError, match="readings must hold at least one figure, got none"):
        Sample.of([])


def test_cases_run_in_turn_and_warm_up_is_dropped() -> None:
    calls: list[str] = []

    def case(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    readings = interleaved({"a": lambda: case("a"), "b": lambda: case("b")}, warmup=2, repeats=3)
    assert calls == ["a", "b"] * 5
    assert readings == {"a": [5.0, 7.0, 9.0], "b": [6.0, 8.0, 10.0]}


def test_wall_clock_where_a_case_returns_nothing() -> None:
    readings = interleaved({"sleep": lambda: time.sleep(0.02)}, warmup=0, repeats=2)
    assert all(0.02 <= seconds < 5 for seconds in readings["sleep"])


def test_ratio_is_taken_turn_by_turn() -> None:
    slow_machine = [1.0, 10.0, 100.0]
    assert ratio([2 * reading for reading in slow_machine], slow_machine) == Sample(2.0, 2.0, 2.0, 3)
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0], [1.0, 2.0])


@dataclass(frozen=True)
class Case:
    size: int


def test_report(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.json"
    rows = [
        {"case": Case(3), "seconds": Sample.of([1.0, 3.0]), "nested": {"ratio": ratio([1.0], [2.0])}, "bad": math.nan}
    ]
    document = write_report(path, "toy", rows)
    assert json.loads(path.read_text()) == document
    assert document["benchmark"] == "toy"
    assert document["rows"] == [
        {
            "case": {"size": 3},
            "seconds": {"median": 2.0, "low": 1.0, "high": 3.0, "n": 2},
            "nested": {"ratio": {"median": 0.5, "low": 0.5, "high": 0.5, "n": 1}},
            "bad": "nan",
        }
    ]
    assert {"date", "commit", "versions", "machine"} <= document.keys()


def test_what_a_row_was_to_show_stands_in_it_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lab.bench")
    assert judged("frame", {"n": 3}, "n at least 4", 3 >= 4) == {"n": 3, "target": "n at least 4", "holds": False}
    assert caplog.messages == ["frame: DOES NOT HOLD (n at least 4)"]


def test_rows_that_miss_their_target_are_counted() -> None:
    rows = [judged("a", {}, "n", holds) for holds in (True, False, False)]
    assert missed([*rows, {"part": "not judged"}]) == 2
