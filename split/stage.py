"""One shard at its place in the chain: a message in, a message out; the transports only carry.

Knows the encoding of the boundaries; knows nothing about networks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Sequence

import msgspec
import torch
from torch import Tensor

from lab.engine import TargetStep
from lab.kv import CacheFull
from lab.wire import pack_tokens
from lab.wire.tokens import TOKEN_BYTES
from split.boundary import Boundary
from split.coding import decode, encode, stored
from split.messages import Close, Fault, FaultCode, Open, Pass, Piece, Steps, Unfit, pack_steps
from split.shard import Entering, Leaving, Shard, TextLost
from split.transport.base import Message

log = logging.getLogger(__name__)


class Stage:
    """A shard with its boundaries encoded. One thread at a time."""

    def __init__(self, shard: Shard, boundary: Boundary) -> None:
        self.shard = shard
        self.boundary = boundary
        self.coding_seconds = 0.0
        """What the last message spent on turning bytes into tensors and back."""
        self._texts: dict[Hashable, set[int]] = {}
        """The open texts of each client."""

    def take(self, client: Hashable, message: Message) -> Message | None:
        """Do what a client's message asks of this shard; return what the next shard, or from the last one the client,
        is to get; None for nothing.

        Never raises for what a message holds: a `Fault` takes its place, which later shards hand on.
        """
        self.coding_seconds = 0.0
        try:
            return self._do(client, message)
        except TextLost as lost:
            return _fault(message, FaultCode.lost, str(lost), lost.session)
        except CacheFull as full:
            return _fault(message, FaultCode.full, str(full))
        except ValueError as refused:
            return _fault(message, FaultCode.refused, str(refused))
        except Exception as error:  # of torch, of a device: the client is to know, the other texts go on
            log.exception("a pass of shard %s failed", self.shard.layers)
            return _fault(message, FaultCode.failed, f"{type(error).__name__}: {error}")

    def forget(self, client: Hashable) -> None:
        """Close all texts of a client that has left."""
        for number in self._texts.pop(client, set()):
            self.shard.close((client, number))

    def _do(self, client: Hashable, message: Message) -> Message | None:
        head = message.head
        if isinstance(head, Pass):
            return self._run(client, message.number, head, memoryview(message.body))
        if isinstance(head, Open):
            self.shard.open((client, message.number), head.sampling)
            self._texts.setdefault(client, set()).add(message.number)
            return Message(message.number, Steps()) if self.shard.gives_steps else message
        if isinstance(head, Close):
            self.shard.close((client, message.number))
            self._texts.get(client, set()).discard(message.number)
            return None if self.shard.gives_steps else message
        return message

    def _run(self, client: Hashable, number: int, run: Pass, body: memoryview) -> Message:
        began = time.monotonic()
        entering = self._read(run, body)
        unfit = list(run.unfit)
        if entering.hidden_NH is not None:
            unfit += self._end_unfit(run, entering.hidden_NH, f"do not fit {self.shard.dtype} before")
        decoded = time.monotonic()
        keys = [(client, piece.session) for piece in run.pieces]
        leaving = self.shard.run(keys, entering)
        computed = time.monotonic()
        result = self._write(number, run, entering, leaving, unfit, keys)
        self.coding_seconds = decoded - began + time.monotonic() - computed
        return result

    def _write(
        self,
        number: int,
        run: Pass,
        entering: Entering,
        leaving: Leaving,
        unfit: list[Unfit],
        keys: Sequence[tuple[Hashable, int]],
    ) -> Message:
        if not isinstance(leaving, torch.Tensor):
            if any(step.fault for step in leaving):
                unfit += self._end_unread(run, leaving, self.shard.find_faults(keys, entering))
            return Message(number, Steps(unfit=unfit), pack_steps(leaving))
        stored_NH = stored(leaving, self.boundary)
        if not bool(stored_NH.isfinite().all()):
            firsts = self.shard.find_faults(keys, entering)
            unfit += self._end_unfit(run, leaving, "hold NaN or infinity in", firsts)
            stored_NH = stored(leaving, self.boundary)
            unfit += self._end_unfit(run, stored_NH, f"do not fit the boundary {self.boundary.name} behind")
        hidden = encode(stored_NH, self.boundary)
        head = msgspec.structs.replace(run, unfit=unfit) if unfit else run
        return Message(number, head, pack_tokens(entering.ids) + bytes(hidden) if run.ids_for_last else hidden)

    @torch.inference_mode()  # what the shard gives was made in it
    def _end_unfit(
        self, run: Pass, hidden_NH: Tensor, what: str, firsts: Sequence[int | None] | None = None
    ) -> list[Unfit]:
        """The texts with hidden states that are not finite; zeros take the place of these, so that the pass goes on.

        `firsts` are the places in each piece where that began; without them the first that is not finite is named.
        """
        finite_N = hidden_NH.isfinite().all(-1)
        if bool(finite_N.all()):
            return []
        counts = [piece.count for piece in run.pieces]
        unfit = []
        for index, (own_KH, finite_K) in enumerate(zip(hidden_NH.split(counts), finite_N.split(counts), strict=True)):
            if not bool(finite_K.all()):
                first = firsts[index] if firsts else None
                unfit.append(self._unfit(run.pieces[index], first, finite_K.tolist().index(False), what))
                own_KH.zero_()
        return unfit

    def _end_unread(self, run: Pass, steps: Sequence[TargetStep], firsts: Sequence[int | None]) -> list[Unfit]:
        """The texts whose logits are not finite."""
        read = [index for index, piece in enumerate(run.pieces) if run.read_all or piece.is_last]
        unfit = []
        for index, step in zip(read, steps, strict=True):
            piece, first = run.pieces[index], firsts[index]
            if step.fault and first is not None:
                unfit.append(self._unfit(piece, first, first, "hold NaN or infinity in"))
            elif step.fault:
                unfit.append(Unfit(session=piece.session, text=f"{step.fault} in {self._layers}"))
        return unfit

    def _unfit(self, piece: Piece, first: int | None, seen: int, what: str) -> Unfit:
        position = piece.position + (seen if first is None else first)
        return Unfit(session=piece.session, text=f"the hidden states of position {position} {what} {self._layers}")

    @property
    def _layers(self) -> str:
        return f"the shard of layers {self.shard.layers.start}:{self.shard.layers.stop}"

    def _read(self, run: Pass, body: memoryview) -> Entering:
        shard = self.shard
        ids_bytes = TOKEN_BYTES * run.rows if shard.takes_ids or run.ids_for_last else 0
        if len(body) < ids_bytes:
            raise ValueError(f"a pass of {run.rows} positions must bring {ids_bytes} bytes of ids, got {len(body)}")
        ids = list(body[:ids_bytes].cast("i")) if ids_bytes else []
        if shard.takes_ids:
            if len(body) != ids_bytes:
                raise ValueError(f"the first shard must get {ids_bytes} bytes of ids, got {len(body)}")
            return Entering(run.pieces, run.want, ids)
        hidden_NH = decode(
            body[ids_bytes:], run.rows, shard.hidden_size, self.boundary, dtype=shard.dtype, device=shard.device
        )
        return Entering(run.pieces, run.want, ids, hidden_NH)


def _fault(message: Message, code: FaultCode, text: str, session: int = 0) -> Message:
    return Message(message.number, Fault(code=code, session=session, text=text[:1024]))
