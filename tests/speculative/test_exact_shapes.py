"""Exact shapes: in every dtype the text is the target's own, because every pass has the same shape."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lab.entry import compose_settings
from lab.sampling import Sampling
from lab.settings import UserError
from speculative.drafts import EngineDrafts, RandomDrafts
from speculative.engines import open_target
from speculative.settings import SpeculativeSettings
from tests.random_models import VOCABULARY, random_model
from tests.speculative.in_process import InProcess, bench, decoded_alone, local_engine, request, speculated, tokens
from tests.speculative.processes import drafted, verifier

SAMPLED = Sampling(seed=3, temperature=1.0, top_k=0, top_p=1.0)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_bfloat16_is_identical_in_exact_shapes() -> None:
    model = random_model("llama", torch.bfloat16)
    accepted = 0
    for index in range(4):
        alone = decoded_alone(local_engine(model, 2, 128, 8), [index, 5, 9], SAMPLED, 100)
        with bench(local_engine(model, 2, 128, 8)) as verifiers:
            guesser = local_engine(random_model("llama", torch.float32), 1, 128)
            drafts = EngineDrafts(guesser, SAMPLED, VOCABULARY) if index % 2 else RandomDrafts(1, VOCABULARY)
            rounds = speculated(InProcess(verifiers), drafts, request([index, 5, 9], 100, SAMPLED), 7)
        assert tokens(rounds) == alone
        accepted += sum(done.accepted for done in rounds)
    assert accepted > 100


def _settings(*words: str) -> SpeculativeSettings:
    overrides = " ".join(("model=random", "tracking=none", "project.exact_shapes=true", *words))
    return compose_settings("spec_decoding", overrides, SpeculativeSettings)


def test_they_are_refused_where_they_cannot_hold() -> None:
    torch.set_num_threads(2)
    with pytest.raises(UserError, match=r"^project\.exact_shapes: torch threads must be 1 with exact shapes"):
        open_target(_settings("project.context=64"), CPU)
    torch.set_num_threads(1)
    with pytest.raises(UserError, match=r"^project\.cache_limit_bytes must hold one pass of exact shapes"):
        open_target(_settings("project.cache_limit_bytes=1048576"), CPU)


def _flips_of_smollm2(tmp_path: Path, *shapes: str) -> list[dict[str, Any]]:
    """Tokens of a bfloat16 text, drafted badly so that shapes change all the time, that the target alone says not."""
    words = ("tracking=none", "model.dtype=bfloat16", "device.threads=1", "project.context=192", "project.check=true")
    bad = ("project.draft.source=random", "project.draft.length=4", "project.max_new_tokens=90")
    with verifier(*words, "project.sessions=1", "project.max_draft_length=7", *shapes) as running:
        return list(drafted(running.port, (*words, *bad), tmp_path, "Tell me a story about a fox.")["flips"])


@pytest.mark.real
def test_smollm2_in_bfloat16_has_no_flips_in_exact_shapes(tmp_path: Path) -> None:
    assert _flips_of_smollm2(tmp_path, "project.exact_shapes=true") == []


@pytest.mark.real
def test_smollm2_in_bfloat16_has_flips_without_them(tmp_path: Path) -> None:
    """The negative control: flips are seen, counted, and reported with their margins."""
    flips = _flips_of_smollm2(tmp_path)
    if not flips:
        pytest.skip("the kernels of this machine give the same bits for every shape")
    for flip in flips:
        assert flip["token"] != flip["alone"]
        assert 0 <= flip["margin"] <= 0.5, "no tie: the two logits are further apart than bfloat16 can move them"
