"""What a verifier has done, by its figures."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from lab.engine.base import Engine, Request, TargetStep, Want
from lab.engine.sampling import Sampling
from lab.wire.tokens import pack_tokens
from speculative.messages import MessageType, OpenFrame
from speculative.settings import Mode
from speculative.verifier import forward_thread
from tests.speculative.serving_here import client_endpoint, connected, serving_here

SAMPLING: dict[str, Any] = {
    "seed": 0, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "logit_rules": None, "top_tokens": 0,
}  # fmt: skip


@dataclass
class Stuck:
    """An engine whose passes over a text last until the end of the test."""

    engine: Engine
    begun: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def open(self, prompt_ids: Sequence[int], sampling: Sampling, most_tokens: int | None = None) -> Any:
        return self.engine.open(prompt_ids, sampling, most_tokens)

    def extend(self, requests: Sequence[Request], want: Want) -> list[TargetStep]:
        self.begun.set()
        self.over.wait()
        return self.engine.extend(requests, want)


def test_a_text_in_a_pass_that_takes_longer_than_an_end_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards that are waited for, a long prompt: a verifier that is told to end ends, and says what it had begun."""
    monkeypatch.setattr(forward_thread, "END_SECONDS", 0.2)
    stuck: list[Stuck] = []

    def wrap(engine: Engine, loop: asyncio.AbstractEventLoop) -> Engine:
        stuck.append(Stuck(engine))
        return stuck[0]  # type: ignore[return-value]

    try:
        with serving_here("model=random", "project.engine=synthetic", wrap=wrap) as here:
            client = connected(here.port, client_endpoint(here.settings))
            head = OpenFrame(
                **SAMPLING, name=1, owner=bytes(16), max_new_tokens=5, mode=Mode.target_only, draft_length=0,
                threshold=None, report=False, logprobs=False,
            )  # fmt: skip
            client.send(MessageType.open, 1, head, pack_tokens([1, 2]))
            assert stuck[0].begun.wait(20)
    finally:
        stuck[0].over.set()
    assert (here.served.texts, here.served.unfinished) == (1, 1)
