"""What watches a deployed run, over a Flower that answers as told: attempts, refusals, interruptions, folders.

The real Flower, with a server that is killed, is in tests/fl/test_deployment.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fl.run import __main__ as watching
from fl.run.commands import FlowerCommands, RunState, Unreachable
from fl.run.folders import attempts_of, claim, claimed_by, latest_rounds, process_is_gone
from fl.settings import FederatedSettings
from lab.command.entry import Run, compose_settings
from lab.faults import Fault
from lab.settings import UserError
from tests.fl.two_sites import ROOT

FAILED = RunState("finished:failed", "RuntimeError: round 2")
COMPLETED = RunState("finished:completed", "N/A")
WORDS = ("model=random", "model.dtype=float32", "project.retry_seconds=0", "project.node_timeout_seconds=1")


class ScriptedFlower:
    """A SuperLink of this process: `play` is called with the folder of each submitted run, and says how it ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, play: Callable[[Path, str], RunState]) -> None:
        self.submitted: list[str] = []
        self.stopped: list[str] = []
        self.asked = ""
        self._play = play
        monkeypatch.setattr(FlowerCommands, "submit", lambda _, config: self.submit(config))
        monkeypatch.setattr(FlowerCommands, "state", lambda _, run_id: self.state(run_id))
        monkeypatch.setattr(FlowerCommands, "stop", lambda _, run_id: self.stopped.append(run_id))
        monkeypatch.setattr(FlowerCommands, "follow", lambda _, run_id: subprocess.Popen([sys.executable, "-c", ""]))
        monkeypatch.setattr(watching, "own_overrides", lambda but=(): [*WORDS])

    def submit(self, config: Path) -> str:
        self.submitted.append(config.read_text())
        return str(len(self.submitted))

    def state(self, run_id: str) -> RunState:
        self.asked, text = run_id, self.submitted[int(run_id) - 1]
        return self._play(Path(tomllib.loads(text)["folder"]), text)


def write_rounds(folder: Path, count: int, **result: object) -> None:
    for number in range(count):
        (folder / f"adapters/round-{number:04d}").mkdir(parents=True)
    folder.mkdir(exist_ok=True)
    if result:
        (folder / "result.json").write_text(json.dumps(result))


def watch(folder: Path, *words: str) -> dict[str, object]:
    settings = compose_settings("fed_learn", " ".join([*WORDS, *words]), FederatedSettings)
    return watching.run(settings, Run(folder))


def test_a_run_that_fails_goes_on_from_its_last_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def play(folder: Path, config: str) -> RunState:
        if folder.name == "attempt-3":
            write_rounds(folder, 4, status="ok", adapter_path=str(folder / "adapters/round-0003"))
            return COMPLETED
        if folder.name == "attempt-1":
            write_rounds(folder, 2, status="failed", error="round 2 had no good reply", ended_by="failed")
        return FAILED  # the second does not even begin

    flower = ScriptedFlower(monkeypatch, play)
    figures = watch(tmp_path, "project.attempts=3")
    first, second, third = flower.submitted
    assert "project.resume" not in first
    assert f'project.resume=\\"{tmp_path}/attempt-1\\"' in second or f"project.resume={tmp_path}/attempt-1" in second
    assert "attempt-1" in third
    assert figures["attempts"] == 3
    assert figures["failures"] == [
        "run 1 is finished:failed: round 2 had no good reply", "run 2 is finished:failed: RuntimeError: round 2",
    ]  # fmt: skip
    assert figures["adapter_path"] == str(tmp_path / "adapters/round-0003")
    assert Path(str(figures["adapter_path"])).is_dir()
    assert attempts_of(tmp_path) == []


def test_a_run_that_fails_too_often_is_a_fault_with_its_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def play(folder: Path, config: str) -> RunState:
        write_rounds(folder, 2)
        return FAILED

    flower = ScriptedFlower(monkeypatch, play)
    with pytest.raises(Fault, match="the run failed 2 times, the last time because run 2 is finished:failed"):
        watch(tmp_path, "project.attempts=2")
    assert len(flower.submitted) == 2
    assert (tmp_path / "adapters/round-0001").is_dir()


def test_the_folder_that_a_failed_run_names_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def play(folder: Path, config: str) -> RunState:
        error = f"round 2 ended; continue with project.resume={folder}"
        write_rounds(folder, 2, status="failed", error=error, ended_by="failed")
        return FAILED

    ScriptedFlower(monkeypatch, play)
    with pytest.raises(Fault) as caught:
        watch(tmp_path, "project.attempts=2")
    assert str(caught.value).endswith(f"continue with project.resume={tmp_path}")
    assert latest_rounds(tmp_path) == tmp_path


def test_an_adapter_to_start_from_is_that_of_the_command_s_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def play(folder: Path, config: str) -> RunState:
        write_rounds(folder, 1, status="ok", adapter_path=str(folder / "adapters/round-0000"))
        return COMPLETED

    monkeypatch.chdir(tmp_path)
    flower, typed = ScriptedFlower(monkeypatch, play), [*WORDS, "project.warm_start=mine"]
    monkeypatch.setattr(watching, "own_overrides", lambda but=(): [word for word in typed if not word.startswith(but)])
    watch(tmp_path / "run", "project.warm_start=mine")
    assert str(tmp_path / "mine") in flower.submitted[0]
    assert "=mine" not in flower.submitted[0]


def test_what_the_server_refuses_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def play(folder: Path, config: str) -> RunState:
        write_rounds(folder, 0, status="failed", error="project.quorum must be at most 2, got 3", ended_by="refused")
        return FAILED

    flower = ScriptedFlower(monkeypatch, play)
    with pytest.raises(UserError, match=r"project\.quorum must be at most 2, got 3"):
        watch(tmp_path)
    assert len(flower.submitted) == 1


def test_completed_without_results_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ScriptedFlower(monkeypatch, lambda folder, config: COMPLETED)
    with pytest.raises(
        UserError, match=r"project\.superlink must be a SuperLink on this machine, got 'lab': run 1 was"
    ):
        watch(tmp_path)


def test_who_is_interrupted_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def play(folder: Path, config: str) -> RunState:
        write_rounds(folder, 1)
        raise KeyboardInterrupt

    flower = ScriptedFlower(monkeypatch, play)
    with pytest.raises(KeyboardInterrupt):
        watch(tmp_path)
    assert flower.stopped == ["1"]
    assert (tmp_path / "adapters/round-0000").is_dir()


def test_an_awkward_folder_reaches_the_server_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / 'José 😀, [x]="1" \\'

    def play(attempt: Path, config: str) -> RunState:
        write_rounds(attempt, 2, status="ok", adapter_path=str(attempt / "adapters/round-0001"))
        return COMPLETED

    flower = ScriptedFlower(monkeypatch, play)
    assert watch(folder)["adapter_path"] == str(folder / "adapters/round-0001")
    assert [tomllib.loads(text)["folder"] for text in flower.submitted] == [str(folder / "attempt-1")]


def test_a_superlink_that_does_not_answer_is_waited_for_and_then_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: Iterator[Exception | None] = iter([Unreachable("away"), None])

    def play(folder: Path, config: str) -> RunState:
        if (error := next(states, None)) is not None:
            raise error
        write_rounds(folder, 1, status="ok")
        return COMPLETED

    ScriptedFlower(monkeypatch, play)
    assert watch(tmp_path / "one")["attempts"] == 1

    def gone(folder: Path, config: str) -> RunState:
        raise Unreachable("away")

    ScriptedFlower(monkeypatch, gone)
    with pytest.raises(Fault, match="because away; gave up"):
        watch(tmp_path / "two", "project.attempts=1", "project.node_timeout_seconds=0.1")


def test_a_server_that_is_gone_is_noticed(tmp_path: Path) -> None:
    assert not process_is_gone(tmp_path), "it has not begun"
    claim(tmp_path, "7")
    assert not process_is_gone(tmp_path)
    assert claimed_by(tmp_path) == "7"
    said = json.loads((tmp_path / "process.json").read_text())
    (tmp_path / "process.json").write_text(json.dumps(said | {"created": 1.0}))
    assert process_is_gone(tmp_path), "another process has its number"


def test_a_server_is_not_gone_when_the_clock_is_set(tmp_path: Path, set_clock: Callable[[float], None]) -> None:
    claim(tmp_path, "7")
    set_clock(1.0)
    assert not process_is_gone(tmp_path)


@pytest.mark.parametrize("begins", ["at once", "after the next submission"])
def test_of_two_submissions_of_an_attempt_one_run_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begins: str
) -> None:
    """`flwr run` was cut off, but the SuperLink has the run."""

    def play(folder: Path, config: str) -> RunState:
        if flower.asked == "2":  # refused: the folder is another run's
            return FAILED
        write_rounds(folder, 2, status="ok", adapter_path=str(folder / "adapters/round-0001"))
        return COMPLETED

    flower = ScriptedFlower(monkeypatch, play)
    submit = flower.submit

    def unheard(config: Path) -> str:
        number, folder = submit(config), tmp_path / "attempt-1"
        if (number == "1" and begins == "at once") or number == "2":
            claim(folder, "1")
        if number == "1":
            raise Unreachable("no answer")
        return number

    monkeypatch.setattr(flower, "submit", unheard)
    figures = watch(tmp_path)
    assert (figures["attempts"], figures["failures"]) == (1, [])
    assert len(flower.submitted) == (1 if begins == "at once" else 2)


def test_a_run_that_was_given_up_cannot_begin_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def lost(config: Path) -> str:
        raise Unreachable("no answer")

    flower = ScriptedFlower(monkeypatch, lambda folder, config: COMPLETED)
    monkeypatch.setattr(flower, "submit", lost)
    monkeypatch.setattr(watching, "keep_the_last", lambda root: seen.extend(map(claimed_by, attempts_of(root))))
    with pytest.raises(Fault, match="no answer; gave up"):
        watch(tmp_path, "project.attempts=2", "project.node_timeout_seconds=0.1")
    assert seen == ["", ""]
    with pytest.raises(FileExistsError):
        claim(tmp_path / "attempt-1", "7")


def test_the_latest_of_those_with_the_most_rounds_counts(tmp_path: Path) -> None:
    assert latest_rounds(tmp_path) is None
    for name, count in (("attempt-2", 3), ("attempt-10", 3), ("attempt-11", 1)):
        write_rounds(tmp_path / name, count)
    assert latest_rounds(tmp_path) == tmp_path / "attempt-10"


@pytest.mark.parametrize(
    ("there", "remedy"),
    [(".", "project.resume={0} goes on with it"), ("attempt-1", "project.resume={0}/attempt-1 goes on with it")],
)
def test_a_folder_with_another_run_is_refused_unharmed(
    there: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rounds(tmp_path / there, 2)
    flower = ScriptedFlower(monkeypatch, lambda folder, config: COMPLETED)
    with pytest.raises(UserError, match=r"hydra\.run\.dir must be a folder without another run") as refusal:
        watch(tmp_path)
    assert remedy.format(tmp_path) in str(refusal.value)
    assert flower.submitted == []
    assert (tmp_path / there / "adapters/round-0001").is_dir()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["project.baseline=central"], "project.baseline must be none for a federation over sites, got 'central'"),
        (["project.attempts=0"], "project.attempts must be at least 1, got 0"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], line: str
) -> None:
    flower = ScriptedFlower(monkeypatch, lambda folder, config: COMPLETED)
    with pytest.raises(UserError, match=line):
        watch(tmp_path, *words)
    assert flower.submitted == []


FLWR = """
import json, sys, time
with open({log!r}, "a") as file:
    print(*sys.argv[1:3], file=file, flush=True)
if sys.argv[1] == "run":
    time.sleep(1)  # the SuperLink has the run, and nobody knows its id
print(json.dumps({{"success": True, "run-id": "7"}}))
"""
SUBMITS = """
import sys
from fl.run import __main__ as command, commands
commands.program = lambda: {flwr!r}
command.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_run_is_submitted_stops_it(tmp_path: Path, number: signal.Signals) -> None:
    log, flwr = tmp_path / "log", tmp_path / "flwr"
    flwr.write_text(f"#!{sys.executable}\n" + FLWR.format(log=str(log)))
    flwr.chmod(0o700)
    words = ["model=random", "tracking=none", f"hydra.run.dir={tmp_path}/run"]
    process = subprocess.Popen(
        [sys.executable, "-c", SUBMITS.format(flwr=str(flwr)), *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(process.pid, number)  # as a terminal does
        out, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number, errors
    assert json.loads(out)["attempts"] == 0
    assert log.read_text() == "run .\nstop 7\n"
