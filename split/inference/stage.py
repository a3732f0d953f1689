"""An inference shard in its chain: takes a message, yields at most one.

Knows the encoding of the boundaries; knows nothing about networks.
"""

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
from lab.wire.tokens import TOKEN_BYTES, pack_tokens
from split.chain.boundary import Boundary
from split.chain.messages import Fault, FaultCode, process_figures
from split.inference.coding import decode, encode, stored
from split.inference.messages import (
    STOPPED_BYTES,
    Close,
    Open,
    Opened,
    Pass,
    Piece,
    Reopen,
    Report,
    SetAside,
    Steps,
    Stopped,
    pack_steps,
)
from split.inference.shard import PassInput, PassOutput, RequestLost, Shard
from split.transport.base import Message, Sent, Stage, To

log = logging.getLogger(__name__)


@dataclass
class _InFlight:
    """A pass at this shard, with the requests that stopped in it."""

    head: Pass
    keys: Sequence[tuple[Hashable, int]]
    input: PassInput
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
    """Requests that were refused: they would never fit, or too many waited in line."""
    failed: int = 0
    """Requests that stopped in a pass at this shard, including lost ones."""
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
        self._requests: dict[Hashable, set[int]] = {}
        """Open requests of each client."""

    @override
    def take(self, message: Message, client: Hashable = 0) -> Iterator[Sent]:
        # A fault takes the place of a result, and later shards pass it on: the client gets its answers in order.
        # A fault of one request in a pass stops only that request.
        self.coding_seconds = 0.0
        result: Message | None
        try:
            result = self._do(client, message)
        except Exception as error:  # of torch or a device, too: tell the client, and serve all others
            if isinstance(message.head, Open) and _code(error) is not FaultCode.full:
                self.counts.refused += 1
            result = Message(message.number, Fault(code=_code(error), text=_one_line(error)[:1024]))
        if result is not None:
            yield self.onward, result

    def may_wait(self, client: Hashable, number: int, head: Open) -> bool:
        """Whether a request without room may have some later; one that never will is refused by `take`."""
        try:
            self.shard.check_open((client, number), head.sampling, head.tokens)
        except ValueError:
            return False
        return True

    @override
    def figures(self, name: str) -> Report:
        shard = self.shard
        return Report(
            name=name,
            weights_bytes=shard.weights_bytes,
            kv_bytes=shard.cache.allocated_bytes,
            **process_figures(shard.device),
        )

    def prove(self) -> None:
        """Run a request of two tokens. UserError if it fails: then no request could be served."""
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
                if fault.code is not FaultCode.unfit:  # the zeros are not real hidden states: NaN proves nothing
                    raise UserError(f"model must run two tokens through {self._named}: {fault.text}")
        self.forget("nobody")
        self.counts = Counts()

    @override
    def forget(self, client: Hashable = 0) -> None:
        for number in self._requests.pop(client, set()):
            self.counts.left += 1
            self.shard.close((client, number))

    def _do(self, client: Hashable, message: Message) -> Message | None:
        head = message.head
        if isinstance(head, Pass):
            return self._forward(client, message.number, head, memoryview(message.body))
        if isinstance(head, Reopen):
            return self._reopen(client, message, head)
        if isinstance(head, SetAside):
            self.shard.set_aside((client, message.number), head.tokens)
            return None if self.shard.gives_steps else message
        if isinstance(head, Open):
            self.shard.open((client, message.number), head.sampling, head.tokens)
            self._requests.setdefault(client, set()).add(message.number)
            self.counts.texts += 1
            return Message(message.number, Opened(place=0)) if self.shard.gives_steps else message
        if isinstance(head, Close):
            self.shard.close((client, message.number))
            self._requests.get(client, set()).discard(message.number)
            return None if self.shard.gives_steps else message
        return message

    def _reopen(self, client: Hashable, message: Message, head: Reopen) -> Message:
        ids_bytes = TOKEN_BYTES * head.position if head.logit_rules else 0
        if len(message.body) != ids_bytes:
            raise ValueError(f"a request that is reopened must bring {ids_bytes} bytes of ids, got {len(message.body)}")
        ids = list(memoryview(message.body).cast("i")) if ids_bytes else []
        self.shard.reopen((client, message.number), head.sampling, head.tokens, head.position, ids)
        self.counts.texts += 1
        return Message(message.number, Opened(place=0)) if self.shard.gives_steps else message

    def _forward(self, client: Hashable, number: int, head: Pass, body: memoryview) -> Message:
        began = time.monotonic()
        in_flight = self._read(client, head, body)
        decoded = time.monotonic()
        output = self._advance(in_flight)
        computed = time.monotonic()
        result = self._write(number, in_flight, output)
        self.counts.failed += len(in_flight.stopped) - len(head.stopped)
        self.counts.tokens += sum(piece.count for piece in head.pieces if piece.session not in in_flight.stopped)
        self.coding_seconds = decoded - began + time.monotonic() - computed
        return result

    def _advance(self, in_flight: _InFlight) -> PassOutput:
        """Results of a pass; zeros, and empty steps, for the requests that stopped."""
        pieces, want = in_flight.input.pieces, in_flight.input.want
        sound = [place for place, piece in enumerate(pieces) if piece.session not in in_flight.stopped]
        results = self._together(in_flight, sound)
        if self.shard.gives_steps:
            read = [place for place, piece in enumerate(pieces) if want == "all" or piece.is_last]
            return [results.get(place) or _no_step(pieces[place], want) for place in read]
        parts = [self._zeros(piece) if place not in results else results[place] for place, piece in enumerate(pieces)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _together(self, in_flight: _InFlight, places: Sequence[int]) -> dict[int, Any]:
        """Results of these pieces, by place, from one pass; if it fails, each alone, so that a fault has one owner."""
        if not places:
            return {}
        chosen = in_flight.input.only(places)
        try:
            output = self.shard.forward([in_flight.keys[place] for place in places], chosen)
        except Exception as error:  # of torch or a device
            if len(places) > 1:
                log.info("a pass of %d requests failed (%s): each is tried alone", len(places), _one_line(error))
                return {place: result for one in places for place, result in self._together(in_flight, [one]).items()}
            if _code(error) is FaultCode.failed:
                log.exception("a request failed in %s", self._named)
            session = in_flight.input.pieces[places[0]].session
            in_flight.stop(session, _code(error), f"{_one_line(error)} in {self._named}")
            return {}
        if isinstance(output, Tensor):
            return dict(zip(places, output.split([piece.count for piece in chosen.pieces]), strict=True))
        given = [place for place in places if chosen.want == "all" or in_flight.input.pieces[place].is_last]
        return dict(zip(given, output, strict=True))

    def _zeros(self, piece: Piece) -> Tensor:
        shard = self.shard
        return torch.zeros(piece.count, shard.hidden_size, dtype=shard.dtype, device=shard.device)

    def _write(self, number: int, in_flight: _InFlight, output: PassOutput) -> Message:
        head = in_flight.head
        if not isinstance(output, Tensor):
            if any(step.fault for step in output):
                self._stop_unread(in_flight, output)
            return Message(number, Steps(stopped=in_flight.all_stopped()), pack_steps(output))
        stored_NH = stored(output, self.boundary)
        if not bool(stored_NH.isfinite().all()):
            unfit = [
                not bool(own_KH.isfinite().all()) for own_KH in output.split([piece.count for piece in head.pieces])
            ]
            self._stop_unfit(in_flight, output, "hold NaN or infinity in", self._find_faults(in_flight, unfit))
            stored_NH = stored(output, self.boundary)
            self._stop_unfit(in_flight, stored_NH, f"do not fit the boundary {self.boundary.name} behind")
        hidden = encode(stored_NH, self.boundary)
        stopped = in_flight.all_stopped()
        ids = pack_tokens(in_flight.input.ids) if head.ids_for_last else b""
        if stopped:
            head = msgspec.structs.replace(head, stopped=stopped)
        return Message(number, head, ids + bytes(hidden) if ids else hidden)

    def _find_faults(self, in_flight: _InFlight, unfit: Sequence[bool]) -> dict[int, int | None]:
        """Position in its piece at which each `unfit` request first met NaN or infinity, by session."""
        pieces = in_flight.head.pieces
        # Only these are computed once more: the others keep what the cache holds of them.
        places = [
            place for place, piece in enumerate(pieces) if unfit[place] and piece.session not in in_flight.stopped
        ]
        if not places:
            return {}
        try:
            firsts = self.shard.find_faults([in_flight.keys[place] for place in places], in_flight.input.only(places))
        except Exception as error:  # the pass itself worked: no memory for a second one
            log.info("the first position with NaN was not found (%s)", _one_line(error))
            return {}
        return {pieces[place].session: first for place, first in zip(places, firsts, strict=True)}

    @torch.inference_mode()  # the shard's tensors were made in it
    def _stop_unfit(
        self, in_flight: _InFlight, hidden_NH: Tensor, what: str, firsts: Mapping[int, int | None] | None = None
    ) -> None:
        """Stop requests whose hidden states are not finite, with zeros in place of these: the pass continues.

        `firsts` are the first such positions in each piece; without them the first one that is not finite is named.
        """
        finite_N = hidden_NH.isfinite().all(-1)
        if bool(finite_N.all()):
            return
        pieces = in_flight.head.pieces
        counts = [piece.count for piece in pieces]
        for piece, own_KH, finite_K in zip(pieces, hidden_NH.split(counts), finite_N.split(counts), strict=True):
            if not bool(finite_K.all()):
                first = firsts.get(piece.session) if firsts else None
                seen = finite_K.tolist().index(False) if first is None else first
                in_flight.stop(piece.session, FaultCode.unfit, self._unfit(piece, seen, what))
                own_KH.zero_()

    def _stop_unread(self, in_flight: _InFlight, steps: Sequence[TargetStep]) -> None:
        """Stop requests whose logits are not finite."""
        read = [piece for piece in in_flight.head.pieces if in_flight.head.read_all or piece.is_last]
        wrong = {piece.session for piece, step in zip(read, steps, strict=True) if step.fault}
        firsts = self._find_faults(in_flight, [piece.session in wrong for piece in in_flight.head.pieces])
        for piece, step in zip(read, steps, strict=True):
            first = firsts.get(piece.session)
            if step.fault and first is not None:
                in_flight.stop(piece.session, FaultCode.unfit, self._unfit(piece, first, "hold NaN or infinity in"))
            elif step.fault:
                in_flight.stop(piece.session, FaultCode.unfit, f"{step.fault} in {self._named}")

    def _unfit(self, piece: Piece, place: int, what: str) -> str:
        return f"the hidden states of position {piece.position + place} {what} {self._named}"

    @property
    def _named(self) -> str:
        return f"the shard of layers {self.layers.start}:{self.layers.stop}"

    def _read(self, client: Hashable, head: Pass, body: memoryview) -> _InFlight:
        """Read a pass. ValueError for one that is invalid as a whole."""
        shard = self.shard
        if len({piece.session for piece in head.pieces}) < len(head.pieces):
            raise ValueError(
                f"requests of a pass must be different from each other, got {len(head.pieces)} with one twice"
            )
        ids_bytes = TOKEN_BYTES * head.rows if shard.takes_ids or head.ids_for_last else 0
        if len(body) < ids_bytes:
            raise ValueError(f"a pass of {head.rows} positions must bring {ids_bytes} bytes of ids, got {len(body)}")
        ids = list(body[:ids_bytes].cast("i")) if ids_bytes else []
        keys = [(client, piece.session) for piece in head.pieces]
        stopped = {stopped.session: stopped for stopped in head.stopped}
        if shard.takes_ids:
            if len(body) != ids_bytes:
                raise ValueError(f"the first shard must get {ids_bytes} bytes of ids, got {len(body)}")
            return _InFlight(head, keys, PassInput(head.pieces, head.want, ids), stopped)
        hidden_NH = decode(
            body[ids_bytes:], head.rows, shard.hidden_size, self.boundary, dtype=shard.dtype, device=shard.device
        )
        in_flight = _InFlight(head, keys, PassInput(head.pieces, head.want, ids, hidden_NH), stopped)
        self._stop_unfit(in_flight, hidden_NH, f"do not fit {shard.dtype} before")
        return in_flight


def _no_step(piece: Piece, want: Want) -> TargetStep:
    """A placeholder of the size of a stopped request's step."""
    rows = piece.count if want == "all" else 1
    return TargetStep([0] * rows, [0.0] * rows, [0.0] * rows, [0.0] * rows if want == "all" else [])


def _code(error: Exception) -> FaultCode:
    """The fault code for an exception."""
    for kind, code in _CODES.items():
        if isinstance(error, kind):
            return code
    return FaultCode.failed


_CODES: dict[type[Exception], FaultCode] = {
    RequestLost: FaultCode.lost,
    CacheFull: FaultCode.full,
    ValueError: FaultCode.refused,
}


def _one_line(error: Exception) -> str:
    name = f"{type(error).__name__}: " if _code(error) is FaultCode.failed else ""
    return name + " ".join(str(error).split())
