"""`make bench` over fake benchmarks: everything they found is in both files, and one that fails stops no other."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import pytest

from lab.command.entry import Run, compose_settings
from lab.settings import UserError
from simulations import bench
from simulations.bench_settings import BenchmarkSettings, BenchSettings

ROWS = [
    {"part": "speed", "tokens_per_second": {"median": 12.34, "low": 11.0, "high": 15.0, "n": 3}, "holds": True},
    {"part": "cells", "context": 128, "failure": None, "bytes": 1234567},
    {"part": "cells", "context": 512, "failure": "out of memory"},
    {
        "part": "delay",
        "mode": "sync",
        "rtt_seconds": 0.1,
        "speedup": 1.5,
        "target": "speedup at least 2",
        "holds": False,
    },
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
    found = json.loads(figures["report"].read_text())["benchmarks"]["good_bench"]
    assert figures["report"].name == f"{found['date'][:10]}-{found['commit'] or 'unknown'}.json"
    assert found["rows"] == ROWS
    assert found["machine"]["cores"] == os.cpu_count()
    assert figures["missed"] == 1
    page = figures["results"].read_text().splitlines()
    assert "| tokens_per_second | 12.3 (11.0 – 15.0, n = 3) |" in page
    assert "| holds | yes |" in page
    assert "| context | failure | bytes |" in page
    assert "| 128 | – | 1,234,567 |" in page
    assert "| 512 | out of memory | – |" in page
    assert "`python -m good_bench seed=1`" in page
    assert "1 of 2 rows with a target hold; these do not:" in page
    assert "| [good_bench: delay, sync, 0.1](#good_bench-delay) | speedup at least 2 | speedup 1.50 |" in page
    assert "### good_bench: delay" in page


def test_figures_of_benchmarks_that_are_not_asked_for_stay(modules: Path) -> None:
    both = settings(modules / "benchmarks", "good_bench", "bad_bench")
    with pytest.raises(SystemExit):
        bench.run(both, Run(modules / "run"))
    (modules / "bad_bench.py").write_text((modules / "good_bench.py").read_text().replace("512", "1024"))
    both.project.only = ["bad_bench"]
    (modules / "good_bench.py").unlink()
    found = json.loads(bench.run(both, Run(modules / "run"))["report"].read_text())["benchmarks"]
    assert list(found) == ["good_bench", "bad_bench"]
    assert found["good_bench"]["rows"] == ROWS
    assert found["bad_bench"]["rows"][2]["context"] == 1024


def test_a_benchmark_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match=r"project\.only must name some of engine, .*, got \['slpit'\]"):
        compose_settings("bench", "project.only=[split,slpit]", BenchSettings)


def test_a_benchmark_that_fails_is_named_and_the_others_run(modules: Path) -> None:
    with pytest.raises(SystemExit) as left:
        bench.run(settings(modules / "benchmarks", "bad_bench", "good_bench"), Run(modules / "run"))
    assert left.value.code == 1
    page = (modules / "benchmarks" / "RESULTS.md").read_text()
    assert "**Failed:** ended with code 3" in page
    (modules / "bad_bench.py").write_text((modules / "good_bench.py").read_text() + "raise SystemExit(1)\n")
    with pytest.raises(SystemExit):
        bench.run(settings(modules / "benchmarks", "bad_bench"), Run(modules / "run"))
    page = (modules / "benchmarks" / "RESULTS.md").read_text()
    assert "**Failed:** ended with code 1" in page
    assert "| tokens_per_second |" in page, "what it found stands there all the same"
    assert "12.3 (11.0 – 15.0, n = 3)" in page


def test_what_make_bench_runs_are_commands_with_these_settings() -> None:
    """Each one's words compose, so that an hour does not end in a typo."""
    for benchmark in compose_settings("bench", "", BenchSettings).project.benchmarks:
        module = importlib.import_module(benchmark.command)
        entry = importlib.import_module(f"{benchmark.command}.__main__") if hasattr(module, "__path__") else module
        assert callable(entry.main)


def test_nothing_is_measured_for_a_folder_that_cannot_be_written(modules: Path) -> None:
    (modules / "file").touch()
    with pytest.raises(UserError, match=r"^project\.folder must be a folder that can be written, got "):
        bench.run(settings(modules / "file", "good_bench"), Run(modules / "run"))
    assert not (modules / "run").exists()
