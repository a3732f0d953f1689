"""A model that is split over shards, as one engine: texts by their ids, whatever carries them.

A long extend goes through the shards in chunks that follow each other without waiting, so that all shards work at once.
A text's journal is its ids and its sampling: a shard that was lost gets them again in one prefill, and the text goes on
with the same tokens. Knows no networks and no tensors.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from lab.engine import (
    NOTHING,
    SWEEP_ROWS,
    Request,
    Session,
    TargetStep,
    Want,
    check_finite,
    check_prompt,
    check_requests,
    together,
)
from lab.kv import CacheFull
from lab.sampling import Sampling
from lab.wire import pack_tokens
from split.messages import REPORTED_PASSES, Close, Fault, FaultCode, Open, Pass, Piece, Steps, unpack_steps
from split.transport.base import ChainLost, Message, ShardLost, ShardReport, Transport

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class ShardFault(RuntimeError):
    """A shard could not do what it was asked, and asking again would not help."""


class TextsLost(RuntimeError):
    """A shard is there but does not hold a text."""

    def __init__(self, number: int, what: str) -> None:
        super().__init__(what)
        self.number = number


@dataclass
class _Journal:
    """What rebuilds a text."""

    session: Session
    ids: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class PassTime:
    """One pass, as the client saw it; monotonic seconds."""

    number: int
    rows: int
    submitted: float
    answered: float


@dataclass(frozen=True)
class Recovery:
    """Shards that were lost and are there again; monotonic seconds."""

    lost: float
    """The client noticed."""
    connected: float
    """Every place of the chain was taken."""
    rebuilt: float
    """The shards held every text again."""

    @property
    def start_seconds(self) -> float:
        """Until the last shard was back."""
        return self.connected - self.lost

    @property
    def prefill_seconds(self) -> float:
        """For the texts' ids to go through all shards."""
        return self.rebuilt - self.connected


@dataclass
class _Run:
    number: int
    position: int
    ids: Sequence[int]
    step: TargetStep = NOTHING
    fault: str = ""
    """Of the first pass in which the text met NaN or infinity."""


@dataclass(frozen=True)
class _Part:
    """What one pass takes of one run."""

    run: _Run
    start: int
    ids: Sequence[int]

    def piece(self) -> Piece:
        return Piece(
            session=self.run.number,
            position=self.run.position + self.start,
            count=len(self.ids),
            is_first=self.start == 0,
            is_last=self.start + len(self.ids) == len(self.run.ids),
        )


@dataclass(frozen=True)
class _UnderWay:
    number: int
    head: Pass
    parts: Sequence[_Part]
    submitted: float


class ShardedModel:
    """An `Engine` over shards.

    Args:
        transport: Carries messages to the shards; this engine owns it.
        vocabulary_size: Of the model.
        context: The most tokens of a text; what every shard was started for.
        prefill_chunk: The most tokens of a text in one pass. Smaller chunks overlap better and cost more passes.
        recovery_seconds: How long to try to bring back a shard that was lost; 0: its loss is raised.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        vocabulary_size: int,
        context: int,
        prefill_chunk: int,
        recovery_seconds: float,
    ) -> None:
        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk must be at least 1, got {prefill_chunk}")
        self.vocabulary_size, self.context, self.longest = vocabulary_size, context, context
        self.recoveries: list[Recovery] = []
        """Each time that shards were lost and the texts rebuilt."""
        self.passes: deque[PassTime] = deque(maxlen=REPORTED_PASSES)
        """The last passes."""
        self._transport = transport
        self._chunk = prefill_chunk
        self._recovery_seconds = recovery_seconds
        self._journals: dict[int, _Journal] = {}
        self._opened = self._numbered = 0

    def open(self, prompt_ids: Sequence[int], sampling: Sampling, most_tokens: int | None = None) -> Session:
        """See `Engine.open`. Also raises `ShardFault`, and `ShardLost` when recovery failed."""
        most = check_prompt(self, prompt_ids, most_tokens)
        self._opened += 1
        session = Session(self, self._opened, sampling, most)
        self._journals[session.key] = _Journal(session)
        try:
            self._surely(lambda: self._open_text(session))
            if prompt_ids:
                self.extend([(session, prompt_ids)], want="last")
        except BaseException:
            session.close()
            raise
        return session

    def extend(self, requests: Sequence[Request], want: Want) -> list[TargetStep]:
        """See `Engine.extend`. Also raises `ShardFault`, and `ShardLost` when recovery failed."""
        check_requests(self, requests)
        runs = self._surely(
            lambda: self._run(
                [_Run(session.key, session.position, ids, fault=session.fault) for session, ids in requests], want
            )
        )
        for session, ids in requests:
            journal = self._journals[session.key].ids
            journal[session.position :] = ids
        return check_finite(
            [
                session.advance(run.ids, replace(run.step, fault=run.fault))
                for (session, _), run in zip(requests, runs, strict=True)
            ]
        )

    def close(self, session: Session) -> None:
        """See `Engine.close`. A shard that is lost has forgotten the text already."""
        del self._journals[session.key]
        session.closed = True
        try:
            self._transport.submit(Message(session.key, Close()))
        except ShardLost as lost:
            log.info("text %d was closed without its shards: %s", session.key, lost)

    def shutdown(self) -> None:
        """Leave the shards; the engine is of no use afterwards."""
        self._transport.shutdown()

    def reports(self) -> list[ShardReport]:
        """The figures of every shard, first to last."""
        return self._transport.reports()

    # Passes

    def _run(self, runs: list[_Run], want: Want) -> list[_Run]:
        """Send every pass, then take the answers."""
        under_way = [self._submit(parts, want) for parts in self._plan(runs)]
        faults: list[Fault] = []
        for run in under_way:
            answer = self._transport.collect()
            self.passes.append(PassTime(run.number, run.head.rows, run.submitted, time.monotonic()))
            if isinstance(answer.head, Fault):
                faults.append(answer.head)
            elif not faults:
                self._read(run, answer)
        if faults:
            raise _raised(faults[0])
        return runs

    def _plan(self, runs: Sequence[_Run]) -> Iterator[list[_Part]]:
        longest = max((len(run.ids) for run in runs), default=0)
        for start in range(0, longest, self._chunk):
            parts = [_Part(run, start, run.ids[start : start + self._chunk]) for run in runs if run.ids[start:]]
            yield from together(parts, SWEEP_ROWS)

    def _submit(self, parts: Sequence[_Part], want: Want) -> _UnderWay:
        self._numbered = self._numbered % (2**32 - 1) + 1
        head = Pass(read_all=want == "all", pieces=[part.piece() for part in parts])
        submitted = time.monotonic()
        self._transport.submit(Message(self._numbered, head, pack_tokens([id_ for part in parts for id_ in part.ids])))
        return _UnderWay(self._numbered, head, parts, submitted)

    @staticmethod
    def _read(run: _UnderWay, answer: Message) -> None:
        if answer.number != run.number:
            raise ShardFault(f"the shards answered pass {answer.number} where {run.number} was due")
        steps = iter(unpack_steps(run.head, answer.body))
        for part, piece in zip(run.parts, run.head.pieces, strict=True):
            if run.head.read_all or piece.is_last:
                part.run.step = part.run.step.then(next(steps))
        assert isinstance(answer.head, Steps)
        for unfit in answer.head.unfit:
            for part in run.parts:
                if part.run.number == unfit.session:
                    part.run.fault = part.run.fault or unfit.text

    def _open_text(self, session: Session) -> None:
        """Begin a text anew, whatever the shards still hold of it."""
        sampling = session.sampling
        self._transport.submit(Message(session.key, Close()))
        head = Open(seed=sampling.seed, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
        self._transport.submit(Message(session.key, head))
        answer = self._transport.collect()
        if isinstance(answer.head, Fault):
            raise _raised(answer.head)

    # Recovery

    def _surely(self, call: Callable[[], Result]) -> Result:
        """What `call` returns, however often shards are lost meanwhile, within `recovery_seconds` of the first loss."""
        deadline: float | None = None
        began = 0.0
        while True:
            try:
                if deadline is not None:
                    self._restore(deadline, began)
                return self._with_texts(call)
            except ShardLost as lost:
                if deadline is None:
                    began = time.monotonic()
                    deadline = began + self._recovery_seconds
                if time.monotonic() >= deadline or isinstance(lost, ChainLost):
                    raise
                log.warning("%s; bringing the shards back", lost)

    def _with_texts(self, call: Callable[[], Result]) -> Result:
        """What `call` returns; a text that a shard has evicted is rebuilt, once."""
        rebuilt: set[int] = set()
        while True:
            try:
                return call()
            except TextsLost as lost:
                if lost.number in rebuilt or lost.number not in self._journals:
                    raise ShardFault(str(lost)) from None
                log.info("%s: rebuilding it", lost)
                rebuilt.add(lost.number)
                self._rebuild(self._journals[lost.number])

    def _restore(self, deadline: float, began: float) -> None:
        self._transport.restore(deadline)
        connected = time.monotonic()
        for journal in self._journals.values():
            self._rebuild(journal)
        self.recoveries.append(Recovery(began, connected, time.monotonic()))
        log.info("the shards hold all %d texts again", len(self._journals))

    def _rebuild(self, journal: _Journal) -> None:
        """One prefill of the ids that a text holds."""
        session = journal.session
        self._open_text(session)
        if session.position:
            [run] = self._run([_Run(session.key, 0, journal.ids[: session.position])], "last")
            session.fault = session.fault or run.fault


def _raised(fault: Fault) -> Exception:
    match fault.code:
        case FaultCode.full:
            return CacheFull(fault.text)
        case FaultCode.lost:
            return TextsLost(fault.session, fault.text)
        case FaultCode.link:
            return ShardLost(fault.text)
        case _:
            return ShardFault(f"{fault.code.name}: {fault.text}")
