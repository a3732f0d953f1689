"""A verifier in this process, for tests that need texts and no sockets: the shipped core and forward thread."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch

from lab.engine.base import Engine
from lab.engine.compiled import Compiler
from lab.engine.local import LocalEngine
from lab.engine.sampling import Sampling
from lab.text.grammars import Grammars
from speculative.drafter.check import Flip
from speculative.drafter.loop import Round, speculate
from speculative.drafts import Drafts
from speculative.request import Ending, GenerationRequest, Outcome
from speculative.settings import Mode
from speculative.verifier.forward_thread import Call, ForwardThread
from speculative.verifier.scheduler import Scheduler, SchedulerLimits
from speculative.verifier.sequence import VerifiedSequence

DEADLINE_SECONDS = 60.0
LIMITS = SchedulerLimits(
    prefill_chunk=64,
    longest_check=16,
    window=64,
    lookup=None,
    most_waiting=64,
    client_texts=64,
    client_cache_bytes=2**40,
    bytes_per_token=0,
    keep_seconds=60.0,
    prefix_tokens=1000,
    idle_seconds=60.0,
)


class Bench:
    """One verifier, its forward thread, and a queue of outcomes for each text."""

    def __init__(self, engine: Engine, end_ids: Sequence[int] = (), limits: SchedulerLimits = LIMITS) -> None:
        self.ended: list[tuple[VerifiedSequence, Ending]] = []
        self.scheduler = Scheduler(
            engine,
            end_ids=end_ids,
            limits=limits,
            closed=lambda text, ended: self.ended.append((text, ended)),
        )
        self.end_ids = frozenset(end_ids)
        self.batches: list[int] = []
        """Texts in each delivery: shows whether passes were shared."""
        self.thread = ForwardThread(self.scheduler, self._deliver)

    def _deliver(self, deliver: Callable[[list[Outcome]], None], outcomes: list[Outcome]) -> None:
        self.batches.append(len({outcome.key for outcome in outcomes}))
        deliver(outcomes)


@contextmanager
def bench(engine: Engine, end_ids: Sequence[int] = (), limits: SchedulerLimits = LIMITS) -> Iterator[Bench]:
    """A running `Bench`; its thread must end without a fault."""
    running = Bench(engine, end_ids, limits)
    with running.thread:
        yield running
    running.thread.finished.result(timeout=DEADLINE_SECONDS)


class Wire:
    """Does things later, each after a random time, in order: one direction of a link."""

    def __init__(self, most_seconds: float, seed: int) -> None:
        self._most_seconds = most_seconds
        self._numbers = random.Random(seed)
        self._things: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def __call__(self, thing: Callable[[], None]) -> None:
        self._things.put(thing)

    def _run(self) -> None:
        while True:
            thing = self._things.get()
            time.sleep(self._numbers.uniform(0, self._most_seconds))
            thing()


class InProcess:
    """A drafter's `Target`: one text of a `Bench`. With `delay_seconds` word takes up to so long, each way."""

    longest_draft = LIMITS.longest_check
    window = LIMITS.window
    rtt_seconds: float | None = None

    def __init__(self, verifiers: Bench, name: Hashable = "text", delay_seconds: float = 0.0, seed: int = 0) -> None:
        self._bench = verifiers
        self._name = name
        self._count = 0
        self._key: Hashable = None
        self._up = Wire(delay_seconds, seed) if delay_seconds else None
        self._down = Wire(delay_seconds, seed + 1) if delay_seconds else None
        self._arrived: queue.SimpleQueue[Outcome] = queue.SimpleQueue()

    def open(self, request: GenerationRequest) -> None:
        self._count += 1
        self._key = key = (self._name, self._count)
        self._arrived = arrived = queue.SimpleQueue()
        later = self._down or (lambda thing: thing())

        def receive(outcome: Outcome) -> None:
            later(lambda: arrived.put(outcome))

        def begin() -> None:
            self._bench.thread.open(key, receive, lambda scheduler: scheduler.open(key, request, client=self._name))

        self._do(begin)

    def resume(self, request: GenerationRequest) -> None:
        raise AssertionError("nothing is lost in one process")

    def draft(self, epoch: int, position: int, draft_ids: Sequence[int]) -> None:
        key, copied = self._key, list(draft_ids)
        self._submit(lambda scheduler: scheduler.offer(key, epoch, position, copied, time.monotonic()))

    def has_news(self) -> bool:
        return not self._arrived.empty()

    def next(self) -> Outcome:
        return self._arrived.get(timeout=DEADLINE_SECONDS)

    def leave(self) -> None:
        key = self._key
        self._submit(lambda scheduler: scheduler.close(key))

    def _submit(self, call: Call) -> None:
        key = self._key
        self._do(lambda: self._bench.thread.submit(key, call))

    def _do(self, thing: Callable[[], None]) -> None:
        if self._up is None:
            thing()
        else:
            self._up(thing)


def request(
    prompt: Sequence[int],
    count: int,
    sampling: Sampling,
    mode: Mode = Mode.sync,
    threshold: float | None = None,
    length: int = 5,
) -> GenerationRequest:
    return GenerationRequest(
        prompt_ids=prompt,
        sampling=sampling,
        max_new_tokens=count,
        mode=mode,
        threshold=threshold,
        draft_length=length,
    )


def speculated(target: InProcess, drafts: Drafts, asked: GenerationRequest, end_ids: Sequence[int] = ()) -> list[Round]:
    """All rounds of one text."""
    return list(speculate(target, drafts, asked, frozenset(end_ids)))


def sync_round(draft_ids: list[int], accepted: int, ids: list[int], nll: list[float], margins: list[float]) -> Round:
    """A round of mode sync: every guess made for it, none late."""
    return Round(
        draft_ids=draft_ids,
        accepted=accepted,
        right=accepted,
        ids=ids,
        draft_nll=nll,
        margins=margins,
        place=0,
        made=len(draft_ids),
        sent=len(draft_ids),
        draft_seconds=0.0,
        stale=0,
        epoch=0,
    )


def tokens(rounds: Sequence[Round]) -> list[int]:
    return [token for done in rounds for token in done.tokens]


def local_engine(
    model: torch.nn.Module,
    sessions: int = 4,
    context: int = 240,
    exact_rows: int | None = None,
    limit_bytes: int = 2**28,
    grammars: Grammars | None = None,
    compiler: Compiler | None = None,
) -> LocalEngine:
    return LocalEngine(
        model,
        sessions=sessions,
        context=context,
        bucket=32,
        kv_limit_bytes=limit_bytes,
        prefill_chunk=64,
        exact_rows=exact_rows,
        grammars=grammars,
        compiler=compiler,
    )


def decoded_alone(engine: Engine, prompt: Sequence[int], sampling: Sampling, count: int) -> list[int]:
    """The target's own text by the plainest loop there is: one token, one pass. Knows nothing of verifiers."""
    with engine.open(prompt, sampling) as session:
        assert session.step is not None
        text = [session.step.next_ids[-1]]
        while len(text) < count:
            [step] = engine.extend([(session, text[-1:])], "last")
            text.append(step.next_ids[-1])
    return text


def flips_alone(engine: Engine, prompt: Sequence[int], sampling: Sampling, text: Sequence[int]) -> list[Flip]:
    """Where the target, fed the text one token a pass, says another one. Knows nothing of verifiers."""
    flips: list[Flip] = []
    with engine.open(prompt, sampling) as session:
        for index, token in enumerate(text):
            assert session.step is not None
            if token != session.step.next_ids[-1]:
                flips.append(Flip(index, token, session.step.next_ids[-1], session.step.margin[-1]))
            engine.extend([(session, [token])], "last")
    return flips
