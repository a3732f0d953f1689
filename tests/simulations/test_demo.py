"""The demonstration in small: every part with the random model, each as the processes that anyone would start."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import shlex
import subprocess
import sys
from dataclasses import fields
from html import unescape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fl.settings import FederatedSettings
from lab.command.entry import Run, compose_settings
from lab.command.overrides import override
from lab.faults import Fault
from lab.settings import UserError
from matrix.grid import make_cells, sort_overrides
from matrix.settings import MatrixSettings
from serve.chat.settings import ChatSettings
from serve.settings import ServeSettings
from simulations import demo
from simulations.demo_settings import DemoSettings
from speculative.settings import SpeculativeSettings
from split.settings import SplitSettings
from split.training.settings import SplitTrainSettings
from tests.federated import on_jsonl, write_dialogues
from tests.in_process import exit_code

RANDOM = ["model=random", "model.quantization=none", "model.dtype=float32", "device.threads=1", "tracking=none"]
ROOT = Path(__file__).resolve().parents[2]


def small(part: list[str]) -> str:
    return f"[{','.join(json.dumps(word) for word in part)}]"


def settings_for(folder: Path, **parts: list[str]) -> DemoSettings:
    words = [f"project.{part}={small(overrides)}" for part, overrides in parts.items()]
    return compose_settings("demo", shlex.join(["project.part_timeout_seconds=200", *words]), DemoSettings)


@pytest.fixture(autouse=True)
def _any_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def _commands_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A command to its end in this process, which has its imports already; roles are processes of their own."""

    def run_to_end(module: str, words: list[str], folder: Path, seconds: float) -> tuple[list[str], dict[str, Any]]:
        main = importlib.import_module(f"{module}.__main__" if find_spec(module).submodule_search_locations else module)
        capfd.readouterr()
        code = exit_code(main.main, *words, override("hydra.run.dir", folder))
        out, err = capfd.readouterr()
        assert code == 0, err
        *text, last = out.splitlines()
        return text, json.loads(last)

    monkeypatch.setattr(demo, "run_to_end", run_to_end)
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # as a command has it that the demonstration starts


@pytest.mark.real
@pytest.mark.usefixtures("_commands_here")
def test_every_part_gives_its_figures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The federation without Ray and the splits without processes, which have tests of their own."""
    data = write_dialogues(tmp_path / "data.jsonl", 20)
    in_one = ["project.transport=inproc", "project.local_shards=2"]
    settings = settings_for(
        tmp_path,
        federated=on_jsonl(data, 2, "project.workers=1", "project.baseline=central"),
        verifier=RANDOM,
        drafter=[*RANDOM, "project.max_new_tokens=8", "project.check=true"],
        split=[*RANDOM, *in_one, "project.max_new_tokens=8"],
        split_training=[
            *RANDOM, *in_one, "project.steps=2", "project.micro_batches=2", "project.optimization.batch_size=2",
            "project.data.sequence_length=64", "project.data.source=jsonl", f"project.data.path={data}",
        ],
        matrix=["model=random", "project.context=32", "project.sessions=choice(1)", f"matrix.results={tmp_path}/cells"],
        server=[*RANDOM, f"project.journal={tmp_path}/streams"],
        chat=["project.model_id=latest", "project.max_tokens=8"],
    )  # fmt: skip
    with caplog.at_level(logging.INFO, logger="simulations.demo"):
        figures = demo.run(settings, Run(tmp_path / "demo"))
    names = [part.name for part in demo.PARTS]
    assert set(names) < set(figures)
    assert all(figures[name]["status"] == "ok" for name in names)
    assert figures["federated"]["eval_loss_after"] < figures["federated"]["eval_loss_before"]
    assert (figures["speculative"]["new_tokens"], figures["speculative"]["flips"]) == (8, [])
    assert figures["plots"]
    page = unescape(figures["report"].read_text())
    assert all(f"<p>{part.title}</p>" in page for part in demo.PARTS)
    assert all(Path(plot).is_relative_to(tmp_path / "demo") for plot in figures["plots"])
    assert len(figures["split"]["token_ids"]) == 8
    assert len(figures["split_training"]["loss_by_step"]) == 2
    assert (figures["matrix"]["ok"], figures["matrix"]["skipped"]) == (1, 0)
    assert (figures["serve"]["model"], figures["serve"]["answers"]) == ("latest", 1)
    said = [record.getMessage() for record in caplog.records if record.name == "simulations.demo"]
    begun, done = said[::2], said[1::2]
    for number, (name, first, last) in enumerate(zip(names, begun, done, strict=True), start=1):
        assert first.startswith(f"{number} of 6, {name}: ")
        assert last.startswith(f"{name} took ")
    assert begun[0].endswith("(0 s so far; then speculative, split, split training, matrix, serve)")
    assert begun[-1].endswith(" s so far; then the page)")


def test_what_make_demo_tells_its_parts_are_words_that_they_know() -> None:
    """Each list composes as its own command's settings, so that minutes do not end in a typo."""
    project = compose_settings("demo", "", DemoSettings).project
    told = [
        ("fed_learn", project.federated, FederatedSettings),
        ("spec_decoding", project.verifier, SpeculativeSettings),
        ("spec_decoding", project.drafter, SpeculativeSettings),
        ("split_inf", project.split, SplitSettings),
        ("split_train", project.split_training, SplitTrainSettings),
        ("serve", project.server, ServeSettings),
        ("chat", project.chat, ChatSettings),
    ]
    for config, words, settings_type in told:
        assert compose_settings(config, shlex.join(words), settings_type).seed >= 0
    words = sort_overrides(project.matrix)
    assert len(make_cells(compose_settings("matrix", shlex.join(words.sweep), MatrixSettings).matrix, words)) == 4
    assert len(told) == len(fields(project)) - 2, "all but the matrix and the time limit"
    with pytest.raises(UserError, match=r"^project.part_timeout_seconds must be greater than 0, got 0.0$"):
        compose_settings("demo", "project.part_timeout_seconds=0", DemoSettings)


def test_a_part_that_fails_ends_the_demonstration(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = settings_for(tmp_path, federated=["project.rounds=0"])
    with pytest.raises(Fault, match=r"fed_sim project.rounds=0.* ended with code 2"):
        demo.run(settings, Run(tmp_path / "demo"))
    assert "error: project.rounds must be at least 1, got 0" in capfd.readouterr().err
    settings.project.part_timeout_seconds = 0.1
    with pytest.raises(Fault, match=r"was not done after 0.1 s \(project.part_timeout_seconds\)$"):
        demo.run(settings, Run(tmp_path / "late"))


def test_what_was_shown_before_a_part_failed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_to_end(module: str, *_: object) -> tuple[list[str], dict[str, Any]]:
        if module != "simulations.fed_sim":
            raise subprocess.CalledProcessError(1, module)
        figures = {"eval_loss_before": 2.0, "eval_loss_by_round": [1.0], "num_clients": 2}
        return [], figures | {"uplink_bytes_per_client_round": 1}

    monkeypatch.setattr(demo, "run_to_end", run_to_end)
    monkeypatch.setattr(demo, "listening", lambda *_: contextlib.nullcontext(1))
    place = Run(tmp_path / "demo")
    with pytest.raises(Fault, match=r"speculative\.drafter .* ended with code 1"):
        demo.run(settings_for(tmp_path), place)
    assert place.so_far()["federated"]["eval_loss_by_round"] == [1.0]
