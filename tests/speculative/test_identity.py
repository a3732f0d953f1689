"""Speculation does not change the text: `tests.speculative.identity` at a small size, and its negative controls."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.engine.base import Request, Session, TargetStep
from lab.engine.kv import CacheFull
from lab.engine.sampling import Sampling
from speculative.settings import Mode
from speculative.verifier import scheduler, sequence
from tests.random_models import ARCHITECTURES, random_model
from tests.speculative.identity import (
    SAMPLINGS,
    SOURCES,
    TEXTS,
    Compared,
    Subject,
    cells,
    compare,
    compare_everything,
    quantised_subject,
    random_subject,
    speculated_equals_alone,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def subject() -> Subject:
    return random_subject()


@pytest.mark.parametrize("mode", [Mode["async"], Mode.sync])
def test_no_token_differs_in_float64(subject: Subject, mode: Mode) -> None:
    compared = compare_everything(subject, 20, mode, whole=False)
    assert compared.flips == []
    assert compared.tokens == 1200
    assert len(compared.cells) == 24
    # In mode async many come too late: how many is a matter of the machine.
    least = 250 if mode is Mode.sync else 50
    assert compared.accepted > least, "guesses were hardly ever right: nothing was proved"
    assert compared.shared_passes > 30, "texts never shared a pass: nothing was proved about batches"


def test_no_token_differs_over_compiled_layers_in_int4() -> None:
    subject, compared = quantised_subject("int4"), Compared()
    for source, sampling in itertools.product(("model", "noisy"), SAMPLINGS):
        compared.add(compare(subject, source, sampling, (2, 6, 10, 14), 20))
    assert compared.flips == []
    assert compared.tokens == 320
    assert compared.accepted > 50
    assert compared.shared_passes > 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_texts_of_each_family_are_the_targets_own(architecture: str) -> None:
    compared = speculated_equals_alone(random_model(architecture, torch.float64), seed=1)
    assert compared.flips == []
    assert compared.accepted > 5
    assert compared.shared_passes > 3


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.sampled_from(["llama", "gemma3"]))
def test_drawn_texts_are_the_targets_own(seed: int, architecture: str) -> None:
    assert speculated_equals_alone(random_model(architecture, torch.float64), seed=seed, new_tokens=12).flips == []


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        ("accepted_length", lambda guesses, chosen, nll, threshold: min(len(guesses), len(chosen) - 1)),
        ("until_end", lambda ids, ends: list(ids) if len(ids) < 3 else [*ids[:2], ids[0]]),
    ],
)
def test_a_wrong_rule_is_seen_in_drawn_texts(
    monkeypatch: pytest.MonkeyPatch, place: str, wrong: Callable[..., object]
) -> None:
    monkeypatch.setattr(sequence, place, wrong)
    model, differing = random_model("llama", torch.float64), 0
    for seed in range(3):
        try:
            differing += speculated_equals_alone(model, seed=seed).differing
        except AssertionError as ended:  # a text that grows wrongly may go beyond what it was promised
            differing += "tokens that were promised" in str(ended)
    assert differing


def test_a_cache_that_keeps_what_was_taken_back_is_seen_in_drawn_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rewind that goes back one token too few: a wrong guess stays where the next token should stand."""

    def too_few(session: Session, position: int) -> None:
        session._position = min(session._position, position + 1)

    monkeypatch.setattr(Session, "position", Session.position.setter(too_few))
    model = random_model("llama", torch.float64)
    with pytest.raises((AssertionError, ValueError, IndexError)):
        assert sum(speculated_equals_alone(model, seed=seed).differing for seed in range(3)) == 0


def test_the_whole_comparison_has_every_source_sampling_and_length_alone_and_among_four() -> None:
    found = {
        (source, sampling, length, len(lengths)) for source, sampling, lengths, _ in cells(True) for length in lengths
    }
    assert found == set(itertools.product(SOURCES, SAMPLINGS, range(1, 17), (1, 4)))
    assert sum(len(lengths) for _, _, lengths, _ in cells(True)) == TEXTS == len(found)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_verifier_that_accepts_one_guess_too_many_is_seen(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, sampling: Sampling
) -> None:
    right = sequence.accepted_length

    def one_more(guesses: Sequence[int], chosen: Sequence[int], nll: Sequence[float], threshold: float | None) -> int:
        return min(len(guesses), right(guesses, chosen, nll, threshold) + 1)

    monkeypatch.setattr(sequence, "accepted_length", one_more)
    assert compare(subject, "noisy", sampling, [6], 40).differing > 0


def test_a_verifier_that_mixes_up_the_texts_of_a_batch_is_seen(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    extend = scheduler.Scheduler._extend

    def mixed_up(
        verifier: scheduler.Scheduler, requests: Sequence[Request], *, want_all: bool
    ) -> list[TargetStep | CacheFull]:
        steps = extend(verifier, requests, want_all=want_all)
        return steps[::-1] if want_all and len({len(ids) for _, ids in requests}) == 1 else steps

    monkeypatch.setattr(scheduler.Scheduler, "_extend", mixed_up)
    assert compare(subject, "none", SAMPLINGS[1], [1, 1, 1, 1], 30).differing > 0
