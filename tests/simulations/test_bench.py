"""`make bench` over fake benchmarks: everything they found is in both files, and one that fails stops no other."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lab.entry import Run, compose_settings
from simulations import bench
from simulations.bench_settings import BenchmarkSettings, BenchSettings

ROWS = [
    {"part": "speed", "tokens_per_second": {"median": 12.34, "low": 11.0, "high": 15.0, "n": 3}, "holds": True},
    {"part": "cells", "context": 128, "failure": None, "bytes": 1234567},
    {"part": "cells", "context": 512, "failure": "out of memory"},
]


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two modules that are found by `python -m`."""
    (tmp_path / "good_bench.py").write_text(f"import json\nprint('...')\nprint(json.dumps({{'rows': {ROWS!r}}}))\n")
    (tmp_path / "bad_bench.py").write_text("raise SystemExit(3)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    return tmp_path


def settings(folder: Path, *modules: str) -> BenchSettings:
    found = compose_settings("bench", f"'project.folder={folder}'", BenchSettings)
    found.project.benchmarks = [BenchmarkSettings(name=m, command=m, overrides=["seed=1"]) for m in modules]
    return found


def test_everything_found_is_in_both_files(modules: Path) -> None:
    figures = bench.run(settings(modules / "benchmarks", "good_bench"), Run(modules / "run"))
    report = json.loads(figures["report"].read_text())
    assert figures["report"].name == f"{report['date']}-{report['commit'] or 'unknown'}.json"
    assert report["benchmarks"]["good_bench"]["rows"] == ROWS
    assert report["machine"]["cores"] == os.cpu_count()
    page = figures["results"].read_text().splitlines()
    assert "| tokens_per_second | 12.3 (11.0 – 15.0, n = 3) |" in page
    assert "| holds | yes |" in page
    assert "| cells | context | failure | bytes |" in page
    assert "| 0 | 128 | – | 1,234,567 |" in page
    assert "| 1 | 512 | out of memory | – |" in page
    assert any(line.startswith("`python -m good_bench seed=1`, ") for line in page)


def test_a_benchmark_that_fails_is_named_and_the_others_run(modules: Path) -> None:
    with pytest.raises(SystemExit) as left:
        bench.run(settings(modules / "benchmarks", "bad_bench", "good_bench"), Run(modules / "run"))
    assert left.value.code == 1
    page = (modules / "benchmarks" / "RESULTS.md").read_text()
    assert "**Failed:** ended with code 3" in page
    assert "12.3 (11.0 – 15.0, n = 3)" in page


def test_what_make_bench_runs_are_commands_with_these_settings() -> None:
    """Each one's words compose, so that an hour does not end in a typo."""
    import importlib

    for benchmark in compose_settings("bench", "", BenchSettings).project.benchmarks:
        assert callable(importlib.import_module(benchmark.command).main)
