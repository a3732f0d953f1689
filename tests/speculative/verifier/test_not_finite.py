"""NaN and infinity under speculation: a guess cannot end a text, the target's own fault ends its own text only."""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from lab.engine.local import LocalEngine
from lab.engine.not_finite import NotFinite
from lab.engine.sampling import Sampling
from lab.wire.faults import BadFrame, Peer
from speculative.drafter.loop import RequestFailed, speculate
from speculative.drafter.sources import EngineDrafts
from speculative.drafts import Drafts, NoDrafts, RecordedDrafts
from speculative.messages import WelcomeFrame
from speculative.settings import Mode
from speculative.verifier.first_protocol import FirstProtocol
from speculative.verifier.forward_thread import ForwardThread
from speculative.verifier.scheduler import Scheduler
from tests.poison import mark, poison
from tests.random_models import VOCABULARY, random_model
from tests.speculative.in_process import (
    LIMITS,
    InProcess,
    bench,
    decoded_alone,
    local_engine,
    request,
    speculated,
    tokens,
)

SAMPLING = Sampling(seed=5, temperature=0.8, top_k=40, top_p=0.95)
WELCOME = WelcomeFrame(
    model="", dtype="", vocabulary_size=97, context=240, max_draft_length=16, window=64, end_ids=[], target={}
)
PROMPT, NEIGHBOUR, COUNT = [1, 2, 3, 4, 5], [9, 8, 7], 24


pytestmark = pytest.mark.usefixtures("one_thread")


def _engine(marked: int | None = None, layer: int = 0, value: float = math.nan) -> LocalEngine:
    """The target; with a marked id it fails in one layer where that id stands, and is the same before it."""
    model: Any = random_model("llama", torch.float64)
    if marked is not None:
        mark(model, marked)
        poison(model.get_decoder().layers[layer], value)
    return local_engine(model)


@functools.cache
def _texts() -> list[list[int]]:
    """What the target says to both prompts."""
    return [decoded_alone(_engine(), prompt, SAMPLING, COUNT) for prompt in (PROMPT, NEIGHBOUR)]


def _unsaid() -> int:
    """An id that neither text has."""
    return next(token for token in range(VOCABULARY) if token not in [*PROMPT, *NEIGHBOUR, *_texts()[0], *_texts()[1]])


def _said() -> tuple[int, list[int]]:
    """An id that the first text has in its middle and the other one has not, and the first text up to that id."""
    text, other = _texts()
    token = next(token for token in text[4:-4] if token not in [*text[:4], *other, *PROMPT, *NEIGHBOUR])
    return token, text[: text.index(token) + 1]


class Spoiler(RecordedDrafts):
    """Guesses the text itself, and in every third place an id that spoils the pass."""

    def __init__(self, text: Sequence[int], wrong: int) -> None:
        super().__init__([wrong if place % 3 == 2 else token for place, token in enumerate(text)], 1.0, 0, VOCABULARY)


@pytest.mark.parametrize("mode", [Mode.sync, Mode["async"]], ids=lambda mode: mode.name)
@pytest.mark.parametrize(("layer", "value"), [(0, math.nan), (3, math.inf)])
def test_a_guess_that_spoils_its_pass_changes_no_text(mode: Mode, layer: int, value: float) -> None:
    wrong = _unsaid()
    texts = _texts()
    drafts: list[Drafts] = [Spoiler(texts[0], wrong), RecordedDrafts(texts[1], 1.0, 0, VOCABULARY)]
    with bench(_engine(wrong, layer, value)) as verifiers:

        def draft(index: int) -> list[int]:
            asked = request((PROMPT, NEIGHBOUR)[index], COUNT, SAMPLING, mode)
            return tokens(speculated(InProcess(verifiers, index), drafts[index], asked))

        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(draft, range(2))) == texts


@pytest.mark.parametrize("mode", [Mode.sync, Mode["async"], Mode.target_only], ids=lambda mode: mode.name)
def test_the_targets_own_fault_ends_its_text_and_no_other(mode: Mode) -> None:
    marked, expected = _said()
    neighbour = _texts()[1]
    text: list[int] = []
    with bench(_engine(marked, 1), limits=replace(LIMITS, lookup=(3, 1))) as verifiers:

        def neighbours() -> list[int]:
            return tokens(speculated(InProcess(verifiers, 1), NoDrafts(), request(NEIGHBOUR, COUNT, SAMPLING, mode)))

        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(neighbours)
            place = len(PROMPT) + len(expected) - 1
            rounds = speculate(InProcess(verifiers, 0), NoDrafts(), request(PROMPT, COUNT, SAMPLING, mode), [])
            with pytest.raises(RequestFailed, match=rf"the hidden states of position {place} hold NaN or infinity"):
                text += itertools.chain.from_iterable(done.tokens for done in rounds)
            assert text == expected, "everything before, and nothing made up"
            assert other.result() == neighbour
        assert tokens(speculated(InProcess(verifiers, 2), NoDrafts(), request(NEIGHBOUR, COUNT, SAMPLING))) == neighbour


def test_a_drafter_that_meets_nan_guesses_no_more_and_the_text_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    marked, _ = _said()
    text = _texts()[0]
    with (
        caplog.at_level(logging.WARNING),
        bench(_engine()) as verifiers,
    ):
        drafts = EngineDrafts(_engine(marked, 1), SAMPLING, VOCABULARY)
        rounds = speculated(InProcess(verifiers), drafts, request(PROMPT, COUNT, SAMPLING))
        assert tokens(rounds) == text
        assert sum(done.accepted for done in rounds) > 3, "it never guessed"
        assert [record.message.partition(":")[0] for record in caplog.records] == [
            "the drafter makes no more drafts for this request"
        ]
        drafts.begin(NEIGHBOUR)
        assert drafts.propose(1), "the next text is another one"


def test_all_texts_of_an_extend_can_meet_nan_at_once() -> None:
    marked = _unsaid()
    engine = _engine(marked, 1)
    sessions = [engine.open(prompt, SAMPLING) for prompt in (PROMPT, NEIGHBOUR)]
    with pytest.raises(NotFinite) as found:
        engine.extend([(session, [marked]) for session in sessions], "last")
    assert [step.fault for step in found.value.steps] == [
        f"the hidden states of position {len(prompt)} hold NaN or infinity" for prompt in (PROMPT, NEIGHBOUR)
    ]


def test_a_request_of_the_first_protocol_gets_no_token_that_was_made_up() -> None:
    marked = _unsaid()

    async def ask() -> list[int]:
        scheduler = Scheduler(_engine(marked, 2), end_ids=[], limits=LIMITS, closed=lambda sequence, ended: None)
        thread = ForwardThread(scheduler, asyncio.get_running_loop().call_soon_threadsafe)
        answers = FirstProtocol(
            thread=thread,
            to_ids=lambda text: [],
            max_new_tokens=5,
            context=scheduler.engine.longest,
            timeout_seconds=5.0,
        )
        peer = Peer(role="client", address="here", phase="request")
        with thread:
            return await answers._continuation([*PROMPT, marked], peer, asyncio.Event())

    with pytest.raises(BadFrame, match="cannot be continued: the hidden states of position 5 hold NaN or infinity"):
        asyncio.run(ask())
