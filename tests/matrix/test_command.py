"""The command as people type it: last line, exit codes, Ctrl+C, drawing again."""

from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from lab.environment import version
from matrix.__main__ import main
from matrix.grid import sort_overrides
from matrix.results import CellRun
from matrix.supervisor import Outcome
from tests.in_process import exit_code
from tests.matrix.sweeps import ROOT, TRACKING, command, environment, started, sweep_as_command, words_of
from tests.matrix.test_sweep import wait_for_results

MIB = 1 / 1024
WAYS: dict[str, list[Any]] = {"prompt": ["ok", "memory", "hang", "crash"], "seed": [0, 1]}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Cells that need more than their memory limit, that hang, that crash; and two that do what they should."""
    folder = tmp_path_factory.mktemp("sweep")
    limits = ("model.seed=2", f"matrix.memory_limit_gib={300 * MIB}", "matrix.time_limit_seconds=3")
    return folder, sweep_as_command(folder, WAYS, *limits)


@pytest.mark.real
def test_failures_are_results(swept: tuple[Path, dict[str, Any]]) -> None:
    folder, last = swept
    assert (last["status"], last["cells"], last["ok"], last["failed"], last["skipped"]) == ("ok", 8, 2, 6, 0)
    assert [(failure["point"]["prompt"], failure["failure"]) for failure in last["failures"]] == [
        *[("memory", "out of memory")] * 2,
        *[("hang", "time-out")] * 2,
        *[("crash", "error")] * 2,
    ]
    assert last["seconds"] > 0
    with Path(last["results_csv"]).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["ok"] * 2 + ["failed"] * 6
    assert rows[1]["speed"] == "201.0"
    assert rows[1]["speed_n"] == "1"
    assert rows[4]["detail"] == "not done after 3 s"
    assert [Path(plot).name for plot in last["plots"]] == ["speed.png", "end.png"]
    assert all(Path(plot).read_bytes().startswith(b"\x89PNG") for plot in last["plots"])
    page = Path(last["report"]).read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "RuntimeError: boom at 2" in page
    assert "python -m tests.matrix.fake_cell model.seed=2 prompt=hang seed=1" in page
    assert "python run_matrix.py" in page
    assert len(started(folder)) == 8


@pytest.mark.real
def test_a_sweep_is_drawn_again_and_compared(
    swept: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, last = swept
    monkeypatch.chdir(folder)
    sweep = str(Path(last["sweep"]).parent)
    for plot in last["plots"]:
        Path(plot).unlink()
    assert exit_code(main, *words_of(folder, WAYS, f"matrix.plot={sweep}", f"matrix.compare={sweep}")) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (again["cells"], again["ok"], again["failed"], again["skipped"]) == (8, 2, 6, 8)
    names = ["speed.png", "speed_ratio.png", "end.png", "end_ratio.png"]
    assert [Path(plot).name for plot in again["plots"]] == names
    assert "compared with" in Path(again["report"]).read_text()
    assert len(started(folder)) == 8, "drawing runs nothing"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["matrix.plot=nowhere"], "matrix.plot must be the folder of a sweep, with the results in its sweep.json"),
        (["matrix.compare=nowhere"], "matrix.compare must be the folder of a sweep"),
        (["matrix.plot=bad"], "matrix.plot must be the folder of a sweep, with the results in its sweep.json"),
        (["seed=1,2", "seed=3"], "seed must be given once where it is an axis, got 'seed=3', too"),
        (["project.matrix_sze=1,2"], "project.matrix_sze must be a setting (did you mean project.matrix_size?)"),
        (["matrix.command="], "matrix.command must be a module, got '' ("),
        (["matrix.command=.x"], "matrix.command must be a module, got '.x' ("),
        (["matrix.sources=[.x]"], "matrix.sources must name packages, got '.x'"),
        (["matrix.overrides=[{a:1}]"], "matrix.overrides must be a list, each text, got [{'a': 1}]"),
        (["matrix.axes.seed=[{a:1}]"], "seed must be an integer, got {'a': 1}"),
        (["project.matrix_size=64,${nope}"], "project.matrix_size must not refer to what cannot be read, got: "),
        (["prompt=-"], "prompt must be readable UTF-8 text, got '-' ("),
        (["prompt=\udcff"], "arguments must be UTF-8 text, got 'prompt=\\udcff'"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "sweep.json").write_text('{"sweep": {"metrics": [1]}, "results": [{"point": []}]}')
    assert exit_code(main, *words_of(tmp_path, {"seed": [1]}, *words)) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {message}")
    assert len(errors.splitlines()) == 1


def test_a_prompt_of_standard_input_is_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = io.BytesIO(b"\xef\xbb\xbfcaf\xc3\xa9\r\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(given, encoding="cp1252"))
    assert sort_overrides(["prompt=-"]).cells == ["prompt=café\r\n"]


def test_the_version_is_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(main, "--version") == 0
    assert capsys.readouterr().out == version() + "\n"


def test_whatever_ends_a_sweep_the_report_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk is full after the first of three cells; no picture can be drawn."""
    keep = CellRun.keep

    def keep_once(run: CellRun, outcome: Outcome, command: str) -> dict[str, Any]:
        if list(tmp_path.glob("results/matrix/*/result.json")):
            raise OSError(28, "No space left on device")
        return keep(run, outcome, command)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CellRun, "keep", keep_once)
    monkeypatch.setattr("matrix.plots._picture", lambda *_: 1 / 0)
    words = words_of(tmp_path, {"model.seed": [1, 2, 3]}, f"hydra.run.dir={tmp_path}/sweep")
    assert exit_code(main, *words) == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["ended_by"], last["ok"], last["not_run"]) == ("disk_full", 1, 2)
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert "speed.png could not be drawn (ZeroDivisionError: division by zero)" in page
    assert page.count("not run") >= 2
    assert len((tmp_path / "sweep" / "results.csv").read_text().splitlines()) == 4
    assert exit_code(main, *words_of(tmp_path, {}, f"matrix.plot={tmp_path}/sweep")) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["cells"], last["ok"], last["failed"], last["not_run"]) == (3, 1, 0, 2)
    assert (last["plots"], len(last["not_drawn"])) == ([], 2)


def test_what_was_measured_is_in_the_last_line_where_no_report_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("matrix.drawing.write_whole", full)
    assert exit_code(main, *words_of(tmp_path, {"model.seed": [1, 2]}, f"hydra.run.dir={tmp_path}/sweep")) == 1
    said = capsys.readouterr()
    last = json.loads(said.out.splitlines()[-1])
    assert (last["ended_by"], last["cells"], last["ok"], last["not_run"]) == ("disk_full", 2, 2, 0)
    assert [row["model.seed"] for row in last["rows"]] == [1, 2]
    assert not {"sweep", "results_csv", "report"} & last.keys(), "there are no such files"
    assert "Traceback" not in said.err


@pytest.mark.real
def test_how_a_model_is_stored_can_be_an_axis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cells that run the real command, with packed weights in between."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    axes = ("model.quantization=none,int8,int4", "project.context=32", "project.sessions=1", "project.max_new_tokens=4")
    words = ("matrix=decode", "model=random", f"model.cache_dir={tmp_path}/cache", "device.compile=false")
    assert exit_code(main, *words, *axes, "device.threads=1", *TRACKING) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["cells"], last["ok"]) == (3, 3)
    with Path(last["results_csv"]).open() as file:
        assert [row["model.quantization"] for row in csv.DictReader(file)] == ["none", "int8", "int4"]
    kinds = {path.name.rpartition("-")[2] for path in (tmp_path / "cache").glob("*-float32*") if path.is_dir()}
    assert kinds == {"float32", "int8", "int4"}, "each cell had its own weights"


@pytest.mark.real
def test_as_a_process_it_ends_with_code_2(tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path, {"seed": [1]}, "matrix.plot=nowhere"), cwd=tmp_path, env=environment(tmp_path),
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: matrix.plot must be the folder of a sweep")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.real
def test_ctrl_c_keeps_what_is_finished_and_leaves_nothing_behind(tmp_path: Path) -> None:
    axes = {"prompt": ["ok", "hang"]}
    sweep = subprocess.Popen(
        command(tmp_path, axes, "model.seed=2"), cwd=tmp_path, env=environment(tmp_path),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for_results(tmp_path / "results" / "matrix", 1)
    while len(started(tmp_path)) < 2:
        assert sweep.poll() is None
    family = psutil.Process(sweep.pid).children(recursive=True)
    assert len(family) >= 2, "a supervisor and its cell"
    sweep.send_signal(signal.SIGINT)
    out, errors = sweep.communicate(timeout=60)
    assert sweep.returncode == 130, errors
    assert "Traceback" not in errors
    last = json.loads(out.splitlines()[-1])
    assert (last["status"], last["ok"], last["failed"], last["not_run"]) == ("failed", 1, 0, 1)
    assert "the sweep was interrupted" in Path(last["report"]).read_text()
    assert Path(last["results_csv"]).read_text().count("not run") == 2
    assert all(Path(plot).exists() for plot in last["plots"])
    assert not psutil.wait_procs(family, timeout=10)[1]
    (result,) = (tmp_path / "results" / "matrix").glob("*/result.json")
    assert json.loads(result.read_text())["figures"]["speed"] == 200.0
