"""Busy times of one text on one clock: the target's passes, the drafter's steps and the frames between them.

For a picture, not for a figure: the verifier is a thread of this process, so that one clock times both sides. It is the
real verifier, behind a real socket and a link process.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from lab.bench import link_process, pinned
from lab.device import open_device
from lab.engine.base import Request, Want
from lab.settings import WandbMode
from lab.tracking import Tracker
from speculative.bench.rig import DRAFTER_CORE, START_SECONDS, VERIFIER_CORE, WARM_UP_TOKENS, Case, Rig
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
    """Passes of the target."""
    rows: list[int] = field(default_factory=list)
    """Number of tokens in each pass."""
    steps: list[Span] = field(default_factory=list)
    """Steps of the drafter."""
    verdicts: list[tuple[float, int, bool]] = field(default_factory=list)
    """Arrival at the drafter, number of tokens, and whether a draft token was wrong."""
    began: float = 0.0

    def restart(self) -> None:
        """Forget all events so far, and count from now on."""
        for events in (self.passes, self.rows, self.steps, self.verdicts):
            events.clear()
        self.began = time.monotonic()

    def on_pass(self, began: float, ended: float, requests: Sequence[Request], want: Want) -> None:
        """Record a pass of the target."""
        self.passes.append((began - self.began, ended - self.began))
        self.rows.append(sum(len(ids) for _, ids in requests))

    def on_step(self, began: float, ended: float, count: int) -> None:
        """Record a step of the drafter."""
        self.steps.append((began - self.began, ended - self.began))

    def on_verdict(self, done: Round) -> None:
        """Record a verdict that has just arrived."""
        self.verdicts.append((time.monotonic() - self.began, len(done.tokens), done.right < done.checked))


def watch_calls(owner: object, method: str, note: Callable[..., None]) -> None:
    """Call `note(began, ended, *arguments)` after each call of a method."""
    call = getattr(owner, method)

    def watched(*arguments: Any, **options: Any) -> Any:
        began = time.monotonic()
        result = call(*arguments, **options)
        note(began, time.monotonic(), *arguments, **options)
        return result

    setattr(owner, method, watched)


@contextmanager
def watched_verifier(rig: Rig, timeline: Timeline) -> Iterator[int]:
    """Run a watched verifier in a thread of this process; yields its port."""
    network = replace(rig.settings.network, host="127.0.0.1", port=0)
    tracking = replace(rig.settings.tracking, wandb=WandbMode.disabled)  # the benchmark's own run is open
    settings = replace(rig.settings, network=network, tracking=tracking)
    target = open_target(settings, open_device(settings.device))
    watch_calls(target.engine, "extend", timeline.on_pass)
    listens: Future[tuple[int, asyncio.AbstractEventLoop, asyncio.Task[Any]]] = Future()

    def announce(host: str, port: int) -> None:
        task = asyncio.current_task()
        assert task is not None
        listens.set_result((port, asyncio.get_running_loop(), task))

    def work(tracker: Tracker) -> None:
        with suppress(asyncio.CancelledError):
            asyncio.run(serve(settings, target, rig.tokenizer, None, tracker, ServerStats(), announce))

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

    def watched(drafts: Drafts) -> Drafts:
        watch_calls(drafts, "propose", timeline.on_step)
        return drafts

    with ExitStack() as stack:
        verifier = stack.enter_context(watched_verifier(rig, timeline))
        folder = rig.folder / f"link-watched-{case.mode.name}"
        link = stack.enter_context(link_process(verifier, case.rtt_seconds, folder, START_SECONDS))
        target = stack.enter_context(rig.join_at(link))
        list(rig.rounds(replace(case, mode=Mode.target_only, new_tokens=WARM_UP_TOKENS), target))
        timeline.restart()
        for done in rig.rounds(case, target, watched):
            timeline.on_verdict(done)
    return timeline
