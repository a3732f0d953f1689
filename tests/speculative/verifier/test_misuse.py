"""What some ask for costs nobody else anything: wrong requests, a crowd, clients that leave; a verifier that is full.

The large counts are in `tests.soak`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lab.engine.base import Engine, Request, TargetStep, Want
from lab.engine.sampling import Sampling
from lab.models.sources import load_tokenizer_only
from lab.settings import UserError
from lab.wire.faults import PeerFull
from speculative.drafter.loop import speculate
from speculative.drafter.target import RemoteTarget, join
from speculative.drafts import NoDrafts
from speculative.settings import Mode
from speculative.verifier.scheduler import EngineFailed
from speculative.vocabulary import token_texts
from tests.speculative.in_process import request
from tests.speculative.processes import RANDOM, Role, drafted, wait_until
from tests.speculative.serving_here import Here, serving_here
from tests.speculative.verifier.crowd import crowd
from tests.speculative.verifier.leavers import WAYS, leave_at_random
from tests.speculative.verifier.misuse import KINDS, LARGEST_GROWTH_BYTES, misuse

SYNTHETIC = ("model=random", "project.engine=synthetic", "project.lookup=false", "project.synthetic.step_seconds=0.01")


def test_wrong_requests_of_every_kind_cost_the_others_no_token(random_verifier: Role) -> None:
    came = misuse(random_verifier.port, random_verifier.process.pid, RANDOM, wrong=len(KINDS), seed=1)
    assert came.same_texts
    assert came.lives
    assert came.good_texts >= 4
    assert came.unanswered == []
    assert came.rss_growth_bytes <= LARGEST_GROWTH_BYTES
    assert "Traceback" not in random_verifier.stderr()


def test_in_a_crowd_every_text_is_finished_or_told_at_once() -> None:
    came = crowd(8, most_new_tokens=12, seed=1)
    assert came.died == []
    assert (came.finished, came.told_at_once) == (8, 2)
    assert came.same_texts
    assert came.waited > 0, "there was room for all: nothing was proved"


def test_nothing_is_computed_for_clients_that_have_left() -> None:
    came = leave_at_random(60, 20, seed=1)
    assert came.late_rows == 0
    assert came.stayed_text
    assert came.computed > 5, "they left before anything was computed for them: nothing was proved"
    assert {way.removeprefix("first protocol ") for way in came.ways} == set(WAYS)
    served = came.served
    assert (served["finished"], served["texts"]) == (1, 1 + served["unfinished"])


def _joined(here: Here, *, seconds: float = 30.0) -> RemoteTarget:
    network = replace(here.settings.network, port=here.port, connect_timeout_seconds=seconds)
    return join(replace(here.settings, network=network), token_texts(load_tokenizer_only(here.settings.model)))


def _text(target: RemoteTarget, count: int) -> list[int]:
    asked = request([1], count, Sampling.greedy(), Mode.target_only)
    return [token for done in speculate(target, NoDrafts(), asked, []) for token in done.tokens]


def test_a_full_verifier_is_tried_again_until_there_is_a_place(caplog: pytest.LogCaptureFixture) -> None:
    with serving_here(*SYNTHETIC, "project.max_connections=1") as here:
        first = _joined(here)
        with pytest.raises(PeerFull, match=r"has all its 1 connections; gave up after 0\.\d s, attempt \d+"):
            _joined(here, seconds=0.5)
        later = threading.Timer(0.5, first.close)
        later.start()
        with caplog.at_level(logging.WARNING), _joined(here) as second:
            assert len(_text(second, 3)) == 3
        later.join()
    assert "has all its 1 connections during handshake; waiting for one to end, 30 s at most" in caplog.text
    assert here.served.refused_connections > 2


def test_who_waits_in_line_is_told_the_place_and_how_long_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving_here(*SYNTHETIC, "project.sessions=1") as here, _joined(here) as first:
        rounds = speculate(first, NoDrafts(), request([1], 2000, Sampling.greedy(), Mode.target_only), [])
        next(rounds)

        def leave() -> None:
            wait_until(lambda: "place 1 in line" in caplog.text, "the other is told its place")
            time.sleep(1.3)  # longer than an answer may take: a text in line has been answered
            rounds.close()  # type: ignore[attr-defined]

        later = threading.Thread(target=leave)
        later.start()
        words = (*SYNTHETIC, "tracking=none", "project.max_new_tokens=2", "network.request_timeout_seconds=1")
        with caplog.at_level(logging.INFO):
            figures = drafted(here.port, (*words, "project.draft.source=none"), tmp_path)
        later.join()
    assert figures["new_tokens"] == 2
    assert figures["waited_seconds"] > 1
    assert "the verifier has no room for this request now: it waits, place 1 in line" in caplog.text
    assert (here.served.waited, here.served.unfinished) == (1, 1)


class _Broken:
    """An engine that fails from some moment on."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.is_broken = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def open(self, *arguments: Any) -> Any:
        if self.is_broken:
            raise ValueError("too many values to unpack (expected 2)")
        return self._engine.open(*arguments)

    def extend(self, requests: Sequence[Request], want: Want) -> list[TargetStep]:
        if self.is_broken:
            raise ValueError("too many values to unpack (expected 2)")
        return self._engine.extend(requests, want)


def test_a_target_that_no_request_can_use_is_refused_before_it_listens() -> None:
    refused = pytest.raises(UserError, match=r"^model synthetic must run here: .* of two tokens: ValueError: too many")
    with refused, serving_here(*SYNTHETIC, wrap=lambda engine, loop: _Broken(engine)):  # type: ignore[arg-type, return-value]
        raise AssertionError("it listens")


def test_a_target_that_fails_later_ends_the_verifier_with_its_reason() -> None:
    broken: list[_Broken] = []

    def wrap(engine: Engine, loop: object) -> Any:
        broken.append(_Broken(engine))
        broken[0].is_broken = False
        return broken[0]

    def serve_until_it_breaks() -> None:
        with serving_here(*SYNTHETIC, "project.resume_seconds=0", wrap=wrap) as here, _joined(here) as target:
            assert len(_text(target, 3)) == 3
            broken[0].is_broken = True
            target.open(request([1], 3, Sampling.greedy(), Mode.target_only))
            time.sleep(0.5)

    with pytest.raises(EngineFailed, match="the target cannot run a sequence of two tokens: ValueError"):
        serve_until_it_breaks()
