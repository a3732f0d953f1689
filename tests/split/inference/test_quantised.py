"""In int8 and int4 a text is the same from a whole model, from two shards and from three, compiled too."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lab.engine.base import Engine
from lab.engine.compiled import COMPILERS, Compiler
from lab.engine.sampling import Sampling
from lab.models.conversion import byte_tokenizer
from lab.models.packed import WIDE_ROWS
from lab.models.sources import load_model
from lab.settings import ModelSettings, Quantization
from split.chain.boundary import Boundary
from split.inference.stage import InferenceStage
from split.transport.inproc import InProcess
from tests.split.chains import SAMPLED, as_engine, local_engine, saved_model, shards, some_ids

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
INTEGERS = (Quantization.int8, Quantization.int4)
NEW_TOKENS = 60

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSettings:
    """One for all tests: what was compiled stays beside it."""
    folder = tmp_path_factory.mktemp("model")
    byte_tokenizer().save_pretrained(folder)
    return saved_model("qwen3", folder, torch.bfloat16, **SIZES)


def _texts(engine: Engine) -> list[list[int]]:
    """A long prompt greedily and a short one sampled: each alone, then both at once."""
    asked = [(some_ids(40, 1), Sampling.greedy()), (some_ids(5, 2), SAMPLED)]
    return [*(text for one in asked for text in _written(engine, [one])), *_written(engine, asked)]


def _written(engine: Engine, asked: Sequence[tuple[list[int], Sampling]]) -> list[list[int]]:
    sessions = [engine.open(prompt, sampling) for prompt, sampling in asked]
    texts = [list(session.step.next_ids[-1:]) for session in sessions if session.step is not None]
    while len(texts[0]) < NEW_TOKENS:
        requests = [(session, text[-1:]) for session, text in zip(sessions, texts, strict=True)]
        for text, step in zip(texts, engine.extend(requests, "last"), strict=True):
            text += step.next_ids
    for session in sessions:
        session.close()
    return texts


@pytest.mark.parametrize(
    "compiles",
    [
        False,
        pytest.param(True, marks=pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")),
    ],
    ids=["eager", "compiled"],
)
@pytest.mark.parametrize("quantization", INTEGERS)
def test_whole_two_shards_and_three_say_the_same(
    quantization: Quantization, compiles: bool, model: ModelSettings
) -> None:
    packed = replace(model, quantization=quantization)
    compiler = Compiler(True, True, True, Path(model.cache_dir) / "compiled") if compiles else None
    whole = local_engine(load_model(packed, torch.device("cpu")).model, compiler)
    assert whole.is_compiled is compiles
    texts = _texts(whole)
    assert texts[:2] == texts[2:] or not compiles, "a compiled row does not depend on its company"
    for cuts in ((0, 2, 4), (0, 1, 3, 4)):
        parts = shards(packed, cuts, compiler=compiler)
        assert all((part._compiled is not None) is compiles for part in parts)
        engine = as_engine(InProcess([InferenceStage(part, Boundary.bfloat16) for part in parts]))
        assert _texts(engine) == texts
    if not compiles:
        assert _texts(local_engine(load_model(model, torch.device("cpu")).model)) != texts, "the control"


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")
def test_a_text_that_shards_lost_goes_on_to_the_same_bits(model: ModelSettings) -> None:
    """Its prompt is long enough to be computed in chunks; it is computed anew twice, in the middle of the text."""
    packed = replace(model, quantization=Quantization.int4)
    compiler = Compiler(True, True, True, Path(model.cache_dir) / "compiled")
    parts = [InferenceStage(part, Boundary.bfloat16) for part in shards(packed, (0, 2, 4), compiler=compiler)]
    engine = as_engine(InProcess(parts))
    engine._chunk = 64
    found = []
    for losses in ((), (20, 45)):
        with engine.open(some_ids(40, 1), Sampling.greedy()) as session:
            nll: list[float] = []
            while len(nll) < NEW_TOKENS:
                if len(nll) in losses:
                    engine._rebuild(engine._journals[session.key], time.monotonic() + 60)
                assert session.step is not None
                nll += session.step.next_nll[-1:]
                engine.extend([(session, session.step.next_ids[-1:])], "last")
            found.append(nll)
    assert found[0] == found[1]


def test_a_long_prompt_does_not_depend_on_its_company(model: ModelSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts at once, one of which is long enough to meet widened weights; layers are not compiled."""
    packed = replace(model, quantization=Quantization.int8)
    whole = local_engine(load_model(packed, torch.device("cpu")).model)
    split = as_engine(InProcess([InferenceStage(part, Boundary.bfloat16) for part in shards(packed, (0, 2, 4))]))
    prompts = [some_ids(WIDE_ROWS + 5, 1), some_ids(WIDE_ROWS - 5, 2)]
    for engine in (whole, split):
        engine._chunk = 2 * WIDE_ROWS
        alone = [_nll(engine, [prompt])[0] for prompt in prompts]
        assert _nll(engine, prompts) == alone
    monkeypatch.setattr("lab.engine.base.MOST_ROWS", 1000)
    for engine in (whole, split):
        assert _nll(engine, prompts) != [_nll(engine, [prompt])[0] for prompt in prompts], "the control"


def _nll(engine: Engine, prompts: Sequence[list[int]]) -> list[list[float]]:
    """Of the tokens of prompts that are computed at once."""
    sessions = [engine.open([], Sampling.greedy()) for _ in prompts]
    steps = engine.extend(list(zip(sessions, prompts, strict=True)), "all")
    for session in sessions:
        session.close()
    return [step.nll[1:] for step in steps]
