"""A cell is watched from outside: limits, reasons, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from matrix.launching import LocalLauncher, SupervisedJob, run_job
from matrix.supervisor import Job

FAKE = Path(__file__).with_name("fake_cell.py")


def job(folder: Path, what: str, time_limit_seconds: float = 60.0, memory_limit_bytes: int = 2**33) -> Job:
    return Job(
        arguments=[sys.executable, str(FAKE), f"prompt={what}", "model.seed=2"],
        working_folder=str(folder),
        folder=str(folder / what),
        time_limit_seconds=time_limit_seconds,
        memory_limit_bytes=memory_limit_bytes,
        omp_threads=None,
    )


def wait_until_started(log: Path) -> psutil.Process:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if log.exists() and log.read_text().endswith("\n"):
            return psutil.Process(int(log.read_text().split()[-1]))
        time.sleep(0.01)
    raise AssertionError("the cell did not start")


def assert_ends(process: psutil.Process) -> None:
    _, alive = psutil.wait_procs([process], timeout=10)
    assert not alive or process.status() == psutil.STATUS_ZOMBIE


def test_the_last_line_is_the_figures(tmp_path: Path) -> None:
    outcome = run_job(job(tmp_path, "ok"))
    assert (outcome.failure, outcome.detail) == (None, "")
    assert outcome.figures["speed"] == 200.0
    assert 0 < outcome.seconds < 60
    assert outcome.peak_rss_bytes > 0  # so short a cell may be read only once, as it begins
    assert (tmp_path / "ok" / "stderr.log").read_text() == "progress\n"


@pytest.mark.parametrize(
    ("what", "failure", "detail"),
    [
        ("crash", "error", "RuntimeError: boom at 2"),
        ("user", "error", "error: model.seed must be something else, got 1"),
        ("killed", "error", "killed by SIGKILL (often the system's own out-of-memory killer)"),
        ("silent", "error", "its last line is no JSON document"),
        ("cuda", "out of memory", "RuntimeError: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB"),
    ],
)
def test_a_failure_says_why(tmp_path: Path, what: str, failure: str, detail: str) -> None:
    outcome = run_job(job(tmp_path, what))
    assert (outcome.failure, outcome.detail, outcome.limit) == (failure, detail, {})
    assert outcome.figures == {}


def test_a_cell_that_has_no_folder_says_why_and_prints_no_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As on a full disk."""
    (tmp_path / "ok").touch()
    outcome = run_job(job(tmp_path, "ok"))
    assert (outcome.failure, outcome.detail) == ("error", f"[Errno 17] File exists: '{tmp_path / 'ok'}'")
    assert capfd.readouterr() == ("", "")


def test_a_cell_that_hangs_ends_at_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    outcome = run_job(job(tmp_path, "hang", time_limit_seconds=1.0))
    assert (outcome.failure, outcome.detail) == ("time-out", "not done after 1 s")
    assert outcome.limit == {"time_limit_seconds": 1.0}
    assert not psutil.pid_exists(int((tmp_path / "log").read_text().split()[-1]))


@pytest.mark.parametrize("what", ["memory", "child-memory"])
def test_a_cell_that_needs_more_memory_ends_at_its_limit(tmp_path: Path, what: str) -> None:
    """A GiB where 300 MiB are allowed, by the cell itself or by a process that it started."""
    outcome = run_job(job(tmp_path, what, memory_limit_bytes=300 * 2**20))
    assert outcome.failure == "out of memory"
    assert outcome.detail.endswith("GiB resident, the limit is 0.292969 GiB")
    assert outcome.limit == {"memory_limit_gib": 300 / 1024}
    assert outcome.peak_rss_bytes > 300 * 2**20
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]


def test_the_same_cell_within_the_limit_is_left_alone(tmp_path: Path) -> None:
    outcome = run_job(job(tmp_path, "memory", time_limit_seconds=3.0, memory_limit_bytes=4 * 2**30))
    assert outcome.failure == "time-out"
    assert outcome.peak_rss_bytes > 0.9 * 2**30  # on a busy machine it has not written to all of it yet


@pytest.mark.parametrize("how", ["stdin ends", signal.SIGTERM])
def test_a_supervisor_that_is_left_alone_ends_its_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str | signal.Signals
) -> None:
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    supervised = SupervisedJob(job(tmp_path, "hang"), os.environ)
    cell = wait_until_started(tmp_path / "log")
    assert cell.is_running()
    if isinstance(how, signal.Signals):
        os.kill(cell.parent().pid, how)  # type: ignore[union-attr]  # it has one
    supervised.close()
    assert_ends(cell)


def test_whoever_asked_may_be_killed(tmp_path: Path) -> None:
    """The one that holds the supervisor's stdin dies by SIGKILL, and cleans nothing up."""
    asker = (
        "import json, sys; from matrix.launching import run_job; from matrix.supervisor import Job;"
        "run_job(Job(**json.loads(sys.argv[1])))"
    )
    environment = os.environ | {"FAKE_LOG": str(tmp_path / "log")}
    process = subprocess.Popen(
        [sys.executable, "-c", asker, json.dumps(asdict(job(tmp_path, "hang")))], env=environment
    )
    cell = wait_until_started(tmp_path / "log")
    process.kill()
    process.wait()
    assert_ends(cell)


def test_the_thread_count_is_that_of_whoever_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    code = "import json, os; print(json.dumps({'threads': os.environ.get('OMP_NUM_THREADS')}))"
    for omp_threads in (None, "2"):
        asked = Job(
            **(asdict(job(tmp_path, "ok")) | {"arguments": [sys.executable, "-c", code], "omp_threads": omp_threads})
        )
        assert run_job(asked).figures == {"threads": omp_threads}


def test_what_changes_in_the_environment_meanwhile_reaches_no_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sink of a cell that has ended sets variables in this process while the next cells are started. Each lasts long
    enough that ours change before the third one starts."""
    code = "import json, os, time; time.sleep(0.3); print(json.dumps({'seen': os.environ.get('WANDB_DIR')}))"
    monkeypatch.delenv("WANDB_DIR", raising=False)
    words = {"arguments": [sys.executable, "-c", code]}
    jobs = [Job(**(asdict(job(tmp_path / str(index), "ok")) | words)) for index in range(3)]
    seen = []
    for _, outcome in LocalLauncher(at_once=1).run(jobs):
        monkeypatch.setenv("WANDB_DIR", "of the cell that has ended")
        seen.append(outcome.figures)
    assert seen == [{"seen": None}] * 3


@pytest.mark.parametrize("there", [True, False])
def test_relative_paths_begin_where_whoever_asked_stands(tmp_path: Path, there: bool) -> None:
    code = "import json, os; print(json.dumps({'stands': os.getcwd()}))"
    stands = tmp_path if there else tmp_path / "only on another machine"
    words = {"arguments": [sys.executable, "-c", code], "working_folder": str(stands)}
    outcome = run_job(Job(**(asdict(job(tmp_path, "ok")) | words)))
    assert outcome.figures == {"stands": str(tmp_path if there else Path.cwd())}


def test_several_at_once_in_their_order_and_stopped_in_the_middle(tmp_path: Path) -> None:
    launcher = LocalLauncher(at_once=2)
    jobs = [job(tmp_path / str(index), what) for index, what in enumerate(["ok", "hang", "ok", "hang", "ok"])]
    outcomes = launcher.run(jobs)
    assert {next(outcomes)[0], next(outcomes)[0]} == {0, 2}
    began = time.monotonic()
    outcomes.close()  # type: ignore[attr-defined]  # a generator
    assert time.monotonic() - began < 10
    assert not (tmp_path / "4").exists(), "it had no place yet"
