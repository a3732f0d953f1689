"""What is proved before it runs: families by name, refusals by name, and rules that are broken on purpose."""

from __future__ import annotations

import logging
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig

from lab.command.ending import Stopped
from lab.models import proof as proof_module
from lab.models.proof import Use, prove, require, try_out
from lab.settings import UserError
from tests.architectures import NAMED, NAMES, STATEFUL, TABLE, USES, config_of, row_of

SAMPLE = random.Random(0).sample(sorted(set(NAMES) - set(NAMED)), 4)
"""Rows of the table that are tried again; all of them by `python -m tests.architectures`."""


@pytest.mark.parametrize("name", NAMED)
def test_families_that_people_ask_for_are_proved(name: str) -> None:
    found = try_out(config_of(name))
    assert (found.engine, found.slices, found.training) == (None, None, None)


@pytest.mark.parametrize("name", STATEFUL)
def test_what_keeps_another_state_is_refused_by_name(name: str, tmp_path: Path) -> None:
    config = config_of(name)
    for use in (Use.engine, Use.slices):
        with pytest.raises(UserError, match=rf"must be of an architecture that is proved for .*, got {name}: \w+"):
            require(config, use, str(tmp_path))


def test_attention_that_is_local_without_saying_so_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"got gpt_neo: with a cache, .* (the next token is|cross-entropy is off)"):
        require(AutoConfig.for_model("gpt_neo"), Use.engine, str(tmp_path))


# Rules broken on purpose


def _changed(change: Callable[[Any, Tensor], Tensor]) -> Callable[..., Tensor]:
    """`run_slice` whose hidden states between slices are changed."""
    run = proof_module.run_slice

    def changed(model: Any, states: Tensor, **options: Any) -> Tensor:
        leaving = run(model, states, **options)
        return leaving if model.cut.head else change(model, leaving)

    return changed


def _normed(model: Any, hidden_BTH: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(hidden_BTH, hidden_BTH.shape[-1:])


def _counting_from_zero(read: Callable[..., Any]) -> Callable[..., Any]:
    """Slices whose layers have the rotary embeddings of those with their number within the slice."""

    def reading(*arguments: Any, **options: Any) -> Any:
        model = read(*arguments, **options)
        layers = model.model.layers
        for number in model.cut.layers:
            own = number - model.cut.layers.start
            layers[number].self_attn.use_rope = model.config.no_rope_layers[own]
        return model

    return reading


def _from_another_layer(read: Callable[..., Any]) -> Callable[..., Any]:
    """Slices that read one matrix of layer 1 out of layer 2's place."""

    def reading(config: Any, tensors: Any, *arguments: Any, **options: Any) -> Any:
        name = "model.layers.{}.mlp.down_proj.weight"
        return read(config, {**tensors, name.format(1): tensors[name.format(2)]}, *arguments, **options)

    return reading


@pytest.mark.parametrize(
    ("fault", "family", "inference", "training"),
    [
        ("norm twice", "phi", "logits of slices", "logits of slices that learn"),
        ("counter from 0", "smollm3", "logits of slices", "logits of slices that learn"),
        ("multiplier twice", "granite", "logits of slices", "logits of slices that learn"),
        ("another layer's tensor", "llama", "logits of slices", "logits of slices that learn"),
        ("a gradient is lost", "llama", None, "gradient"),
    ],
)
def test_a_rule_that_is_broken_is_seen(
    fault: str, family: str, inference: str | None, training: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "norm twice":
        monkeypatch.setattr(proof_module, "run_slice", _changed(_normed))
    elif fault == "multiplier twice":
        monkeypatch.setattr(proof_module, "run_slice", _changed(lambda model, hidden_BTH: hidden_BTH * 12.0))
    elif fault == "a gradient is lost":
        monkeypatch.setattr(proof_module, "run_slice", _changed(lambda model, hidden_BTH: hidden_BTH.detach().clone()))
    else:
        broken = _counting_from_zero if fault == "counter from 0" else _from_another_layer
        monkeypatch.setattr(proof_module, "read_slice", broken(proof_module.read_slice))
    config = config_of(family)
    if family == "granite":
        config.embedding_multiplier = 12.0
    found = try_out(config)
    assert found.engine is None
    assert (found.slices is None) if inference is None else re.match(inference, str(found.slices))
    assert found.training is not None
    assert re.search(training, found.training) or fault == "a gradient is lost"


# What is kept


def test_a_trial_is_made_once_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of("llama")
    with caplog.at_level(logging.INFO, logger="lab.models.proof"):
        first = prove(config, tmp_path)
    assert "trying llama in small" in caplog.text
    monkeypatch.setattr(proof_module, "try_out", lambda config: pytest.fail("tried again"))
    assert prove(config, tmp_path) == first
    config.hidden_size *= 2  # only larger: the twin is the same
    config.num_attention_heads *= 2
    config.num_key_value_heads *= 2
    assert prove(config, tmp_path) == first
    config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(pytest.fail.Exception):
        prove(config, tmp_path)


def test_a_broken_record_is_made_anew(tmp_path: Path) -> None:
    config = config_of("llama")
    first = prove(config, tmp_path)
    [file] = tmp_path.glob("*.json")
    file.write_text('{"engine": null}')
    assert prove(config, tmp_path) == first
    assert len(file.read_text()) > 100


@pytest.mark.parametrize("text", ["null", "5", '"abc"', "[]", "[" * 10**5, "{}"])
def test_a_record_that_is_none_is_made_anew(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("llama")
    outcome = proof_module.Proof("llama", None, None, None, None)
    monkeypatch.setattr(proof_module, "try_out", lambda config: outcome)
    (tmp_path / f"{proof_module._digest(config)}.json").write_text(text)
    assert prove(config, tmp_path) == outcome


NO_SPACE = "No space left on device"


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("tempfile.TemporaryDirectory", OSError(NO_SPACE)),
        ("_Trial", SafetensorError(f"Error while serializing: I/O error: {NO_SPACE} (os error 28)")),
        ("find_structure", MemoryError("none")),
        ("_try_engine", RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")),
    ],
)
def test_a_machine_without_room_says_nothing_of_an_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(f"lab.models.proof.{where}", full)
    line = f"must have room for a trial of the model, got {type(error).__name__}: {error}"
    with pytest.raises(UserError, match=re.escape(line)):
        prove(config_of("llama"), tmp_path)
    assert not list(tmp_path.iterdir()), "and nothing is kept of it"


@pytest.mark.parametrize("where", ["_Trial", "_try_engine"])
def test_a_signal_that_a_library_makes_an_error_of_says_nothing_of_an_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def stopped(*arguments: object, **options: object) -> None:
        raise SystemError("returned a result with an exception set") from Stopped(signal.SIGTERM)

    monkeypatch.setattr(f"lab.models.proof.{where}", stopped)
    with pytest.raises(Stopped, match="terminated"):
        prove(config_of("llama"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("context", [8, 16, 30])
def test_short_contexts_are_no_fault_of_an_architecture(context: int) -> None:
    config = config_of("llama")
    config.max_position_embeddings = context
    found = try_out(config)
    assert (found.engine, found.slices, found.training) == (None, None, None)


def test_layers_that_are_dropped_at_random_are_refused_for_training() -> None:
    config = config_of("opt")
    config.layerdrop = 0.1
    found = try_out(config)
    assert found.slices is None
    assert "layerdrop=0.1 drops whole layers" in str(found.training)


# The table of docs/


def test_the_table_has_every_architecture_and_none_is_missing() -> None:
    pattern = r"^\| (\S+)" + r" \| (yes|no)" * len(USES) + r" \|$"
    rows = re.findall(pattern, TABLE.read_text(), re.M)
    assert [row[0] for row in rows] == list(NAMES)
    proved = [row[0] for row in rows if row[2] == "yes"]
    assert len(proved) >= 90
    assert set(NAMED) <= set(proved)
    assert not set(STATEFUL) & {row[0] for row in rows if "yes" in row[1:3]}
    for use in ("int8", "int4"):
        packed = {row[0] for row in rows if row[1 + USES.index(use)] == "yes"}
        assert set(NAMED) <= packed <= set(proved)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_row_of_the_table_is_what_a_trial_gives(name: str) -> None:
    row = row_of(name)
    said = ["no" if getattr(row, use) else "yes" for use in USES]
    assert f"| {name} | {' | '.join(said)} |\n" in TABLE.read_text()
