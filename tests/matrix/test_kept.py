"""A kept cell serves any sweep that has it, whichever sweep ran it; two sweeps at once run none twice."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from lab.settings import UserError
from matrix.claims import Claims
from matrix.grid import Cell
from matrix.results import CellRun
from matrix.supervisor import Job, Outcome
from matrix.sweep import SweepResult, _job
from tests.matrix.sweeps import command, environment, started, sweep_here
from tests.matrix.test_grid import sweep_settings
from tests.sweep_pairs import compare_pairs

PAIRS = 12


def test_a_sweep_over_kept_cells_equals_one_that_ran_fresh() -> None:
    report = compare_pairs(PAIRS)
    assert report.pairs == PAIRS
    assert (report.differences, report.without_report) == (0, 0), report.first_wrong
    assert min(report.kept, report.failures, report.interrupted, report.not_drawn) > 0, "each of it was tried"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that were asked for; each is done at once, or fails on its limits: it needs 2 s and 2 GiB."""
    asked: list[Job] = []

    class Instant:
        at_once = 1

        def run(self, jobs: Sequence[Job]) -> Generator[tuple[int, Outcome]]:
            for index, job in enumerate(jobs):
                asked.append(job)
                yield index, outcome(job)

    def outcome(job: Job) -> Outcome:
        limit: dict[str, float] = {}
        if job.time_limit_seconds < 2:
            limit = {"time_limit_seconds": job.time_limit_seconds}
        elif job.memory_limit_bytes < 2**31:
            limit = {"memory_limit_gib": job.memory_limit_bytes / 2**30}
        failed = "prompt=crash" in job.arguments or bool(limit)
        return Outcome(
            failure="error" if failed else None, detail="", figures={} if failed else {"speed": 1.0}, seconds=1.0,
            peak_rss_bytes=1, host="here", limit=limit,
        )  # fmt: skip

    monkeypatch.setattr("matrix.sweep.open_launcher", lambda _: Instant())
    return asked


def points(sweep: SweepResult) -> list[dict[str, Any]]:
    return [result["point"] for result in sweep.document["results"]]


def test_the_point_is_that_of_the_sweep_that_uses_the_cell(tmp_path: Path, ran: list[Job]) -> None:
    sweep_here(tmp_path, {}, "model.seed=1,2", "seed=0")
    added = sweep_here(tmp_path, {}, "model.dtype=float32,auto", "seed=0", "model.seed=1,2")
    assert added.skipped == 2, "auto is what a cell has by itself"
    assert points(added)[-1] == {"model.dtype": "auto", "model.seed": 2}
    assert points(sweep_here(tmp_path, {}, "model.seed=2")) == [{}]
    assert len(ran) == 4, "the other order of the axes, and an axis less, have the same cells"
    listed = sweep_here(tmp_path, {}, "model.lora_targets=[q_proj],[q_proj,v_proj]", "model.seed=1")
    assert [point["model.lora_targets"] for point in points(listed)] == [["q_proj"], ["q_proj", "v_proj"]]


def test_cells_that_differ_in_what_changes_no_figure_share_one_run(tmp_path: Path, ran: list[Job]) -> None:
    sweep = sweep_here(tmp_path, {}, "network.port=7,8", "model.seed=1")
    assert points(sweep) == [{"network.port": 7}, {"network.port": 8}]
    assert len(ran) == 1


def test_a_larger_limit_retries_what_failed_on_it_and_nothing_else(tmp_path: Path, ran: list[Job]) -> None:
    axes = {"prompt": ["ok", "crash"]}

    def swept(seconds: float, gib: float) -> tuple[int, list[str]]:
        before = len(ran)
        limits = (f"matrix.time_limit_seconds={seconds}", f"matrix.memory_limit_gib={gib}")
        sweep = sweep_here(tmp_path, axes, "model.seed=1", *limits)
        return len(ran) - before, [result["status"] for result in sweep.document["results"]]

    assert swept(1, 1) == (2, ["failed", "failed"])
    assert swept(1, 9) == (0, ["failed", "failed"]), "they failed on their time"
    assert swept(3, 1) == (2, ["failed", "failed"])
    assert swept(3, 2) == (2, ["ok", "failed"])
    assert swept(9, 1) == (0, ["ok", "failed"]), "what crashed did not fail on a limit, and a known figure stays one"


@pytest.mark.parametrize("text", ["[]", '{"status": "ok"}', '{"signature": "of another"}', "\udcff"])
def test_a_file_that_is_no_result_of_its_cell_runs_again(tmp_path: Path, ran: list[Job], text: str) -> None:
    first = sweep_here(tmp_path, {}, "model.seed=1")
    file = tmp_path / "cells" / first.document["results"][0]["signature"] / "result.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    assert sweep_here(tmp_path, {}, "model.seed=1").skipped == 0
    assert len(ran) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"seconds": "x"}, {"limit": None}, {"limit": {"nope": 1}}, {"figures": None}, {"status": "hm"}, {"host": ...},
        {"command": ...}, {"detail": ...},
    ],
)  # fmt: skip
def test_a_result_of_another_shape_runs_again(tmp_path: Path, ran: list[Job], wrong: dict[str, Any]) -> None:
    """Damaged, or another version's; what that had besides is not taken for this sweep's."""
    [kept] = sweep_here(tmp_path, {"seed": [1]}).document["results"]
    [file] = tmp_path.glob("cells/*/result.json")
    told = {key: value for key, value in (kept | wrong).items() if value is not ...}
    file.write_text(json.dumps(told | {"point": {"elsewhere": 1}}))
    [again] = sweep_here(tmp_path, {"seed": [1]}, "matrix.retry_failed=true").document["results"]
    assert (len(ran), again["point"], again["seconds"]) == (2, {"seed": 1}, 1.0)


@pytest.mark.parametrize("text", ["", "[]", '{"pid": 1}', '{"pid": 1, "host": 1, "since": 1, "folder": 1}'])
def test_a_damaged_list_of_another_sweep_costs_nothing(tmp_path: Path, text: str) -> None:
    with Claims(tmp_path, Path("one")) as one, Claims(tmp_path, Path("two")) as two:
        one.take(["a"])
        one._list.write_text(text)
        assert two.take(["a"]) == {}


def test_a_results_folder_that_cannot_be_written_is_one_line(tmp_path: Path, ran: list[Job]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^matrix.results must .*got '.*file/cells'"):
        sweep_here(tmp_path, {}, "model.seed=1", f"matrix.results={tmp_path}/file/cells")
    assert not ran


@pytest.mark.parametrize("name", ["José", "my lab (2)", "a, b", "x=1", "[lab]", "${oc.env:HOME}", 'it\'s "so"', "b\\"])
def test_a_cell_is_told_its_folder_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    run = CellRun(Cell({}, [], {}), 0, "0123", tmp_path / name / "0123", "cpu")
    job = _job(run, sweep_settings())
    (word,) = OverridesParser.create().parse_overrides([job.arguments[-1]])
    read = OmegaConf.create({"dir": word.value()}).dir
    assert (word.key_or_group, read) == ("hydra.run.dir", job.folder)


def test_what_one_sweep_has_taken_no_other_gets(tmp_path: Path) -> None:
    with Claims(tmp_path, Path("one")) as one, Claims(tmp_path, Path("two")) as two:
        assert one.take(["a", "b"]) == {}
        theirs = two.take(["b", "c"])
        assert list(theirs) == ["b"]
        assert theirs["b"].endswith(", one")
        assert list(one.take(["c"])) == ["c"]
        one.give_back("b")
        assert two.take(["b", "c"]) == {}
    assert [file.name for file in (tmp_path / ".sweeps").iterdir()] == ["all_claims"]


def test_an_old_run_folder_goes_when_its_cell_is_taken_and_the_new_one_is_another(tmp_path: Path) -> None:
    run = CellRun(Cell({}, [], {}), 0, "0123", tmp_path / "0123", "cpu")
    old = run.new_folder()
    old.mkdir(parents=True)
    assert run.new_folder() != old
    assert not old.exists()


@pytest.mark.real
def test_two_sweeps_at_once_run_no_cell_twice_and_outlive_each_other(tmp_path: Path) -> None:
    """The second waits for two cells that the first has taken: one is done then; in the other the first is killed."""
    axes: dict[str, list[Any]] = {"prompt": ["gate"], "model.seed": [1, 2]}
    logs, sweeps = [tmp_path / "first.log", tmp_path / "second.log"], list[subprocess.Popen[str]]()

    def start(log: Path, until: Callable[[], bool]) -> None:
        with log.open("w") as errors:
            asked = command(tmp_path, axes)
            sweeps.append(
                subprocess.Popen(
                    asked, cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=errors, text=True
                )
            )
        wait_until(until)

    try:
        start(logs[0], until=lambda: len(starts(tmp_path)) == 1)
        start(logs[1], until=lambda: "waiting for 2 runs of another sweep" in logs[1].read_text())
        (tmp_path / "log.go-1").touch()
        kept = tmp_path / "results" / "matrix"
        wait_until(lambda: len(starts(tmp_path)) == 2 and len(list(kept.glob("*/result.json"))) == 1)
        sweeps[0].kill()
        (tmp_path / "log.go-2").touch()
        out, _ = sweeps[1].communicate(timeout=120)
    finally:
        for sweep in sweeps:
            sweep.kill()
            sweep.wait()
    assert sweeps[1].returncode == 0, logs[1].read_text()
    last = json.loads(out.splitlines()[-1])
    assert (last["cells"], last["ok"], last["failed"]) == (2, 2, 0)
    assert f"process {sweeps[0].pid} on" in logs[1].read_text()
    assert starts(tmp_path) == ["gate 1 0", "gate 2 0", "gate 2 0"], "the one that the kill cut off, and no other"
    assert [file.name for file in (kept / ".sweeps").iterdir()] == ["all_claims"]


def starts(folder: Path) -> list[str]:
    return started(folder) if (folder / "log").exists() else []


def wait_until(holds: Callable[[], bool], deadline_seconds: float = 120.0) -> None:
    deadline = time.monotonic() + deadline_seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
