"""A model that is split over shards, as one engine, over any transport.

A long extend goes through the shards in chunks that follow each other without waiting, so that all shards work at once.
A request's journal is its ids and its sampling: a lost shard gets them again in one prefill, and the request continues
with the same tokens. Knows no networks and no tensors.
"""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, TypeVar

from typing_extensions import override

from lab import faults
from lab.engine.base import (
    NOTHING,
    SWEEP_ROWS,
    Engine,
    Request,
    Session,
    SessionLost,
    TargetStep,
    Want,
    check_finite,
    check_open,
    check_reopen,
    check_requests,
    check_set_aside,
    pieces_of,
    together,
)
from lab.engine.kv import CacheFull
from lab.engine.sampling import Sampling
from lab.engine.sampling_head import sampling_fields
from lab.text.grammars import Grammars
from lab.wire.frames import Head
from lab.wire.tokens import pack_tokens
from split.chain.messages import Fault, FaultCode
from split.inference.messages import (
    MAX_PIECES,
    Close,
    Open,
    Opened,
    Pass,
    Piece,
    Reopen,
    Report,
    SetAside,
    Steps,
    unpack_steps,
)
from split.transport.base import REPORTED_PASSES, ChainLost, Message, ShardLost, ShardReport, Transport

log = logging.getLogger(__name__)

Result = TypeVar("Result")

KEPT_SECONDS = 5.0
"""A place in line is kept this long for a client that asks again."""
REGAIN_SECONDS = 0.5
"""Seconds between two attempts to get a lost request's room again, while a shard's line is full."""


class ShardFault(faults.Fault):
    """A shard could not process a message, and repeating it would not help."""


class _RequestLost(RuntimeError):
    """A shard is running but does not hold a request."""

    def __init__(self, number: int, what: str) -> None:
        super().__init__(what)
        self.number = number


@dataclass
class _PendingOpen:
    """An OPEN whose request has not begun."""

    number: int
    sampling: Sampling
    tokens: int
    at: float
    """Time of the last call that asked for it (monotonic seconds)."""
    place: int | None = None
    """Place in line; 0: there is room; None: no answer yet."""
    fault: Fault | None = None


@dataclass
class _Journal:
    """A request's ids and sampling, which rebuild it at a new shard."""

    session: Session
    ids: list[int] = field(default_factory=list)
    is_set_aside: bool = False
    """Whether its shards may forget it; then it is not rebuilt."""


@dataclass(frozen=True)
class PassTime:
    """Times of one pass at the client; monotonic seconds."""

    number: int
    rows: int
    submitted: float
    answered: float


@dataclass(frozen=True)
class Recovery:
    """Times of a recovery from the loss of a shard; monotonic seconds."""

    lost: float
    """The client noticed the loss."""
    connected: float
    """Every place of the chain was taken."""
    rebuilt: float
    """The shards held every request again."""

    @property
    def start_seconds(self) -> float:
        """Time until the last shard was back."""
        return self.connected - self.lost

    @property
    def prefill_seconds(self) -> float:
        """Time of the prefill of all requests."""
        return self.rebuilt - self.connected


@dataclass
class _Extend:
    """New ids of one request, and the steps they give."""

    number: int
    position: int
    ids: Sequence[int]
    prompt_tokens: int | None
    step: TargetStep = NOTHING
    fault: str = ""
    """Reason for its stop, from the first pass in which it stopped."""
    lost: str = ""
    """Message of a shard that has lost it; the request itself had no fault."""


@dataclass(frozen=True)
class _Part:
    """Ids of one extend that go into one pass."""

    extend: _Extend
    start: int
    ids: Sequence[int]

    def piece(self) -> Piece:
        return Piece(
            session=self.extend.number,
            position=self.extend.position + self.start,
            count=len(self.ids),
            is_first=self.start == 0,
            is_last=self.start + len(self.ids) == len(self.extend.ids),
        )


@dataclass(frozen=True)
class _InFlight:
    number: int
    head: Pass
    parts: Sequence[_Part]
    submitted: float


class ShardedModel(Engine):
    """An `Engine` over shards.

    Args:
        transport: Carries messages to the shards; this engine owns it.
        vocabulary_size: Rows of the model's embedding.
        context: Most tokens of a request that every shard takes.
        prefill_chunk: Most tokens of a request in one pass. Smaller chunks overlap better and cost more passes.
        recovery_seconds: How long to try to bring back a lost shard; 0: its loss is raised.
        line_seconds: How long `open` may wait in line for room at the shards. It never does while this engine has
            another request: two engines that each hold the other one's room would wait forever. A second call for the
            same request within `KEPT_SECONDS` keeps its place.
        grammars: Compiles schemas, so that a wrong one is found before the shards are asked; None: schemas are refused.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        vocabulary_size: int,
        context: int,
        prefill_chunk: int,
        recovery_seconds: float,
        line_seconds: float = 0.0,
        grammars: Grammars | None = None,
    ) -> None:
        self.grammars = grammars
        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk must be at least 1, got {prefill_chunk}")
        self.vocabulary_size, self.context, self.longest = vocabulary_size, context, context
        self.recoveries: list[Recovery] = []
        """All recoveries from lost shards."""
        self.passes: deque[PassTime] = deque(maxlen=REPORTED_PASSES)
        """The last passes."""
        self._transport = transport
        self._chunk = prefill_chunk
        self._recovery_seconds, self._line_seconds = recovery_seconds, line_seconds
        self._journals: dict[int, _Journal] = {}
        self._pending: dict[int, _PendingOpen] = {}
        self._numbered = 0
        """The last number of a request or pass; both are numbered together."""

    @override
    def open(self, prompt_ids: Sequence[int], sampling: Sampling, most_tokens: int | None = None) -> Session:
        # `CacheFull` names the place in line, which is kept for a while.
        most = check_open(self, prompt_ids, sampling, most_tokens)
        number = self._with_recovery(lambda: self._find_room(sampling, most))
        session = Session(self, number, sampling, most)
        self._journals[number] = _Journal(session)
        return session.with_prompt(prompt_ids)

    @override
    def extend(self, requests: Sequence[Request], want: Want) -> list[TargetStep]:
        check_requests(self, requests)
        extends = self._with_recovery(
            lambda: self._advance(
                [
                    _Extend(session.key, session.position, ids, session.prompt_tokens, fault=session.fault)
                    for session, ids in requests
                ],
                want,
            )
        )
        for session, ids in requests:
            journal = self._journals[session.key].ids
            journal[session.position :] = ids
        self._drop_stale_opens()
        return check_finite(
            [
                session.advance(extend.ids, replace(extend.step, fault=extend.fault))
                for (session, _), extend in zip(requests, extends, strict=True)
            ]
        )

    @override
    def close(self, session: Session) -> None:
        del self._journals[session.key]
        session.closed = True
        self._close(session.key)

    @override
    def set_aside(self, session: Session) -> None:
        check_set_aside(session)
        session.most_tokens = session.position
        self._journals[session.key].is_set_aside = True
        self._tell(session.key, SetAside(tokens=session.position), "set aside")

    @override
    def reopen(self, session: Session, ids: Sequence[int], sampling: Sampling, most_tokens: int) -> Session:
        # After `CacheFull`, shards before the one that refused keep more room for the session than it had.
        check_reopen(self, session, ids, sampling, most_tokens)
        self._with_recovery(lambda: self._reopen(session.key, ids, sampling, most_tokens))
        continued = session.continued(ids, sampling, most_tokens)
        self._journals[session.key] = _Journal(continued, list(ids))
        return continued

    def shutdown(self) -> None:
        """Leave the shards; the engine cannot be used afterwards."""
        self._transport.shutdown()

    def reports(self) -> list[ShardReport[Report]]:
        """The figures of every shard, first to last."""
        reports: list[ShardReport[Any]] = self._transport.reports()
        return reports

    # Room

    def _find_room(self, sampling: Sampling, tokens: int) -> int:
        """The number of a request that every shard keeps room for."""
        self._drop_stale_opens()
        same = (one for one in self._pending.values() if (one.sampling, one.tokens) == (sampling, tokens))
        pending = next(same, None) or self._ask(_PendingOpen(self._number(), sampling, tokens, 0.0))
        is_alone = all(journal.is_set_aside for journal in self._journals.values())
        self._await_room(pending, self._line_seconds if is_alone else 0.0)
        pending.at = time.monotonic()
        if pending.fault is not None:
            del self._pending[pending.number]
            self._close(pending.number)  # shards before the one that refused keep room for it
            raise _fault_of(pending.fault)
        if pending.place:
            raise CacheFull(f"the shards have no room for {tokens} tokens now: place {pending.place} in line")
        del self._pending[pending.number]
        return pending.number

    def _ask(self, pending: _PendingOpen) -> _PendingOpen:
        head = Open(tokens=pending.tokens, **sampling_fields(pending.sampling))
        return self._send_open(pending, Message(pending.number, head))

    def _send_open(self, pending: _PendingOpen, message: Message) -> _PendingOpen:
        self._pending[pending.number] = pending
        self._transport.send(0, message)
        return pending

    def _reopen(self, number: int, ids: Sequence[int], sampling: Sampling, tokens: int) -> None:
        """Give the request the new settings at every shard."""
        head = Reopen(tokens=tokens, position=len(ids), **sampling_fields(sampling))
        message = Message(number, head, pack_tokens(ids) if sampling.logit_rules else b"")
        pending = self._send_open(_PendingOpen(number, sampling, tokens, time.monotonic()), message)
        try:
            self._await_room(pending, 0.0)
        finally:
            self._pending.pop(number, None)
        if pending.fault is not None and pending.fault.code is FaultCode.lost:
            raise SessionLost(pending.fault.text)
        if pending.fault is not None:
            raise _fault_of(pending.fault)

    def _await_room(self, pending: _PendingOpen, seconds: float) -> None:
        """Wait until there is room or a fault, or `seconds` are over; in any case until the first answer."""
        while pending.place is None and pending.fault is None:
            self._note(self._transport.collect())
        deadline = time.monotonic() + seconds
        with contextlib.suppress(TimeoutError):
            while pending.place and pending.fault is None:
                self._note(self._transport.collect(max(0.0, deadline - time.monotonic())))

    def _note(self, answer: Message) -> None:
        """Take the answer to an OPEN that waited in line."""
        pending = self._pending.get(answer.number)
        if isinstance(answer.head, Steps):
            raise ShardFault(f"the shards answered pass {answer.number}, which was not expected")
        if pending is not None and isinstance(answer.head, Fault):
            pending.fault = answer.head
        elif pending is not None and isinstance(answer.head, Opened) and pending.place not in (0, answer.head.place):
            pending.place = answer.head.place
            if pending.place:
                log.warning(
                    "the shards have no room for %d tokens yet: place %d in line", pending.tokens, pending.place
                )

    def _drop_stale_opens(self) -> None:
        """Give up the places in line that were not asked for again in time."""
        for pending in list(self._pending.values()):
            if time.monotonic() - pending.at > KEPT_SECONDS:
                del self._pending[pending.number]
                self._close(pending.number)

    def _close(self, number: int) -> None:
        self._tell(number, Close(), "closed")

    def _tell(self, number: int, head: Head, what: str) -> None:
        try:
            self._transport.send(0, Message(number, head))
        except ShardLost as lost:
            log.info("request %d was %s without its shards: %s", number, what, lost)

    def _number(self) -> int:
        """A new number for a request or pass."""
        while True:
            self._numbered = self._numbered % (2**32 - 1) + 1
            if self._numbered not in self._journals and self._numbered not in self._pending:
                return self._numbered

    # Passes

    def _advance(self, extends: list[_Extend], want: Want) -> list[_Extend]:
        """Send every pass, then take the answers."""
        faults: list[Fault] = []
        for sent in [self._submit(parts, want) for parts in self._plan(extends)]:
            answer = self._collect(sent.number)
            self.passes.append(PassTime(sent.number, sent.head.rows, sent.submitted, time.monotonic()))
            if isinstance(answer.head, Fault):
                faults.append(answer.head)
            elif not faults:
                self._read(sent, answer)
        if faults:
            raise _fault_of(faults[0])
        for extend in extends:
            if extend.lost:
                raise _RequestLost(extend.number, extend.lost)
        return extends

    def _collect(self, number: int) -> Message:
        """The answer to a pass."""
        while (answer := self._transport.collect()).number != number:
            self._note(answer)
        return answer

    def _plan(self, extends: Sequence[_Extend]) -> Iterator[list[_Part]]:
        """The parts of each pass."""
        for parts in zip_longest(*(self._parts(extend) for extend in extends if not extend.fault)):
            for group in together([part for part in parts if part is not None], SWEEP_ROWS):
                yield from (group[first : first + MAX_PIECES] for first in range(0, len(group), MAX_PIECES))

    def _parts(self, extend: _Extend) -> list[_Part]:
        cuts = pieces_of(extend.position, len(extend.ids), extend.prompt_tokens, self._chunk)
        return [_Part(extend, start, extend.ids[start:end]) for start, end in cuts]

    def _submit(self, parts: Sequence[_Part], want: Want) -> _InFlight:
        number = self._number()
        has_logit_rules = any(self._journals[part.extend.number].session.sampling.logit_rules for part in parts)
        head = Pass(read_all=want == "all", for_logit_rules=has_logit_rules, pieces=[part.piece() for part in parts])
        submitted = time.monotonic()
        self._transport.send(0, Message(number, head, pack_tokens([id_ for part in parts for id_ in part.ids])))
        return _InFlight(number, head, parts, submitted)

    def _tops(self, sent: _InFlight, answer: Steps) -> list[int]:
        """How many top tokens the answer has in each row of each piece: none of a request that stopped."""
        stopped = {one.session for one in answer.stopped}
        asked = {piece.session: self._journals[piece.session].session.sampling.top_tokens for piece in sent.head.pieces}
        return [
            0 if piece.session in stopped else min(asked[piece.session], self.vocabulary_size)
            for piece in sent.head.pieces
        ]

    def _read(self, sent: _InFlight, answer: Message) -> None:
        if not isinstance(answer.head, Steps):
            raise ShardFault(f"pass {sent.number} was answered by {type(answer.head).__name__.upper()}")
        steps = iter(unpack_steps(sent.head, answer.body, self._tops(sent, answer.head)))
        for part, piece in zip(sent.parts, sent.head.pieces, strict=True):
            if sent.head.read_all or piece.is_last:
                part.extend.step = part.extend.step.then(next(steps))
        of_number = {part.extend.number: part.extend for part in sent.parts}
        for stopped in answer.head.stopped:
            one = of_number.get(stopped.session)
            if one is None or one.fault or one.lost:
                continue
            if stopped.code is FaultCode.lost:
                one.lost = stopped.text
            else:
                one.fault = stopped.text

    # Recovery

    def _with_recovery(self, call: Callable[[], Result]) -> Result:
        """The result of `call`, called again after losses of shards within `recovery_seconds` of the first one."""
        deadline: float | None = None
        began = 0.0
        while True:
            try:
                if deadline is not None:
                    self._restore(deadline, began)
                return self._with_requests(call)
            except ShardLost as lost:
                if deadline is None:
                    began = time.monotonic()
                    deadline = began + self._recovery_seconds
                if time.monotonic() >= deadline or isinstance(lost, ChainLost):
                    raise
                log.warning("%s; bringing the shards back", lost)

    def _with_requests(self, call: Callable[[], Result]) -> Result:
        """The result of `call`; a request that a shard has evicted is rebuilt once, and stopped the second time."""
        rebuilt: set[int] = set()
        while True:
            try:
                return call()
            except _RequestLost as lost:
                log.info("%s: rebuilding it", lost)
                journal = self._journals[lost.number]
                if lost.number in rebuilt:
                    journal.session.fault = journal.session.fault or str(lost)
                else:
                    self._rebuild(journal, time.monotonic() + self._recovery_seconds)
                rebuilt.add(lost.number)

    def _restore(self, deadline: float, began: float) -> None:
        self._pending.clear()
        self._transport.restore(deadline)
        connected = time.monotonic()
        held = [journal for journal in self._journals.values() if not journal.is_set_aside]
        for journal in held:
            self._rebuild(journal, deadline)
        self.recoveries.append(Recovery(began, connected, time.monotonic()))
        log.info("the shards hold all %d requests again", len(held))

    def _rebuild(self, journal: _Journal, deadline: float) -> None:
        """Prefill the ids of a request. If the shards have no room for it until `deadline` (monotonic seconds), it
        stops, and the others continue."""
        session = journal.session
        if session.fault:
            return
        if refusal := self._room_again(session, deadline):
            session.fault = f"the shards had lost it, and have no room for it now ({refusal})"
            self._close(session.key)
        elif session.position:
            try:
                ids = journal.ids[: session.position]
                [extend] = self._advance([_Extend(session.key, 0, ids, session.prompt_tokens)], "last")
                session.fault = session.fault or extend.fault
            except _RequestLost as lost:  # again, to another client's
                session.fault = str(lost)

    def _room_again(self, session: Session, deadline: float) -> str:
        """Ask the shards for the room of a request again; empty if they have it, else why they have none."""
        while True:
            self._close(session.key)
            pending = self._ask(_PendingOpen(session.key, session.sampling, session.most_tokens, time.monotonic()))
            try:
                self._await_room(pending, max(0.0, deadline - time.monotonic()))
            finally:
                self._pending.pop(session.key, None)
            if pending.fault is None:
                return f"place {pending.place} in line" if pending.place else ""
            if pending.fault.code is FaultCode.link:
                raise _fault_of(pending.fault)
            left = deadline - time.monotonic()
            if pending.fault.code is not FaultCode.full or left <= 0:
                return pending.fault.text
            # A line is full. Earlier shards must not keep room meanwhile: two clients might wait for each other.
            self._close(session.key)
            time.sleep(min(REGAIN_SECONDS, left))


def _fault_of(fault: Fault) -> Exception:
    match fault.code:
        case FaultCode.full:
            return CacheFull(fault.text)
        case FaultCode.link:
            return ShardLost(fault.text)
        case _:
            return ShardFault(f"{fault.code.name}: {fault.text}")
