"""Every figure reaches metrics.jsonl; Weights & Biases, absent or broken, changes nothing."""

from __future__ import annotations

import json
import logging
import math
import os
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lab.command.entry import compose_settings
from lab.doctor import DoctorSettings
from lab.tracking import Tracker, finite, picture, progress

FIGURES = {
    "status": "ok",
    "eval_loss": 1.25,
    "rounds": 3,
    "by_round": [3.0, 2.0],
    "nested": {"p50": 1, "name": "x"},
    "nothing": None,
    "place": Path("/tmp/a"),
    "flag": True,
}
PLAIN = FIGURES | {"place": "/tmp/a"}


def settings(wandb: str) -> DoctorSettings:
    return compose_settings("doctor", f"model=random tracking.wandb={wandb}", DoctorSettings)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line, parse_constant=pytest.fail) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def track(folder: Path, wandb: str) -> None:
    """What a pillar does: two steps and the result."""
    with Tracker(settings(wandb), "test", folder) as tracker:
        tracker.log(1, loss=2.0)
        tracker.log(2, loss=1.0, losses={"a": 0.5})
        tracker.result(FIGURES)


def check_jsonl(folder: Path) -> None:
    first, second, result = rows(folder)
    assert (first["step"], first["loss"], second["step"], second["losses"]) == (1, 2.0, 2, {"a": 0.5})
    assert result.items() >= {"result": True}.items()
    assert {key: result[key] for key in PLAIN} == PLAIN


def test_jsonl_holds_every_figure(tmp_path: Path) -> None:
    track(tmp_path / "new", "disabled")
    check_jsonl(tmp_path / "new")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["metrics.jsonl"]


def test_rows_are_on_disk_at_once_and_a_second_run_appends(tmp_path: Path) -> None:
    with Tracker(settings("disabled"), "test", tmp_path) as tracker:
        tracker.log(1, loss=2.0)
        assert len(rows(tmp_path)) == 1
    with Tracker(settings("disabled"), "test", tmp_path) as tracker:
        tracker.log(2, loss=1.0)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_a_full_disk_is_one_warning_and_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The limit on a file's size is the disk that is full, and later is not."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Tracker(settings("disabled"), "test", tmp_path) as tracker:
        tracker.log(1, loss=2.0)
        size = (tmp_path / "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))
        try:
            tracker.log(2, loss=1.5)
            tracker.log(3, loss=1.5)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert (tmp_path / "metrics.jsonl").stat().st_size == size
        tracker.log(4, loss=1.0)
    assert [row["step"] for row in rows(tmp_path)] == [1, 4]
    assert [message.partition(":")[0] for message in caplog.messages] == ["metrics.jsonl lacks rows"]


def test_metrics_that_cannot_be_opened_change_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    track(tmp_path / "file" / "run", "disabled")
    assert len(caplog.messages) == 1


def test_a_picture_that_cannot_be_drawn_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> Path:
        raise ValueError("no such colour")

    assert picture(fail) == []
    assert caplog.messages == ["a picture is missing (ValueError: no such colour)"]
    assert picture(lambda: tmp_path) == [tmp_path]


def test_non_finite_figures_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), Tracker(settings("disabled"), "test", tmp_path) as tracker:
        tracker.log(1, loss=math.nan, fine=1.0)
        tracker.log(2, loss=math.inf, by_client={"a": [-math.inf]})
    assert [(row["loss"], row.get("by_client")) for row in rows(tmp_path)] == [("nan", None), ("inf", {"a": ["-inf"]})]
    assert [message.split(" is not finite")[0] for message in caplog.messages] == ["loss", "by_client"]


def test_finite_leaves_the_rest_alone() -> None:
    value = {"a": [1, 2.5, None, "nan", True], "b": {"c": 0.0}}
    assert finite(value) == value


def test_wandb_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    track(tmp_path, "offline")
    check_jsonl(tmp_path)
    assert len(caplog.messages) == 1
    assert "Weights & Biases is off for this run (ModuleNotFoundError" in caplog.text


class FakeRun:
    """A W&B run that breaks at one of its calls."""

    def __init__(self, breaks_at: str) -> None:
        self.breaks_at = breaks_at
        self.logged: list[tuple[dict[str, Any], int | None]] = []
        self.finished = 0
        self.summary: Any = SimpleNamespace(update=lambda figures: self._call("summary"))

    def _call(self, name: str) -> None:
        if name == self.breaks_at:
            raise ConnectionError(f"{name} is down")

    def log(self, figures: dict[str, Any], step: int | None) -> None:
        self._call("log")
        self.logged.append((figures, step))

    def finish(self) -> None:
        self.finished += 1
        self._call("finish")


def fake_wandb(run: FakeRun) -> Any:
    def init(**options: Any) -> FakeRun:
        run._call("init")
        return run

    return SimpleNamespace(init=init)


@pytest.mark.parametrize("breaks_at", ["init", "log", "summary", "finish"])
def test_wandb_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, breaks_at: str
) -> None:
    run = FakeRun(breaks_at)
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(run))
    track(tmp_path, "offline")
    check_jsonl(tmp_path)
    assert len(caplog.messages) == 1, "said once"
    assert f"{breaks_at} is down" in caplog.text


def test_wandb_gets_numbers_at_their_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun("nowhere")
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(run))
    track(tmp_path, "offline")
    assert run.logged[:2] == [({"loss": 2.0}, 1), ({"loss": 1.0}, 2)]
    assert run.finished == 1


def test_a_fault_of_the_run_itself_is_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun("nowhere")
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(run))
    with pytest.raises(RuntimeError, match="mine"), Tracker(settings("offline"), "test", tmp_path):
        raise RuntimeError("mine")
    assert run.finished == 1


def log_records(log: Path) -> Iterator[bytes]:
    """Records of a W&B transaction log: LevelDB's log format (blocks of 32 KiB, parts that join) after 7 bytes."""
    data, position, record = log.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def offline_records(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """History rows and the final summary of an offline run."""
    from wandb.proto import wandb_internal_pb2

    (log,) = folder.rglob("run-*.wandb")
    history: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    for data in log_records(log):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined, unused-ignore]
        record.ParseFromString(data)
        if record.HasField("history"):
            items = record.history.item
            history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        for item in record.summary.update if record.HasField("summary") else ():
            summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return history, summary


def test_offline_run_holds_every_figure_and_stays_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real offline W&B run, with a home and a working folder that must stay empty."""
    home, elsewhere, folder = tmp_path / "home", tmp_path / "elsewhere", tmp_path / "run"
    home.mkdir()
    elsewhere.mkdir()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.chdir(elsewhere)
    track(folder, "offline")
    check_jsonl(folder)
    assert list(elsewhere.iterdir()) == []
    assert list(home.iterdir()) == []
    deadline = time.monotonic() + 30  # on a loaded machine wandb-core has been seen to write after its finish
    while not (history := offline_records(folder)[0]) and time.monotonic() < deadline:
        time.sleep(0.2)
    history, summary = offline_records(folder)
    assert [row["loss"] for row in history if "loss" in row] == [2.0, 1.0]
    figures = summary | {key: value for row in history for key, value in row.items()}
    assert {key: figures.get(key) for key in PLAIN} == PLAIN


@pytest.mark.parametrize("enabled", [True, False])
def test_progress_in_plain_lines(capsys: pytest.CaptureFixture[str], enabled: bool) -> None:
    with progress("round", 2, enabled) as advance:
        advance("loss 2")
        advance("")
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines() == (["round 1/2 after 0 s loss 2", "round 2/2 after 0 s"] if enabled else [])


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with progress("round", 2, True) as advance:
        advance("loss 2")
        advance("loss 1")
    assert "2/2" in capsys.readouterr().err


def test_each_tracker_keeps_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs in one process: the second does not write into the first one's folder."""
    given: list[str] = []
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.delenv(name, raising=False)

    def init(**options: Any) -> FakeRun:
        given.append(os.environ["WANDB_CACHE_DIR"])
        return FakeRun("nowhere")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    track(tmp_path / "one", "offline")
    track(tmp_path / "two", "offline")
    assert given == [str(tmp_path / "one"), str(tmp_path / "two")]
    assert "WANDB_CACHE_DIR" not in os.environ
