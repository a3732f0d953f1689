"""The demonstration in small: every part with the random model, each as the processes that anyone would start."""

from __future__ import annotations

import json
import logging
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from fl.settings import FederatedSettings
from lab.command.entry import Run, compose_settings
from lab.settings import UserError
from matrix.grid import make_cells, sort_words
from matrix.settings import MatrixSettings
from simulations import demo
from simulations.demo_settings import DemoSettings
from speculative.settings import SpeculativeSettings
from split.settings import SplitSettings
from split.training.settings import SplitTrainSettings
from tests.federated import on_jsonl, write_dialogues

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


@pytest.mark.real
def test_every_part_gives_its_figures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The federation without Ray, which has tests of its own."""
    data = write_dialogues(tmp_path / "data.jsonl", 20)
    settings = settings_for(
        tmp_path,
        federated=on_jsonl(data, 2, "project.workers=1", "project.baseline=central"),
        verifier=RANDOM,
        drafter=[*RANDOM, "project.max_new_tokens=8", "project.check=true"],
        split=[*RANDOM, "project.local_shards=2", "project.max_new_tokens=8"],
        split_training=[
            *RANDOM, "project.local_shards=2", "project.steps=2", "project.micro_batches=2",
            "project.optimization.batch_size=2", "project.data.sequence_length=64", "project.data.source=jsonl",
            f"project.data.path={data}",
        ],
        matrix=["model=random", "project.context=32", "project.sessions=choice(1)", f"matrix.results={tmp_path}/cells"],
    )  # fmt: skip
    with caplog.at_level(logging.INFO, logger="simulations.demo"):
        figures = demo.run(settings, Run(tmp_path / "demo"))
    assert set(demo.PARTS) < set(figures)
    assert all(figures[part]["status"] == "ok" for part in demo.PARTS)
    assert figures["federated"]["eval_loss_after"] < figures["federated"]["eval_loss_before"]
    assert (figures["speculative"]["new_tokens"], figures["speculative"]["flips"]) == (8, [])
    assert figures["plots"]
    assert all(f">{part.replace('_', ' ').capitalize()}<" in figures["report"].read_text() for part in demo.PARTS)
    assert all(Path(plot).is_relative_to(tmp_path / "demo") for plot in figures["plots"])
    assert len(figures["split"]["token_ids"]) == 8
    assert len(figures["split_training"]["loss_by_step"]) == 2
    assert (figures["matrix"]["ok"], figures["matrix"]["skipped"]) == (1, 0)
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(",")[0] for line in said if " of " in line.partition(",")[0]] == [
        f"{number} of {len(demo.PARTS)}" for number in range(1, len(demo.PARTS) + 1)
    ]


def test_what_make_demo_tells_its_parts_are_words_that_they_know() -> None:
    """Each list composes as its own command's settings, so that minutes do not end in a typo."""
    project = compose_settings("demo", "", DemoSettings).project
    told = [
        ("fed_learn", project.federated, FederatedSettings),
        ("spec_decoding", project.verifier, SpeculativeSettings),
        ("spec_decoding", project.drafter, SpeculativeSettings),
        ("split_inf", project.split, SplitSettings),
        ("split_train", project.split_training, SplitTrainSettings),
    ]
    for config, words, settings_type in told:
        assert compose_settings(config, shlex.join(words), settings_type).seed == 0
    words = sort_words(project.matrix)
    assert len(make_cells(compose_settings("matrix", shlex.join(words.sweep), MatrixSettings).matrix, words)) == 4
    assert len(told) == len(fields(project)) - 2, "all but the matrix and the time limit"
    with pytest.raises(UserError, match=r"^project.part_timeout_seconds must be greater than 0, got 0.0$"):
        compose_settings("demo", "project.part_timeout_seconds=0", DemoSettings)


def test_a_part_that_fails_ends_the_demonstration(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = settings_for(tmp_path, federated=["project.rounds=0"])
    with pytest.raises(RuntimeError, match=r"fed_sim project.rounds=0.* ended with code 2"):
        demo.run(settings, Run(tmp_path / "demo"))
    assert "error: project.rounds must be at least 1, got 0" in capfd.readouterr().err
