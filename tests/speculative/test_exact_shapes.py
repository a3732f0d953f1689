"""Exact shapes: in every dtype the text is the target's own, because every pass has the same shape."""

from __future__ import annotations

import pytest
import torch

from lab.command.entry import compose_settings
from lab.engine.sampling import Sampling
from lab.models.sources import load_tokenizer_only
from lab.settings import UserError
from lab.text.prompts import prompt_ids
from speculative.drafter.check import Flip
from speculative.drafter.sources import EngineDrafts
from speculative.drafts import RandomDrafts
from speculative.settings import SpeculativeSettings
from speculative.verifier.target import open_target
from tests.random_models import VOCABULARY, random_model
from tests.speculative.identity import Subject
from tests.speculative.in_process import (
    InProcess,
    bench,
    decoded_alone,
    flips_alone,
    local_engine,
    request,
    speculated,
    tokens,
)

SAMPLED = Sampling(seed=3, temperature=1.0, top_k=0, top_p=1.0)
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def test_bfloat16_is_identical_in_exact_shapes() -> None:
    model = random_model("llama", torch.bfloat16)
    accepted = 0
    for index in range(2):
        alone = decoded_alone(local_engine(model, 2, 128, 8), [index, 5, 9], SAMPLED, 80)
        with bench(local_engine(model, 2, 128, 8)) as verifiers:
            guesser = local_engine(random_model("llama", torch.float32), 1, 128)
            drafts = EngineDrafts(guesser, SAMPLED, VOCABULARY) if index % 2 else RandomDrafts(1, VOCABULARY)
            rounds = speculated(InProcess(verifiers), drafts, request([index, 5, 9], 80, SAMPLED, length=7))
        assert tokens(rounds) == alone
        accepted += sum(done.accepted for done in rounds)
    assert accepted > 40


def _settings(*words: str) -> SpeculativeSettings:
    overrides = " ".join(("model=random", "tracking=none", "project.exact_shapes=true", *words))
    return compose_settings("spec_decoding", overrides, SpeculativeSettings)


def test_they_are_refused_where_they_cannot_hold() -> None:
    torch.set_num_threads(2)
    with pytest.raises(UserError, match=r"^project\.exact_shapes: torch threads must be 1 with exact shapes"):
        open_target(_settings("project.context=64"), CPU)
    with pytest.raises(UserError, match=r"^device\.compile must be false or auto with project\.exact_shapes, got True"):
        _settings("device.compile=true")
    torch.set_num_threads(1)
    with pytest.raises(UserError, match=r"^project\.cache_limit_bytes must hold one pass of exact shapes"):
        open_target(_settings("project.cache_limit_bytes=1048576"), CPU)


@pytest.fixture(scope="module")
def smollm2() -> Subject:
    words = ("model=smollm2_135m", "model.dtype=bfloat16", "device.threads=1", "tracking=none")
    asked = prompt_ids(load_tokenizer_only(_settings("model=smollm2_135m").model), "Tell me a story about a fox.", True)
    return Subject(words, [asked])


def _flips(subject: Subject, exact_rows: int | None) -> list[Flip]:
    """Tokens of a bfloat16 text, drafted badly so that shapes change all the time, that the target alone says not."""
    [prompt] = subject.prompts
    with bench(local_engine(subject.model, 1, 192, exact_rows)) as verifiers:
        asked = request(prompt, 60, Sampling.greedy(), length=4)
        text = tokens(speculated(InProcess(verifiers), RandomDrafts(1, 1000), asked))
    return flips_alone(local_engine(subject.model, 1, 192, exact_rows), prompt, Sampling.greedy(), text)


@pytest.mark.real
def test_smollm2_in_bfloat16_has_no_flips_in_exact_shapes(smollm2: Subject) -> None:
    assert _flips(smollm2, exact_rows=8) == []


@pytest.mark.real
def test_smollm2_in_bfloat16_has_flips_without_them(smollm2: Subject) -> None:
    """The negative control: flips are seen, counted, and reported with their margins."""
    flips = _flips(smollm2, exact_rows=None)
    if not flips:
        pytest.skip("the kernels of this machine give the same bits for every shape")
    for flip in flips:
        assert flip.token != flip.alone
        assert 0 <= flip.margin <= 0.5, "no tie: the two logits are further apart than bfloat16 can move them"
