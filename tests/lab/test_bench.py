"""Benchmarks run in turn, drop the warm-up, and report medians with spread as JSON."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.bench import Row, Sample, interleaved, judged, missed, ratio, run_parts, write_report
from lab.command.entry import Run, compose_settings
from lab.decode import DecodeSettings
from lab.settings import UserError


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


def test_parts_are_measured_in_order_and_the_report_has_those_before_one_that_fails(tmp_path: Path) -> None:
    settings, place, report = compose_settings("decode", "tracking=none", DecodeSettings), Run(tmp_path), tmp_path / "a"
    report.write_text(json.dumps({"rows": [{"row": "one", "n": 1}, {"row": "old", "n": 2}]}))

    def run(*chosen: str) -> Row:
        parts: dict[str, Callable[[int], Row | list[Row]]] = {
            "one": lambda n: judged("one", {"n": n}, "n at least 9", n >= 9),
            "two": lambda n: [{"n": n}, {"n": n + 1}],
            "bad": lambda n: [{"n": n / 0}],
        }
        return run_parts("toy", parts, chosen, nullcontext(5), settings=settings, place=place, report=report)

    def rows() -> list[tuple[str, int]]:
        return [(row["row"], row["n"]) for row in json.loads(report.read_text())["rows"]]

    assert run("two", "one")["missed"] == 1
    assert rows() == [("old", 2), ("two", 5), ("two", 6), ("one", 5)]
    with pytest.raises(ZeroDivisionError):
        run("one", "bad", "two")
    assert place.so_far is not None
    assert [row["row"] for row in place.so_far()["rows"]] == ["one"]
    assert rows() == [("old", 2), ("one", 5)]
    with pytest.raises(UserError, match=r"^project.parts must be of one, two, bad, got \['none'\]$"):
        run("one", "none")


def test_nothing_is_measured_for_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    settings, place = compose_settings("decode", "tracking=none", DecodeSettings), Run(tmp_path)
    (tmp_path / "file").touch()
    report = tmp_path / "file" / "results" / "a.json"
    with pytest.raises(UserError, match=r"^the working folder must be a folder that can be written, got "):
        run_parts(
            "toy", {"bad": lambda n: 1 / 0}, ["bad"], nullcontext(5), settings=settings, place=place, report=report
        )
