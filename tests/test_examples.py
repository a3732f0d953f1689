"""The examples run as they stand, are short, and show what they say."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from lab.engine.sampling import Sampling

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LONGEST = 30
"""Lines of an example."""


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs an example as a user does, with these overrides; returns its variables."""

    def run(name: str, *words: str) -> dict[str, Any]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *words])
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.name)
def test_an_example_is_short_and_says_how_it_is_run(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LONGEST
    assert f"`python examples/{file.name}`" in lines[0]


def test_two_sites_learn(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    example("federated.py", "model=random", "project.data.sequence_length=64")
    lines = capsys.readouterr().out.splitlines()
    before = [float(loss) for loss in lines[0].rsplit("sites ", 1)[1].split(", ")]
    after = [float(line.rsplit(": ", 1)[1]) for line in lines[3:]]
    assert len(before) == len(after) == 2
    assert all(late < early for late, early in zip(after, before, strict=True))


def test_a_speculated_text_is_the_target_s_own(example: Any) -> None:
    """In float64, where the number of rows in a pass changes no token."""
    found = example("speculate.py", "model=random", "model.dtype=float64")
    prompt, text, engine = found["prompt"], found["text"], found["engine"]
    with engine.open(prompt, Sampling.greedy()) as session:
        alone = [*prompt, session.step.next_ids[-1]]
        while len(alone) < len(text):
            alone.append(engine.extend([(session, alone[-1:])], "last")[0].next_ids[-1])
    assert text == alone
    assert found["passes"] < len(text) - len(prompt), "some draft tokens were right"


def test_two_shards_write_what_one_writes(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = example("split_generate.py", "model=random")
    assert capsys.readouterr().out.rstrip("\n") == found["whole"] == found["write"](2)


def test_two_shards_learn_what_one_learns(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    example("split_train.py", "model=random", "project.data.sequence_length=64")
    assert capsys.readouterr().out.count(" over two shards, ") == 5


@pytest.mark.real
def test_the_default_model_repeats_what_it_has_read(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = example("speculate.py")
    assert "Tuesday, Wednesday, Thursday" in capsys.readouterr().out.split("Sunday, Monday,", 1)[1]
    assert found["passes"] <= (len(found["text"]) - len(found["prompt"])) / 4
