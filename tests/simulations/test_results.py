"""The page of results: made of the reports alone, the newest figures, and nothing typed by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from lab.command.entry import compose_settings
from simulations.bench_settings import BenchmarkSettings, BenchSettings
from simulations.results import results_page

ROOT = Path(__file__).resolve().parents[2]
ONE = [BenchmarkSettings(name="one", command="a.module", overrides=["seed=1"])]


def report(folder: Path, date: str, rows: list[dict[str, Any]], failure: str | None = None) -> None:
    machine = {"cores": 2, "processor": "A CPU", "system": "Linux"}
    done = {"command": "python -m an.older.name", "date": f"{date} 10:00:00", "commit": "abc", "machine": machine}
    done |= {"seconds": 60.0, "load_average": 0.5, "failure": failure, "rows": rows}
    (folder / f"{date}-abc.json").write_text(json.dumps({"benchmarks": {"one": done}}))


def test_the_committed_page_is_what_the_reports_make() -> None:
    benchmarks = compose_settings("bench", "", BenchSettings).project.benchmarks
    page = (ROOT / "benchmarks/RESULTS.md").read_text(encoding="utf-8")
    assert page == results_page(benchmarks, ROOT / "benchmarks/results"), "python -m simulations.results draws it again"


def test_newer_figures_take_the_place_of_older_ones(tmp_path: Path) -> None:
    report(tmp_path, "2026-01-02", [{"part": "speed", "seconds": 2.0}])
    report(tmp_path, "2026-01-01", [{"part": "speed", "seconds": 1.0}])
    page = results_page(ONE, tmp_path)
    assert "| seconds | 2.00 |" in page
    assert "| seconds | 1.00 |" not in page
    assert "`python -m a.module seed=1`" in page, "the command of today, not of the day of measuring"


def test_what_rows_share_is_said_once_and_lists_of_rows_are_tables(tmp_path: Path) -> None:
    rows = [{"part": "speed", "mode": "sync", "delay": n, "seconds": n / 2} for n in (1, 2)]
    nested = {"part": "shards", "shards": [{"layers": "0:2", "bytes": 1000}, {"layers": "2:4", "bytes": 2000}]}
    report(tmp_path, "2026-01-01", [*rows, nested])
    lines = results_page(ONE, tmp_path).splitlines()
    assert "mode sync" in lines
    assert lines[lines.index("mode sync") + 2 :][:3] == ["| delay | seconds |", "| --- | --- |", "| 1 | 0.500 |"]
    assert "| 2:4 | 2,000 |" in lines


def test_soak_runs_stand_behind_the_benchmarks_but_for_those_that_are_one(tmp_path: Path) -> None:
    report(tmp_path, "2026-01-03", [{"part": "kills", "holds": True, "target": "none"}])
    runs = [{"run": "kills", "ok": False, "target": "none"}, {"run": "fuzz", "ok": True, "frames": 1000}]
    runs += [{"run": "slow", "ok": False, "ratio": 0.5, "target": "ratio at most 0.4; a page that holds"}]
    soak = {"date": "2026-01-03", "commit": "def", "rows": runs}
    (tmp_path / "soak-def.json").write_text(json.dumps(soak))
    page = results_page(ONE, tmp_path)
    assert "### soak: fuzz\n\n2026-01-03, commit def" in page
    assert "| frames | 1,000 |" in page
    assert "soak: kills" not in page, "the benchmark is as new"
    assert "1 of 2 rows with a target hold" in page
    assert "| [soak: slow](#soak-slow) | ratio at most 0.4; a page that holds | ratio 0.500 |" in page
    (tmp_path / "soak-def.json").write_text(json.dumps(soak | {"date": "2026-01-04"}))
    assert "[soak: kills](#soak-kills)" in results_page(ONE, tmp_path), "it is newer"


def test_it_takes_no_settings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "simulations.results", "project.folder=elsewhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "unrecognized arguments: project.folder=elsewhere" in done.stderr
