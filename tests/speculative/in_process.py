"""A verifier in this process, for tests that need texts and no sockets: the shipped core and forward thread."""

from __future__ import annotations

import queue
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch

from lab.engine import Engine, LocalEngine
from lab.sampling import Sampling
from speculative.drafting import Flip, Round, speculate
from speculative.drafts import Drafts
from speculative.forward_thread import ForwardThread
from speculative.verifying import Ended, Outcome, Text, TextRequest, Verifier

DEADLINE_SECONDS = 60.0


class Bench:
    """One verifier, its forward thread, and a queue of outcomes for each text."""

    def __init__(self, engine: Engine, end_ids: Sequence[int] = (), prefill_chunk: int = 64) -> None:
        self.ended: list[tuple[Text, Ended]] = []
        self.verifier = Verifier(
            engine,
            end_ids=end_ids,
            prefill_chunk=prefill_chunk,
            closed=lambda text, ended: self.ended.append((text, ended)),
        )
        self.end_ids = frozenset(end_ids)
        self.queues: dict[Hashable, queue.Queue[Outcome]] = {}
        self.batches: list[int] = []
        """Texts in each delivery: shows whether passes were shared."""
        self.thread = ForwardThread(self.verifier, self._deliver)

    def _deliver(self, outcomes: list[Outcome]) -> None:
        self.batches.append(len({outcome.key for outcome in outcomes}))
        for outcome in outcomes:
            self.queues[outcome.key].put(outcome)


@contextmanager
def bench(engine: Engine, end_ids: Sequence[int] = (), prefill_chunk: int = 64) -> Iterator[Bench]:
    """A running `Bench`; its thread must end without a fault."""
    running = Bench(engine, end_ids, prefill_chunk)
    with running.thread:
        yield running
    running.thread.finished.result(timeout=DEADLINE_SECONDS)


class InProcess:
    """A drafter's `Target`: one text of a `Bench`."""

    def __init__(self, verifiers: Bench, name: Hashable = "text") -> None:
        self._bench = verifiers
        self._name = name
        self._count = 0
        self._key: Hashable = None

    def open(self, request: TextRequest) -> None:
        self._count += 1
        self._key = key = (self._name, self._count)
        self._bench.queues[key] = queue.Queue()
        self._bench.thread.submit(lambda verifier: verifier.open(key, request))

    def draft(self, epoch: int, position: int, guesses: Sequence[int]) -> None:
        key = self._key
        self._bench.thread.submit(lambda verifier: verifier.offer(key, epoch, position, guesses))

    def next(self) -> Outcome:
        return self._bench.queues[self._key].get(timeout=DEADLINE_SECONDS)

    def leave(self) -> None:
        key = self._key

        def close(verifier: Verifier) -> None:
            verifier.close(key)

        self._bench.thread.submit(close)


def request(
    prompt: Sequence[int], count: int, sampling: Sampling, waits: bool = True, threshold: float | None = None
) -> TextRequest:
    return TextRequest(prompt_ids=prompt, sampling=sampling, max_new_tokens=count, waits=waits, threshold=threshold)


def speculated(
    target: InProcess, drafts: Drafts, asked: TextRequest, length: int, end_ids: Sequence[int] = ()
) -> list[Round]:
    """All rounds of one text."""
    return list(speculate(target, drafts, asked, length, frozenset(end_ids)))


def tokens(rounds: Sequence[Round]) -> list[int]:
    return [token for done in rounds for token in done.tokens]


def local_engine(
    model: torch.nn.Module, sessions: int = 4, context: int = 240, exact_rows: int | None = None
) -> LocalEngine:
    return LocalEngine(
        model,
        sessions=sessions,
        context=context,
        bucket=32,
        kv_limit_bytes=2**28,
        prefill_chunk=64,
        exact_rows=exact_rows,
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
