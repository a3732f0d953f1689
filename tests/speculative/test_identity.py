"""Speculation does not change the text: `tests.speculative.identity` at a small size, and its negative controls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from lab.engine import Request, TargetStep
from lab.kv import CacheFull
from lab.sampling import Sampling
from speculative import verifying
from tests.speculative.identity import SAMPLINGS, SOURCES, compare, compare_everything


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_no_token_differs_in_float64() -> None:
    compared = compare_everything(1400, new_tokens=40)
    assert compared.tokens >= 1400
    assert compared.differing == 0
    assert compared.sources == set(SOURCES)
    assert compared.accepted > 250, "guesses were hardly ever right: nothing was proved"
    assert compared.shared_passes > 30, "texts never shared a pass: nothing was proved about batches"


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_verifier_that_accepts_one_guess_too_many_is_seen(
    monkeypatch: pytest.MonkeyPatch, sampling: Sampling
) -> None:
    right = verifying.accepted_length

    def one_more(guesses: Sequence[int], chosen: Sequence[int], nll: Sequence[float], threshold: float | None) -> int:
        return min(len(guesses), right(guesses, chosen, nll, threshold) + 1)

    monkeypatch.setattr(verifying, "accepted_length", one_more)
    assert compare("noisy", sampling, 1, 60, 5, 1).differing > 0


def test_a_verifier_that_mixes_up_the_texts_of_a_batch_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    extend = verifying.Verifier._extend

    def mixed_up(
        verifier: verifying.Verifier, requests: Sequence[Request], *, want_all: bool
    ) -> list[TargetStep | CacheFull]:
        steps = extend(verifier, requests, want_all=want_all)
        return steps[::-1] if want_all and len({len(ids) for _, ids in requests}) == 1 else steps

    monkeypatch.setattr(verifying.Verifier, "_extend", mixed_up)
    assert compare("none", SAMPLINGS[1], 4, 30, 5, 1).differing > 0
