"""Draft models with weights of 8 and 4 bits, and the first layers of such a target: they draft what those weights say,
compiled too, and the text stays the target's."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lab.command.entry import compose_settings
from lab.engine.compiled import COMPILERS, Compiler
from lab.engine.local import LocalEngine, open_local_engine
from lab.engine.sampling import Sampling
from lab.models.conversion import byte_tokenizer
from lab.models.sources import load_model, load_tokenizer_only
from lab.settings import UserError
from speculative.drafter.sources import EngineDrafts, open_drafts
from speculative.settings import SpeculativeSettings
from speculative.vocabulary import token_texts
from tests.random_models import random_model
from tests.speculative.in_process import InProcess, bench, decoded_alone, local_engine, request, speculated, tokens

CPU = torch.device("cpu")
GREEDY, SAMPLED = Sampling.greedy(), Sampling(seed=1, temperature=1.0, top_k=0, top_p=1.0)
PROMPT = [5, 17, 80, 3, 3, 41, 9]
LAYERS = 2
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}

pytestmark = pytest.mark.usefixtures("one_thread")
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="this machine has no C++ compiler")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its cache."""
    place = tmp_path_factory.mktemp("quantised")
    random_model("llama", torch.float32, **SIZES).save_pretrained(place / "model")
    byte_tokenizer().save_pretrained(place / "model")
    return place


def _settings(place: Path, *words: str) -> SpeculativeSettings:
    common = ("model.source=path", f"model.path={place / 'model'}", "model.dtype=float32", "project.context=240")
    said = shlex.join([*common, "model.package=null", f"model.cache_dir={place / 'cache'}", *words])
    return compose_settings("spec_decoding", said, SpeculativeSettings)


def _drafts(settings: SpeculativeSettings, sampling: Sampling = GREEDY) -> EngineDrafts:
    texts = token_texts(load_tokenizer_only(settings.model))
    found = open_drafts(settings, CPU, sampling, texts, len(texts))
    assert isinstance(found, EngineDrafts)
    return found


def _drafted(settings: SpeculativeSettings) -> list[int]:
    drafts = _drafts(settings, SAMPLED)
    drafts.begin(PROMPT)
    return drafts.propose(120)


def _first_layers(settings: SpeculativeSettings) -> Any:
    """The whole model without its last layers: no slice."""
    model: Any = load_model(settings.model, CPU).model
    del model.model.layers[LAYERS:]
    model.config.num_hidden_layers = LAYERS
    return model


def _words(source: str, quantization: str, place: Path) -> tuple[str, ...]:
    if source == "layers":
        return ("project.draft.source=layers", f"project.draft.layers={LAYERS}", f"model.quantization={quantization}")
    named = ("project.draft.source=model", f"project.draft.model={place / 'model'}")
    return (*named, f"project.draft.quantization={quantization}")


@pytest.mark.parametrize("quantization", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("source", ["model", "layers"])
def test_drafts_are_those_of_the_quantised_weights(source: str, quantization: str, place: Path) -> None:
    settings = _settings(place, *_words(source, quantization, place))
    assert any(weight.dtype is torch.uint8 for weight in _engine_of(settings)._model.parameters())
    found = _drafted(settings)
    whole = _settings(place, f"model.quantization={quantization}")
    model = _first_layers(whole) if source == "layers" else load_model(whole.model, CPU).model
    assert found == decoded_alone(local_engine(model, 1), PROMPT, SAMPLED, len(found))
    if quantization != "int8":  # whose weights are so near the model's own that they draft the same tokens
        assert found != _drafted(_settings(place, *_words(source, "none", place))), "the control: other weights"


@needs_compiler
@pytest.mark.parametrize("source", ["model", "layers"])
def test_a_drafter_runs_over_compiled_layers(source: str, place: Path) -> None:
    words = _words(source, "int4", place)
    compiled = _settings(place, *words, "device.compile=true")
    whole = _settings(place, "model.quantization=int4", "device.compile=true")
    model = _first_layers(whole) if source == "layers" else load_model(whole.model, CPU).model
    compiler = Compiler.of(whole.model, whole.device, lasts=True)
    oracle = open_local_engine(model, whole.project, sessions=1, compiler=compiler)
    assert _engine_of(compiled).is_compiled
    found = _drafted(compiled)
    assert found == decoded_alone(oracle, PROMPT, SAMPLED, len(found))
    assert _engine_of(_settings(place, *words)).is_compiled, "auto takes what is there"
    assert not _engine_of(_settings(place, *words, "device.compile=false")).is_compiled


def _engine_of(settings: SpeculativeSettings) -> LocalEngine:
    engine = _drafts(settings)._engine
    assert isinstance(engine, LocalEngine)
    return engine


def test_a_drafter_compiles_nothing_by_itself(place: Path, tmp_path: Path) -> None:
    """Its one text is over before that has paid."""
    settings = _settings(place, *_words("model", "int4", place), f"model.cache_dir={tmp_path}")
    assert not _engine_of(settings).is_compiled
    assert not list(tmp_path.rglob("*.pt2"))


@pytest.mark.parametrize("source", ["model", "layers"])
def test_a_draft_model_that_cannot_be_packed_is_one_line(source: str, tmp_path: Path) -> None:
    random_model("llama", torch.float32, intermediate_size=80).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"widths that int8 can pack, got a llama: .*down_proj has 80 inputs"):
        _drafts(_settings(tmp_path, *_words(source, "int8", tmp_path)))


def test_the_text_stays_the_targets(place: Path) -> None:
    """The target in float64, where no rounding makes another text; its drafter has the same weights in 4 bits."""
    target = random_model("llama", torch.float64, **SIZES)
    drafts = _drafts(_settings(place, *_words("model", "int4", place)))
    with bench(local_engine(target)) as verifiers:
        rounds = speculated(InProcess(verifiers), drafts, request(PROMPT, 60, GREEDY))
    assert tokens(rounds) == decoded_alone(local_engine(target, 1), PROMPT, GREEDY, 60)
    accepted = sum(done.accepted for done in rounds)
    assert 0 < accepted < sum(len(done.draft_ids) for done in rounds), "all or nothing was accepted"
