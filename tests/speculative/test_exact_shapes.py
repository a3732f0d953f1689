"""Exact shapes: in every dtype the text is the target's own, because every pass has the same shape."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lab.entry import compose_settings
from lab.sampling import Sampling
from lab.settings import UserError
from speculative.drafts import EngineDrafts, RandomDrafts
from speculative.engines import open_target
from speculative.settings import SpeculativeSettings
from tests.random_models import random_model
from tests.speculative.identity import VOCABULARY
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


def _differing(exact_rows: int | None, texts: int) -> int:
    """Tokens that differ in bfloat16 between speculation and the target alone, on the same kind of engine."""
    model = random_model("llama", torch.bfloat16)
    differing = 0
    for index in range(texts):
        alone = decoded_alone(local_engine(model, 2, 128, exact_rows), [index, 5, 9], SAMPLED, 100)
        with bench(local_engine(model, 2, 128, exact_rows)) as verifiers:
            guesser = local_engine(random_model("llama", torch.float32), 1, 128)
            drafts = EngineDrafts(guesser, SAMPLED, VOCABULARY) if index % 2 else RandomDrafts(1, VOCABULARY)
            rounds = speculated(InProcess(verifiers), drafts, request([index, 5, 9], 100, SAMPLED), 7)
        differing += sum(a != b for a, b in zip(alone, tokens(rounds), strict=True))
    return differing


def test_bfloat16_is_identical_in_exact_shapes_and_only_there() -> None:
    assert _differing(8, 4) == 0
    assert _differing(None, 4) > 0, "without exact shapes nothing differed: the test above proves nothing"


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


@pytest.mark.real
def test_smollm2_in_bfloat16_through_two_roles(tmp_path: Path) -> None:
    small = ("tracking=none", "model.dtype=bfloat16", "project.context=192", "project.max_new_tokens=60")
    exact = ("project.exact_shapes=true", "project.sessions=1", "project.max_draft_length=7", "device.threads=1")
    with verifier(*small, *exact) as running:
        own = drafted(running.port, (*small, "project.mode=target_only"), tmp_path / "alone")
        for source in ("ngram", "layers"):
            words = (*small, f"project.draft.source={source}", "project.draft.layers=2", "project.draft.length=4")
            assert drafted(running.port, words, tmp_path / source)["token_ids"] == own["token_ids"]
