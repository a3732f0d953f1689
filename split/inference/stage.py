"""A shard that infers, at its place in the chain: a message in, at most one out.

Knows the encoding of the boundaries; knows nothing about networks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor
from typing_extensions import override

from lab.engine.base import TargetStep, Want
from lab.engine.kv import CacheFull
from lab.engine.sampling import Sampling
from lab.engine.sampling_head import sampling_fields
from lab.settings import UserError
from lab.wire import pack_tokens
from lab.wire.tokens import TOKEN_BYTES
from split.chain.boundary import Boundary
from split.chain.messages import Fault, FaultCode, memory_fields
from split.inference.coding import decode, encode, stored
from split.inference.messages import STOPPED_BYTES, Close, Open, Opened, Pass, Piece, Report, Steps, Stopped, pack_steps
from split.inference.shard import Entering, Leaving, Shard, TextLost
from split.transport.base import Message, Sent, Stage, To

log = logging.getLogger(__name__)


@dataclass
class _UnderWay:
    """A pass at this shard."""

    run: Pass
    keys: Sequence[tuple[Hashable, int]]
    entering: Entering
    stopped: dict[int, Stopped]
    """Requests that have stopped, by session."""

    def stop(self, session: int, code: FaultCode, text: str) -> None:
        """Stop a request; only its first reason counts."""
        self.stopped.setdefault(session, Stopped(session=session, code=code, text=text[:256]))

    def all_stopped(self) -> list[Stopped]:
        """All of them, for the head of a frame: the more there are, the shorter their reasons."""
        most = STOPPED_BYTES // max(1, len(self.stopped))
        return [
            Stopped(session=one.session, code=one.code, text=one.text.encode()[:most].decode(errors="ignore"))
            for one in self.stopped.values()
        ]


@dataclass
class Counts:
    """Requests and tokens of a shard so far."""

    texts: int = 0
    """Requests that got room."""
    left: int = 0
    """Requests whose client left before their end."""
    refused: int = 0
    """Requests that got no room: they would never have fitted, or too many waited in line."""
    failed: int = 0
    """Requests that stopped in a pass at this shard, lost ones included."""
    tokens: int = 0
    """Positions computed."""


class InferenceStage(Stage):
    """A shard with its boundaries encoded."""

    def __init__(self, shard: Shard, boundary: Boundary) -> None:
        self.shard = shard
        self.boundary = boundary
        self.layers, self.context, self.sessions = shard.layers, shard.limits.context, shard.limits.sessions
        self.onward = To.client if shard.gives_steps else To.next
        """Receiver of its results."""
        self.coding_seconds = 0.0
        self.boundary_bytes = 0
        self.counts = Counts()
        self._texts: dict[Hashable, set[int]] = {}
        """Open requests of each client."""

    @override
    def take(self, message: Message, client: Hashable = 0) -> Iterator[Sent]:
        # A fault takes the place of a result, which later shards hand on: the client gets its answers in order. What
        # one text of a pass does wrong stops that text only.
        self.coding_seconds = 0.0
        result: Message | None
        try:
            result = self._do(client, message)
        except Exception as error:  # of torch, of a device, too: the client is to know, all others go on
            if isinstance(message.head, Open) and _code(error) is not FaultCode.full:
                self.counts.refused += 1
            result = Message(message.number, Fault(code=_code(error), text=_one_line(error)[:1024]))
        if result is not None:
            yield self.onward, result

    @override
    def figures(self, name: str) -> Report:
        shard = self.shard
        return Report(
            clock_seconds=time.monotonic(),
            name=name,
            weights_bytes=shard.weights_bytes,
            kv_bytes=shard.cache.allocated_bytes,
            **memory_fields(shard.device),
        )

    def prove(self) -> None:
        """Run a request of two tokens. UserError when that fails: no request could be served."""
        most = min(2, self.shard.longest)
        piece = Piece(session=1, position=0, count=most, is_first=True, is_last=True)
        states = b"" if self.shard.takes_ids else bytes(most * self.boundary.row_bytes(self.shard.hidden_size))
        for message in (
            Message(1, Open(tokens=most, **sampling_fields(Sampling.greedy()))),
            Message(2, Pass(read_all=True, pieces=[piece]), pack_tokens([0] * most) + states),
        ):
            [(_, result)] = self.take(message, "nobody")
            faults = [result.head] if isinstance(result.head, Fault) else getattr(result.head, "stopped", [])
            for fault in faults:
                if fault.code is not FaultCode.unfit:  # zeros are no hidden states: they may come to anything
                    raise UserError(f"model must run two tokens through {self._named}: {fault.text}")
        self.forget("nobody")
        self.counts = Counts()

    @override
    def forget(self, client: Hashable = 0) -> None:
        for number in self._texts.pop(client, set()):
            self.counts.left += 1
            self.shard.close((client, number))

    def _do(self, client: Hashable, message: Message) -> Message | None:
        head = message.head
        if isinstance(head, Pass):
            return self._run(client, message.number, head, memoryview(message.body))
        if isinstance(head, Open):
            self.shard.open((client, message.number), head.sampling, head.tokens)
            self._texts.setdefault(client, set()).add(message.number)
            self.counts.texts += 1
            return Message(message.number, Opened(place=0)) if self.shard.gives_steps else message
        if isinstance(head, Close):
            self.shard.close((client, message.number))
            self._texts.get(client, set()).discard(message.number)
            return None if self.shard.gives_steps else message
        return message

    def _run(self, client: Hashable, number: int, run: Pass, body: memoryview) -> Message:
        began = time.monotonic()
        under_way = self._read(client, run, body)
        decoded = time.monotonic()
        leaving = self._advance(under_way)
        computed = time.monotonic()
        result = self._write(number, under_way, leaving)
        self.counts.failed += len(under_way.stopped) - len(run.stopped)
        self.counts.tokens += sum(piece.count for piece in run.pieces if piece.session not in under_way.stopped)
        self.coding_seconds = decoded - began + time.monotonic() - computed
        return result

    def _advance(self, under_way: _UnderWay) -> Leaving:
        """Results of a pass; zeros, and empty steps, for the requests that stopped."""
        pieces, want = under_way.entering.pieces, under_way.entering.want
        sound = [place for place, piece in enumerate(pieces) if piece.session not in under_way.stopped]
        results = self._together(under_way, sound)
        if self.shard.gives_steps:
            read = [place for place, piece in enumerate(pieces) if want == "all" or piece.is_last]
            return [results.get(place) or _no_step(pieces[place], want) for place in read]
        parts = [self._zeros(piece) if place not in results else results[place] for place, piece in enumerate(pieces)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _together(self, under_way: _UnderWay, places: Sequence[int]) -> dict[int, Any]:
        """Results of these pieces, by place, in one pass; where that fails, of each alone: a fault has one owner."""
        if not places:
            return {}
        entering = under_way.entering.only(places)
        try:
            leaving = self.shard.run([under_way.keys[place] for place in places], entering)
        except Exception as error:  # of torch, of a device
            if len(places) > 1:
                log.info("a pass of %d texts failed (%s): each is tried alone", len(places), _one_line(error))
                return {place: result for one in places for place, result in self._together(under_way, [one]).items()}
            if _code(error) is FaultCode.failed:
                log.exception("a text failed in %s", self._named)
            session = under_way.entering.pieces[places[0]].session
            under_way.stop(session, _code(error), f"{_one_line(error)} in {self._named}")
            return {}
        if isinstance(leaving, Tensor):
            return dict(zip(places, leaving.split([piece.count for piece in entering.pieces]), strict=True))
        given = [place for place in places if entering.want == "all" or under_way.entering.pieces[place].is_last]
        return dict(zip(given, leaving, strict=True))

    def _zeros(self, piece: Piece) -> Tensor:
        shard = self.shard
        return torch.zeros(piece.count, shard.hidden_size, dtype=shard.dtype, device=shard.device)

    def _write(self, number: int, under_way: _UnderWay, leaving: Leaving) -> Message:
        run = under_way.run
        if not isinstance(leaving, Tensor):
            if any(step.fault for step in leaving):
                self._stop_unread(under_way, leaving)
            return Message(number, Steps(stopped=under_way.all_stopped()), pack_steps(leaving))
        stored_NH = stored(leaving, self.boundary)
        if not bool(stored_NH.isfinite().all()):
            self._stop_unfit(under_way, leaving, "hold NaN or infinity in", self._find_faults(under_way))
            stored_NH = stored(leaving, self.boundary)
            self._stop_unfit(under_way, stored_NH, f"do not fit the boundary {self.boundary.name} behind")
        hidden = encode(stored_NH, self.boundary)
        stopped = under_way.all_stopped()
        head = msgspec.structs.replace(run, stopped=stopped) if stopped else run
        ids = pack_tokens(under_way.entering.ids) if run.ids_for_last else b""
        return Message(number, head, ids + bytes(hidden) if ids else hidden)

    def _find_faults(self, under_way: _UnderWay) -> dict[int, int | None]:
        """Where in its piece each sound text first met NaN or infinity, by session."""
        pieces = under_way.run.pieces
        sound = [place for place, piece in enumerate(pieces) if piece.session not in under_way.stopped]
        try:
            firsts = self.shard.find_faults([under_way.keys[place] for place in sound], under_way.entering.only(sound))
        except Exception as error:  # the pass went well just before: memory
            log.info("where NaN began was not found (%s)", _one_line(error))
            return {}
        return {pieces[place].session: first for place, first in zip(sound, firsts, strict=True)}

    @torch.inference_mode()  # what the shard gives was made in it
    def _stop_unfit(
        self, under_way: _UnderWay, hidden_NH: Tensor, what: str, firsts: Mapping[int, int | None] | None = None
    ) -> None:
        """Stop the texts with hidden states that are not finite; zeros take the place of these: the pass goes on.

        `firsts` are the places in each piece where that began; without them the first that is not finite is named.
        """
        finite_N = hidden_NH.isfinite().all(-1)
        if bool(finite_N.all()):
            return
        pieces = under_way.run.pieces
        counts = [piece.count for piece in pieces]
        for piece, own_KH, finite_K in zip(pieces, hidden_NH.split(counts), finite_N.split(counts), strict=True):
            if not bool(finite_K.all()):
                first = firsts.get(piece.session) if firsts else None
                seen = finite_K.tolist().index(False) if first is None else first
                under_way.stop(piece.session, FaultCode.unfit, self._unfit(piece, seen, what))
                own_KH.zero_()

    def _stop_unread(self, under_way: _UnderWay, steps: Sequence[TargetStep]) -> None:
        """Stop the texts whose logits are not finite."""
        firsts = self._find_faults(under_way)
        read = [piece for piece in under_way.run.pieces if under_way.run.read_all or piece.is_last]
        for piece, step in zip(read, steps, strict=True):
            first = firsts.get(piece.session)
            if step.fault and first is not None:
                under_way.stop(piece.session, FaultCode.unfit, self._unfit(piece, first, "hold NaN or infinity in"))
            elif step.fault:
                under_way.stop(piece.session, FaultCode.unfit, f"{step.fault} in {self._named}")

    def _unfit(self, piece: Piece, place: int, what: str) -> str:
        return f"the hidden states of position {piece.position + place} {what} {self._named}"

    @property
    def _named(self) -> str:
        return f"the shard of layers {self.layers.start}:{self.layers.stop}"

    def _read(self, client: Hashable, run: Pass, body: memoryview) -> _UnderWay:
        """Raises ValueError for a pass that makes no sense as a whole."""
        shard = self.shard
        if len({piece.session for piece in run.pieces}) < len(run.pieces):
            raise ValueError(f"texts of a pass must be different from each other, got {len(run.pieces)} with one twice")
        ids_bytes = TOKEN_BYTES * run.rows if shard.takes_ids or run.ids_for_last else 0
        if len(body) < ids_bytes:
            raise ValueError(f"a pass of {run.rows} positions must bring {ids_bytes} bytes of ids, got {len(body)}")
        ids = list(body[:ids_bytes].cast("i")) if ids_bytes else []
        keys = [(client, piece.session) for piece in run.pieces]
        stopped = {stopped.session: stopped for stopped in run.stopped}
        if shard.takes_ids:
            if len(body) != ids_bytes:
                raise ValueError(f"the first shard must get {ids_bytes} bytes of ids, got {len(body)}")
            return _UnderWay(run, keys, Entering(run.pieces, run.want, ids), stopped)
        hidden_NH = decode(
            body[ids_bytes:], run.rows, shard.hidden_size, self.boundary, dtype=shard.dtype, device=shard.device
        )
        under_way = _UnderWay(run, keys, Entering(run.pieces, run.want, ids, hidden_NH), stopped)
        self._stop_unfit(under_way, hidden_NH, f"do not fit {shard.dtype} before")
        return under_way


def _no_step(piece: Piece, want: Want) -> TargetStep:
    """A placeholder of the size of a stopped request's step."""
    rows = piece.count if want == "all" else 1
    return TargetStep([0] * rows, [0.0] * rows, [0.0] * rows, [0.0] * rows if want == "all" else [])


def _code(error: Exception) -> FaultCode:
    """The fault code of an exception."""
    for kind, code in _CODES.items():
        if isinstance(error, kind):
            return code
    return FaultCode.failed


_CODES: dict[type[Exception], FaultCode] = {
    TextLost: FaultCode.lost,
    CacheFull: FaultCode.full,
    ValueError: FaultCode.refused,
}


def _one_line(error: Exception) -> str:
    name = f"{type(error).__name__}: " if _code(error) is FaultCode.failed else ""
    return name + " ".join(str(error).split())
