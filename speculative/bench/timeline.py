"""Busy times of one text on one clock: the target's passes, the drafter's steps and the frames between them.

For a picture, not for a figure: the verifier is a thread of this process, so that one clock sees both sides. It is the
shipped one, behind a real socket and a link process.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from typing_extensions import override

from lab.bench import pinned
from lab.device import open_device
from lab.engine.base import Engine, Request, Session, TargetStep, Want
from lab.engine.sampling import Sampling
from lab.settings import WandbMode
from lab.tracking import Tracker
from speculative.bench.rig import DRAFTER_CORE, VERIFIER_CORE, WARM_UP_TOKENS, Case, Rig, link_process
from speculative.drafter.loop import Round
from speculative.drafts import Drafts
from speculative.settings import Mode
from speculative.verifier.server import ServerStats, serve
from speculative.verifier.target import open_target

Span = tuple[float, float]
END_SECONDS = 30.0


@dataclass
class Timeline:
    """Events of one text, in seconds since its request."""

    passes: list[Span] = field(default_factory=list)
    """The target's."""
    rows: list[int] = field(default_factory=list)
    """Number of tokens in each pass."""
    steps: list[Span] = field(default_factory=list)
    """The drafter's."""
    verdicts: list[tuple[float, int, bool]] = field(default_factory=list)
    """Arrival at the drafter, number of tokens, and whether a draft token was wrong."""

    def since(self, began: float) -> Timeline:
        """The same events, counted from another moment."""
        return Timeline(
            [(a - began, b - began) for a, b in self.passes],
            self.rows,
            [(a - began, b - began) for a, b in self.steps],
            [(at - began, tokens, wrong) for at, tokens, wrong in self.verdicts],
        )

    def clear(self) -> None:
        """Forget all events so far."""
        for events in (self.passes, self.rows, self.steps, self.verdicts):
            events.clear()

    def on_verdict(self, done: Round) -> None:
        """Note a verdict that has just come."""
        self.verdicts.append((time.monotonic(), len(done.tokens), done.right < done.checked))


class WatchedEngine(Engine):
    """An engine whose passes are noted in a timeline."""

    def __init__(self, engine: Engine, timeline: Timeline) -> None:
        self._engine, self._timeline = engine, timeline
        self.vocabulary_size, self.context = engine.vocabulary_size, engine.context
        self.longest, self.has_logits = engine.longest, engine.has_logits

    @override
    def open(self, prompt_ids: Sequence[int], sampling: Sampling, most_tokens: int | None = None) -> Session:
        return self._engine.open(prompt_ids, sampling, most_tokens)

    @override
    def extend(self, requests: Sequence[Request], want: Want) -> list[TargetStep]:
        began = time.monotonic()
        steps = self._engine.extend(requests, want)
        self._timeline.passes.append((began, time.monotonic()))
        self._timeline.rows.append(sum(len(ids) for _, ids in requests))
        return steps

    @override
    def close(self, session: Session) -> None:
        self._engine.close(session)

    @override
    def shutdown(self) -> None:
        self._engine.shutdown()


class WatchedDrafts(Drafts):
    """A draft source whose steps are noted in a timeline."""

    def __init__(self, drafts: Drafts, timeline: Timeline) -> None:
        self._drafts, self._timeline = drafts, timeline

    @override
    def begin(self, prompt_ids: Sequence[int]) -> None:
        self._drafts.begin(prompt_ids)

    @override
    def propose(self, count: int) -> list[int]:
        began = time.monotonic()
        found = self._drafts.propose(count)
        self._timeline.steps.append((began, time.monotonic()))
        return found

    @override
    def correct(self, position: int, ids: Sequence[int]) -> None:
        self._drafts.correct(position, ids)

    @override
    def close(self) -> None:
        self._drafts.close()


@contextmanager
def watched_verifier(rig: Rig, timeline: Timeline) -> Iterator[int]:
    """Run a watched verifier in a thread of this process; yields its port."""
    network = replace(rig.settings.network, host="127.0.0.1", port=0)
    tracking = replace(rig.settings.tracking, wandb=WandbMode.disabled)  # the benchmark's own run is open
    settings = replace(rig.settings, network=network, tracking=tracking)
    target = open_target(settings, open_device(settings.device))
    watched = replace(target, engine=WatchedEngine(target.engine, timeline))
    listens: Future[tuple[int, asyncio.AbstractEventLoop, asyncio.Task[Any]]] = Future()

    def announce(host: str, port: int) -> None:
        task = asyncio.current_task()
        assert task is not None
        listens.set_result((port, asyncio.get_running_loop(), task))

    def work(tracker: Tracker) -> None:
        with suppress(asyncio.CancelledError):
            asyncio.run(serve(settings, watched, rig.tokenizer, None, tracker, ServerStats(), announce))

    with Tracker(settings, "timeline", rig.folder / "timeline") as tracker, pinned(VERIFIER_CORE):
        thread = threading.Thread(target=work, args=(tracker,), name="watched-verifier", daemon=True)
        thread.start()
        port, loop, task = listens.result(timeout=END_SECONDS)
        with pinned(DRAFTER_CORE):
            try:
                yield port
            finally:
                loop.call_soon_threadsafe(task.cancel)
                thread.join(END_SECONDS)


def watch(rig: Rig, case: Case) -> Timeline:
    """The timeline of one text, from its request on."""
    timeline = Timeline()
    with ExitStack() as stack:
        verifier = stack.enter_context(watched_verifier(rig, timeline))
        folder = rig.folder / f"link-watched-{case.mode.name}"
        link = stack.enter_context(link_process(verifier, case.rtt_seconds, folder))
        target = stack.enter_context(rig.join_at(link))
        list(rig.rounds(replace(case, mode=Mode.target_only, new_tokens=WARM_UP_TOKENS), target))
        timeline.clear()
        began = time.monotonic()
        for done in rig.rounds(case, target, lambda drafts: WatchedDrafts(drafts, timeline)):
            timeline.on_verdict(done)
    return timeline.since(began)
