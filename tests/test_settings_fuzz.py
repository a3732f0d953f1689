"""The fuzz of settings at a small size, and that it sees what it looks for."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from lab.command.entry import compose_config
from lab.settings import UserError
from tests import settings_fuzz
from tests.settings_fuzz import change_settings, commands_that_end, hint_of, keys_of, outcome_of, reach_work
from tests.test_conf import COMMANDS

CHANGED = 150
REACHED = 4


def test_wrong_values_become_settings_or_one_line() -> None:
    came = change_settings(COMMANDS, CHANGED, seed=1)
    assert not came.faults
    assert came.tried == came.taken + came.refused == CHANGED
    assert came.taken > 0 < came.refused


def test_wrong_values_that_reach_the_work_end_it_well_or_in_one_line(tmp_path: Path) -> None:
    chosen = [each for each in commands_that_end(tmp_path) if each.name in ("split.plan", "fl.sizes")]
    came = reach_work(chosen, REACHED, seed=1, folder=tmp_path)
    assert not came.faults
    assert came.tried == REACHED


@pytest.mark.parametrize("error", [OverflowError("too large"), UserError("two\nlines"), UserError("")])
def test_a_traceback_and_two_lines_are_seen(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""

    def fails(config: object, schema: object) -> None:
        raise error

    monkeypatch.setattr(settings_fuzz, "settle", fails)
    assert change_settings({"link": COMMANDS["link"]}, 20, seed=1).faults


@pytest.mark.parametrize("value", ["[[1]]", "[{}]", "[{a:1}]", "${seed}", "${device}"])
def test_lists_of_texts_and_numbers_hold_nothing_else(value: str) -> None:
    """OmegaConf lets lists and groups in, and whatever is referred to."""
    for name in ("split_inf", "spec_decoding", "matrix", "doctor"):
        config, seen = compose_config(name, ["model=random"]), 0
        for key in keys_of(COMMANDS[name]):
            if hint_of(COMMANDS[name], key) in (list[str], list[int], list[float]):
                line, fault = outcome_of(config, f"{key}={value}", COMMANDS[name])
                assert fault is None
                assert str(line).startswith(f"{key} must be a list, each ")
                seen += 1
        assert seen


def test_every_key_is_changed() -> None:
    keys = list(keys_of(COMMANDS["split_train"]))
    assert {"seed", "project.lora.rank", "model.architecture.context"} <= set(keys)
    words = itertools.islice(settings_fuzz.words_of(COMMANDS["split_train"], seed=1), len(keys))
    assert len(
        {word.lstrip("+~").partition("=")[0].removesuffix(".deeper").removesuffix("x") for word in words}
    ) > 0.9 * len(keys)
