"""A run that was interrupted, resumed: the same bytes as without the interruption, or one line that says why not."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from fl import server
from fl.adapters import AdapterIndex
from fl.client_app import make_client_app
from fl.run.state import RECORD, RoundRecord
from fl.settings import FederatedSettings
from fl.strategy import WeightedFedAvg
from lab.command.entry import Run
from lab.settings import UserError, to_plain
from tests.federated import InProcessGrid, small_settings, write_dialogues
from tests.fl.run.kills import Process, adapters, kill_at_random
from tests.shared import made_once

ROUNDS = 3
CLIENTS = 4
HALF = "project.fraction=0.5"  # the sites of a round are drawn
KILLS = 6


def settings_in(folder: Path, *overrides: str) -> FederatedSettings:
    data = folder / "data.jsonl"
    if not data.exists():
        write_dialogues(data, 40)
    return small_settings(data, CLIENTS, f"project.rounds={ROUNDS}", HALF, *overrides)


def federate(settings: FederatedSettings, folder: Path) -> dict[str, Any]:
    grid = InProcessGrid(make_client_app(lambda context: settings), CLIENTS)
    return server.serve(grid, settings, Run(folder))


def make_whole(folder: Path) -> None:
    federate(settings_in(folder), folder / "run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run, below that of its data."""
    return made_once(tmp_path_factory, "resume-whole", make_whole) / "run"


def interrupted(whole: Path, after: int, folder: Path) -> Path:
    """What is left of the run when it is killed after a round."""
    for number in range(after + 1):
        shutil.copytree(whole / f"adapters/round-{number:04d}", folder / f"adapters/round-{number:04d}")
    (folder / f"adapters/.round-{after + 1:04d}.99").mkdir()  # unfinished
    return folder


@pytest.mark.parametrize("after", range(ROUNDS + 1))
def test_resumed_is_uninterrupted(whole: Path, tmp_path: Path, after: int) -> None:
    """Also after the last round: only the last evaluation is missing then."""
    left = interrupted(whole, after, tmp_path / "left")
    figures = federate(settings_in(whole.parent, f"project.resume={left}"), tmp_path / "run")
    assert adapters(tmp_path / "run") == adapters(whole)
    assert len(adapters(whole)) == ROUNDS + 1
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    ours = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("step") for row in ours] == [row.get("step") for row in rows] == [1, 2, 3, None]
    same = ("train_loss", "eval_loss_before", "uplink_bytes", "replies", "sites")
    assert [[row.get(key) for key in same[:-1]] for row in ours] == [
        [row.get(key) for key in same[:-1]] for row in rows
    ]
    for key in (
        "eval_loss_before",
        "eval_loss_after",
        "eval_loss_by_round",
        "train_loss_by_round",
        "sites",
        "eval_sites",
    ):
        assert to_plain(figures[key]) == rows[-1][key], key


def test_a_run_that_forgets_the_sites_of_round_1_is_caught(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A negative control of the test above; the next test has the adapter's and the round's."""
    left = interrupted(whole, 2, tmp_path / "left")
    run = WeightedFedAvg.run
    monkeypatch.setattr(WeightedFedAvg, "run", lambda self, *a, **k: run(self, *a, **k | {"first_asked": [3]}))
    figures = federate(settings_in(whole.parent, f"project.resume={left}"), tmp_path / "run")
    assert figures["eval_sites"] != json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])["eval_sites"]


def forked(settings_of: Path) -> Any:
    """Starts a server in a process of its own, forked from this one, which has its imports already."""

    def start(folder: Path, overrides: Sequence[str]) -> Process:
        settings = settings_in(settings_of, *overrides)
        process = multiprocessing.get_context("fork").Process(target=federate, args=(settings, folder))
        process.start()
        return process

    return start


def test_killed_at_random_points_and_resumed_the_bytes_are_the_same(whole: Path, tmp_path: Path) -> None:
    begin = time.monotonic()
    federate(settings_in(whole.parent), tmp_path / "timed")
    came = kill_at_random(KILLS, 3, tmp_path, ROUNDS, time.monotonic() - begin, forked(whole.parent))
    assert came.kills == KILLS
    assert came.ended_early == 0, "a resumed server failed by itself"
    assert came.lost == []
    assert came.adapters == adapters(whole)


def test_a_server_that_begins_again_or_loses_a_round_is_caught(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = WeightedFedAvg.run
    monkeypatch.setattr(  # the right adapter, the wrong round
        WeightedFedAvg,
        "run",
        lambda self, *a, **k: run(self, *a, **k | {"finished_rounds": max(0, k["finished_rounds"] - 1)}),
    )
    left = interrupted(whole, 1, tmp_path / "left")
    with pytest.raises(FileExistsError):
        federate(settings_in(whole.parent, f"project.resume={left}"), tmp_path / "round")
    monkeypatch.setattr(WeightedFedAvg, "run", run)
    monkeypatch.setattr(server, "adapter_of_run", lambda settings, *rest: server.first_adapter(settings))
    federate(settings_in(whole.parent, f"project.resume={left}"), tmp_path / "adapter")
    assert adapters(tmp_path / "adapter") != adapters(whole)


def test_a_round_that_is_lost_is_counted(whole: Path, tmp_path: Path) -> None:
    """A negative control of the kills: a server that loses its first round when it is done."""
    begin = forked(whole.parent)

    def start(folder: Path, overrides: Sequence[str]) -> Process:
        process = begin(folder, overrides)
        join = process.join

        def forget(*timeout: float) -> None:
            join(*timeout)
            if process.exitcode == 0:
                shutil.rmtree(folder / "adapters/round-0000")

        process.join = forget
        return process

    # A run whose last kill came after its last round begins again, and has nothing to lose.
    tries = (kill_at_random(2, seed, tmp_path / str(seed), ROUNDS, 1.0, start) for seed in range(3, 8))
    assert any("round-0000" in name for came in tries for name in came.lost)


class Momentum:
    """A server's component: one named tensor that grows with every round that saves it."""

    def __init__(self) -> None:
        self.rounds = torch.zeros(3)

    def state(self) -> Mapping[str, torch.Tensor]:
        self.rounds = self.rounds + 1
        return {"rounds": self.rounds}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        if state.keys() != {"rounds"} or state["rounds"].shape != (3,):
            raise ValueError(f"momentum must have the tensor rounds (3,), got {sorted(state)}")
        self.rounds = state["rounds"]


def with_momentum(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, Momentum]:
    parts, make = {name: Momentum() for name in names}, server.strategy

    def strategy(settings: FederatedSettings, index: AdapterIndex, known: Any) -> WeightedFedAvg:
        made = make(settings, index, known)
        made.components = parts
        return made

    monkeypatch.setattr(server, "strategy", strategy)
    return parts


def test_components_are_saved_after_every_round_and_loaded(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_momentum(monkeypatch, "outer")
    federate(settings_in(whole.parent), tmp_path / "first")
    saved = sorted(tmp_path.glob("first/adapters/*/state-*.safetensors"))
    assert [file.parent.name for file in saved] == ["round-0002", "round-0003"], "older ones are of no use"
    shutil.rmtree(tmp_path / "first/adapters/round-0003")
    again = with_momentum(monkeypatch, "outer")["outer"]
    monkeypatch.setattr(server, "strategy", lambda *a, make=server.strategy: make(*a))
    federate(settings_in(whole.parent, f"project.resume={tmp_path / 'first'}"), tmp_path / "second")
    assert again.rounds.tolist() == [ROUNDS + 1] * 3, "the start and each round, across the interruption"


def test_components_that_are_not_those_of_the_run_are_refused(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = interrupted(whole, 1, tmp_path / "left")
    with_momentum(monkeypatch, "outer")
    with pytest.raises(UserError, match=r"has the states none, the run needs \['state-outer.safetensors'\]"):
        federate(settings_in(whole.parent, f"project.resume={left}"), tmp_path / "run")
    (left / "adapters/round-0001/state-outer.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"has a state-outer.safetensors that cannot be used"):
        federate(settings_in(whole.parent, f"project.resume={left}"), tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["project.local_steps=3"], "must name those that differ, got project.local_steps was 2, is 3"),
        (["project.lora.rank=4"], "same model, adapter and partition, got project.lora.rank was 8, is 4"),
        (["project.partition_by=iid"], "adapter and partition, got project.partition_by was 'package', is 'iid'"),
        (["seed=1"], "same model, adapter and partition, got seed was 0, is 1"),
        (["seed=1", "project.resume_changes=[seed]"], "resume_changes must name settings that a run can continue with"),
        (["project.resume_changes=[project.nothing]"], "got 'project.nothing'"),
        (["project.rounds=1"], "project.rounds must be at least the 2 finished rounds, got 1"),
        (["model.seed=1"], "project.resume must be a run of the same model, got "),
    ],
)
def test_what_differs_is_named_and_refused(whole: Path, tmp_path: Path, overrides: list[str], line: str) -> None:
    left = interrupted(whole, 2, tmp_path / "left")
    with pytest.raises(UserError, match=re.escape(line)) as refused:
        server.starting_point(settings_in(whole.parent, f"project.resume={left}", *overrides))
    assert "\n" not in str(refused.value)


def test_what_is_allowed_to_differ_may(whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    left = interrupted(whole, 1, tmp_path / "left")
    changes = ["project.workers=1", "project.local_steps=1", "project.resume_changes=[project.local_steps]"]
    _, saved = server.starting_point(settings_in(whole.parent, f"project.resume={left}", *changes))
    assert saved is not None
    assert saved.last.round == 1
    assert "continuing with other settings: project.local_steps was 2, is 1" in caplog.text


def test_a_folder_that_cannot_be_continued_is_refused(whole: Path, tmp_path: Path) -> None:
    def refused(folder: Path) -> str:
        with pytest.raises(UserError) as error:
            server.starting_point(settings_in(whole.parent, f"project.resume={folder}"))
        return str(error.value)

    assert "must be the folder of a run with finished rounds (adapters/round-0000 and so on)" in refused(tmp_path)
    left = interrupted(whole, 2, tmp_path / "left")
    record = left / "adapters/round-0001" / RECORD
    text = record.read_text()
    for broken in ("", "{}", text.replace('"round":1', '"round":2', 1), text[:-5]):
        record.write_text(broken)
        assert "project.resume must hold a whole round.json per round, got " in refused(left)
    record.unlink()
    assert "(No such file or directory)" in refused(left)
    shutil.rmtree(record.parent)
    assert "which lacks round 1 of 2" in refused(left)


def test_a_record_is_read_as_it_was_written(whole: Path) -> None:
    record = msgspec.json.decode((whole / "adapters/round-0001" / RECORD).read_bytes(), type=RoundRecord)
    assert record.report is not None
    assert record.report.clients[0].counts is not None
    assert len(record.first_asked) == CLIENTS / 2
    assert msgspec.json.decode(msgspec.json.encode(record), type=RoundRecord) == record
