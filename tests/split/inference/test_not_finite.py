"""NaN and infinity between shards and behind the last one: the shard and the position are named, neighbours go on."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lab.command.entry import Run, compose_settings
from lab.engine.base import TargetStep, check_finite
from lab.engine.not_finite import NotFinite
from lab.engine.sampling import Sampling
from lab.engine.sampling_head import sampling_fields
from lab.settings import ModelSettings, UserError
from split import infer
from split.chain.boundary import Boundary
from split.chain.messages import FaultCode
from split.inference import generate as generating
from split.inference.coding import encode
from split.inference.messages import Open, Pass, Piece, Steps, Stopped
from split.inference.sharded_model import ShardedModel
from split.inference.stage import InferenceStage
from split.settings import SplitSettings
from split.transport.base import Message
from split.transport.inproc import InProcess
from tests.poison import mark, poison
from tests.random_models import random_model
from tests.split.chains import SAMPLED, as_engine, local, saved_model, shards, some_ids

MARKED, CLEAN = 90, 91
CUTS = (0, 1, 3, 4)


def _marked(folder: Path, dtype: torch.dtype = torch.float32) -> ModelSettings:
    settings = saved_model("llama", folder, dtype)
    model = random_model("llama", dtype)
    mark(model, MARKED)
    model.save_pretrained(folder)
    return settings


def _poisoned(settings: ModelSettings, boundary: Boundary, layer: int, value: float) -> ShardedModel:
    made = shards(settings, CUTS)
    for shard in made:
        if layer in shard.layers:
            poison(shard._model.get_decoder().layers[layer], value)
    return as_engine(InProcess([InferenceStage(shard, boundary) for shard in made]))


def _extended(engine: Any, token: int) -> tuple[list[TargetStep], str]:
    """Two texts in one extend: the second one has `token` among its ids, in the third of four chunks."""
    ids = [token if place == 17 else id_ for place, id_ in enumerate(some_ids(25, 2))]
    told = replace(SAMPLED, top_tokens=3)
    with engine.open(some_ids(5, 1), told) as neighbour, engine.open(some_ids(3, 3), told) as text:
        try:
            return engine.extend([(neighbour, some_ids(25, 4)), (text, ids)], "all"), ""
        except NotFinite as found:
            assert engine.extend([(neighbour, [1])], "last")[0].next_ids
            return found.steps, str(found)


@pytest.mark.parametrize("boundary", Boundary)
def test_the_shard_and_the_position_are_named_and_the_neighbour_has_the_same_steps(
    tmp_path: Path, boundary: Boundary
) -> None:
    settings = _marked(tmp_path)
    for layer, value in ((0, math.nan), (1, math.inf), (2, math.nan), (3, -math.inf)):
        engine = _poisoned(settings, boundary, layer, value)
        clean, nothing = _extended(engine, CLEAN)
        spoilt, fault = _extended(engine, MARKED)
        first, last = next((a, b) for a, b in itertools.pairwise(CUTS) if a <= layer < b)
        assert fault == f"the hidden states of position 20 hold NaN or infinity in the shard of layers {first}:{last}"
        assert nothing == ""
        assert [step.fault for step in spoilt] == ["", fault]
        assert spoilt[0] == clean[0]
        again, nothing = _extended(engine, CLEAN)
        assert (again, nothing) == (clean, ""), "the slot kept something of the text that ended"


def test_a_whole_model_says_the_same(tmp_path: Path) -> None:
    engine = local(_marked(tmp_path))
    poison(engine._model.get_decoder().layers[2])
    clean, nothing = _extended(engine, CLEAN)
    spoilt, fault = _extended(engine, MARKED)
    assert (nothing, fault) == ("", "the hidden states of position 20 hold NaN or infinity")
    assert spoilt[0] == clean[0]
    assert _extended(engine, CLEAN) == (clean, "")
    with pytest.raises(NotFinite, match="the hidden states of position 2 hold NaN or infinity"):
        engine.open([1, 2, MARKED], Sampling.greedy())
    assert not any(engine.cache.lengths), "a slot was not given back"


@pytest.mark.parametrize("boundary", Boundary)
def test_what_does_not_fit_a_boundary_is_named(tmp_path: Path, boundary: Boundary) -> None:
    """float64 has numbers that no boundary has; a hidden state of 1e100 is finite at the shard itself."""
    engine = _poisoned(_marked(tmp_path, torch.float64), boundary, 2, 1e100)
    _, fault = _extended(engine, MARKED)
    assert fault == (
        f"the hidden states of position 20 do not fit the boundary {boundary.name} behind the shard of layers 1:3"
    )
    assert _extended(engine, CLEAN)[1] == ""


def test_what_a_boundary_rounds_up_does_not_fit_float16(tmp_path: Path) -> None:
    """65504 is float16's largest number and 65536 in bfloat16."""
    settings = saved_model("llama", tmp_path, torch.float16)
    stage = InferenceStage(shards(settings, (0, 2, 4))[1], Boundary.bfloat16)
    for number in (1, 2):
        list(stage.take(Message(number, Open(tokens=100, **sampling_fields(Sampling.greedy())))))
    hidden_NH = torch.zeros(4, 32, dtype=torch.float16)
    hidden_NH[3, 0] = 65504
    pieces = [Piece(session=number, position=0, count=2, is_first=True, is_last=True) for number in (1, 2)]
    run = Pass(read_all=False, pieces=pieces)
    [(_, answer)] = stage.take(Message(7, run, encode(hidden_NH, Boundary.bfloat16)))
    text = "the hidden states of position 1 do not fit torch.float16 before the shard of layers 2:4"
    assert answer.head == Steps(stopped=[Stopped(session=2, code=FaultCode.unfit, text=text)])


def test_a_text_that_met_nan_can_only_be_closed(tmp_path: Path) -> None:
    """Not even after shards were lost: where rebuilding a sound text gives NaN, its next extend says so."""
    engine = _poisoned(_marked(tmp_path), Boundary.float32, 0, math.nan)
    session = engine.open([1], SAMPLED)
    with pytest.raises(NotFinite):
        engine.extend([(session, [2, MARKED])], "last")
    session.position = 1
    with pytest.raises(ValueError, match=r"session must be sound, got one .*position 2"):
        engine.extend([(session, [3])], "last")
    other = engine.open([1, 2, 3], SAMPLED)
    engine._journals[other.key].ids[1] = MARKED
    engine._rebuild(engine._journals[other.key], 0.0)
    assert other.fault == "the hidden states of position 1 hold NaN or infinity in the shard of layers 0:1"


def test_what_was_generated_before_the_fault_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = f"model=random 'model.cache_dir={tmp_path}' tracking=none project.transport=inproc project.local_shards=2"
    settings = compose_settings("split_inf", words, SplitSettings)
    settings.prompt = "hello"
    expected = infer.run(settings, Run(tmp_path))["token_ids"]
    extend = ShardedModel.extend
    calls = itertools.count(1)

    def fail(engine: ShardedModel, requests: Any, want: Any) -> list[TargetStep]:
        steps = extend(engine, requests, want)
        fault = "the hidden states of position 7 hold NaN" if next(calls) > 4 else ""
        return check_finite([replace(step, fault=fault) for step in steps])

    monkeypatch.setattr(ShardedModel, "extend", fail)
    with pytest.raises(NotFinite, match="the hidden states of position 7") as ended:
        infer.run(settings, place := Run(tmp_path))
    figures = place.so_far()
    assert (ended.value.exit_code, figures["token_ids"]) == (1, expected[: len(figures["token_ids"])])
    assert len(figures["token_ids"]) == 4


def test_a_prompt_with_an_id_without_a_row_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = f"model=random 'model.cache_dir={tmp_path}' tracking=none project.transport=inproc project.local_shards=2"
    settings = compose_settings("split_inf", words, SplitSettings)
    settings.prompt = "hello"
    monkeypatch.setattr(generating, "input_ids", lambda *given: [1, 300])
    with pytest.raises(UserError, match=r"^prompt must hold tokens that the model has rows for, ids below 259, got "):
        infer.run(settings, Run(tmp_path))
