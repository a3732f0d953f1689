"""A sweep runs what is missing, keeps every result, and goes on where it was cut off."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lab.tracking import Wandb
from matrix.results import Result
from matrix.sweep import seconds_left
from tests.matrix.sweeps import command, environment, started, sweep_here

SIZES: dict[str, list[Any]] = {"model.seed": [1, 2, 3]}


@pytest.fixture(autouse=True)
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def speeds(results: list[Result]) -> list[float]:
    return [result["figures"]["speed"] for result in results]


def test_a_result_says_all_of_a_run(tmp_path: Path) -> None:
    sweep = sweep_here(tmp_path, SIZES)
    assert speeds(sweep.document["results"]) == [100.0, 200.0, 300.0]
    first = sweep.document["results"][0]
    file = tmp_path / "cells" / first["signature"] / "result.json"
    assert {"point": {"model.seed": 1}, **json.loads(file.read_text())} == first
    assert "point" not in json.loads(file.read_text()), "that is the sweep's, not the cell's"
    assert (first["status"], first["failure"], first["point"]) == ("ok", None, {"model.seed": 1})
    assert first["settings"]["model"]["seed"] == 1
    assert first["commit"] == "abc", "the cell's own, which may have run elsewhere"
    assert first["versions"]["torch"]
    assert first["device"].startswith("cpu")
    assert first["seconds"] > 0
    assert first["peak_rss_bytes"] > 0
    assert not {"status", "run_folder", "commit"} & set(first["figures"])
    assert sweep.skipped == 0


def test_only_what_is_missing_or_changed_runs(tmp_path: Path) -> None:
    sweep_here(tmp_path, SIZES)
    again = sweep_here(tmp_path, SIZES)
    assert again.skipped == 3
    assert speeds(again.document["results"]) == [100.0, 200.0, 300.0]
    assert started(tmp_path) == ["ok 1 0", "ok 2 0", "ok 3 0"]
    more = sweep_here(tmp_path, {"model.seed": [3, 4]})
    assert (more.skipped, started(tmp_path)[3:]) == (1, ["ok 4 0"])
    assert sweep_here(tmp_path, SIZES, "seed=1").skipped == 0
    assert len(started(tmp_path)) == 7


def test_repeats_are_interleaved(tmp_path: Path) -> None:
    sweep = sweep_here(tmp_path, SIZES, "matrix.repeats=2")
    assert started(tmp_path) == ["ok 1 0", "ok 2 0", "ok 3 0"] * 2
    assert [result["repeat"] for result in sweep.document["results"]] == [0, 0, 0, 1, 1, 1]
    assert sweep_here(tmp_path, SIZES, "matrix.repeats=3").skipped == 0, "each cell has a run to do"
    assert len(started(tmp_path)) == 9


def test_a_failed_cell_is_a_result_and_is_retried_when_asked(tmp_path: Path) -> None:
    axes = {"prompt": ["crash", "ok"]}
    first = sweep_here(tmp_path, axes, "model.seed=2")
    assert [result["status"] for result in first.document["results"]] == ["failed", "ok"]
    assert first.document["results"][0]["detail"] == "RuntimeError: boom at 2"
    assert sweep_here(tmp_path, axes, "model.seed=2").skipped == 2
    assert sweep_here(tmp_path, axes, "model.seed=2", "matrix.retry_failed=true").skipped == 1
    assert started(tmp_path) == ["crash 2 0", "ok 2 0", "crash 2 0"]


def test_a_result_that_is_no_json_runs_again(tmp_path: Path) -> None:
    sweep = sweep_here(tmp_path, SIZES)
    (tmp_path / "cells" / sweep.document["results"][1]["signature"] / "result.json").write_text('{"status": "o')
    assert sweep_here(tmp_path, SIZES).skipped == 2
    assert started(tmp_path)[3:] == ["ok 2 0"]


class FailingWandb:
    def __init__(self, *arguments: Any) -> None:
        raise ConnectionError("no way to wandb.ai")


def test_weights_and_biases_changes_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each cell is a run of one group; where W&B fails or is missing, the figures are the same."""
    told: list[tuple[str, dict[str, Any]]] = []

    class Recording:
        def __init__(self, settings: Any, group: str, folder: Path) -> None:
            self._group = settings.tracking.wandb_group or group
            assert settings.cell["model"]["seed"] >= 1

        def write(self, row: dict[str, Any]) -> None:
            told.append((self._group, row))

        def close(self) -> None: ...

    def swept(name: str, sink: Any) -> list[float]:
        monkeypatch.setattr("lab.tracking.Wandb", sink)
        (tmp_path / name).mkdir()
        return speeds(sweep_here(tmp_path / name, SIZES, *offline).document["results"])

    offline = ("tracking.wandb=offline",)
    monkeypatch.setattr("tests.matrix.sweeps.TRACKING", ())
    assert swept("recorded", Recording) == swept("failing", FailingWandb) == [100.0, 200.0, 300.0]
    assert [(group, row["speed"], row["status"]) for group, row in told] == [
        ("matrix-fake-sweep", speed, "ok") for speed in (100.0, 200.0, 300.0)
    ]
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert swept("missing", Wandb) == [100.0, 200.0, 300.0]


def test_the_time_left_is_the_mean_of_those_done() -> None:
    assert seconds_left([2.0, 4.0], runs=7, at_once=1) == 15.0
    assert seconds_left([2.0, 4.0], runs=7, at_once=2) == 9.0
    assert seconds_left([2.0], runs=1, at_once=1) == 0.0


def wait_for_results(cells: Path, count: int, deadline_seconds: float = 120.0) -> None:
    deadline = time.monotonic() + deadline_seconds
    while len(list(cells.glob("*/result.json"))) < count:
        assert time.monotonic() < deadline, "no results"
        time.sleep(0.005)


@pytest.mark.real
def test_killed_at_any_moment_it_loses_and_repeats_nothing(tmp_path: Path) -> None:
    """SIGKILL as soon as so many results are there, twice; then to the end. Results stay as they were, byte by byte."""
    axes: dict[str, list[Any]] = {"model.seed": list(range(1, 13))}
    cells, kept, cut_off = tmp_path / "results" / "matrix", dict[Path, bytes](), set[int]()
    for count in (3, 8):
        sweep = subprocess.Popen(
            command(tmp_path, axes), cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for_results(cells, count)
        sweep.kill()
        sweep.wait()
        for file in cells.glob("*/result.json"):
            assert json.loads(file.read_bytes())["status"] == "ok"
            assert kept.setdefault(file, file.read_bytes()) == file.read_bytes()
        assert len(kept) >= count
        sizes = {json.loads(content)["settings"]["model"]["seed"] for content in kept.values()}
        cut_off |= {int(line.split()[1]) for line in started(tmp_path)} - sizes
    last = sweep_here(tmp_path, axes, f"matrix.results={cells}")
    assert [result["status"] for result in last.document["results"]] == ["ok"] * 12
    assert last.skipped >= len(kept)
    assert all(file.read_bytes() == content for file, content in kept.items())
    assert len(started(tmp_path)) <= 12 + 2, "at most the one cell that each kill cut off runs again"
    for content in kept.values():
        size = json.loads(content)["settings"]["model"]["seed"]
        assert started(tmp_path).count(f"ok {size} 0") == 1 or size in cut_off, "a finished cell ran again"
