"""One shard at its place in the chain: a message in, a message out; the transports only carry.

Knows the encoding of the boundaries; knows nothing about networks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable

import torch

from lab.kv import CacheFull
from lab.sampling import Sampling
from lab.wire import pack_tokens
from lab.wire.tokens import TOKEN_BYTES
from split.boundary import Boundary
from split.coding import decode, encode
from split.messages import Close, Fault, FaultCode, Open, Pass, Steps, pack_steps
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
            sampling = Sampling(seed=head.seed, temperature=head.temperature, top_k=head.top_k, top_p=head.top_p)
            self.shard.open((client, message.number), sampling)
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
        decoded = time.monotonic()
        leaving = self.shard.run([(client, piece.session) for piece in run.pieces], entering)
        computed = time.monotonic()
        result = self._write(number, run, entering, leaving)
        self.coding_seconds = decoded - began + time.monotonic() - computed
        return result

    def _write(self, number: int, run: Pass, entering: Entering, leaving: Leaving) -> Message:
        if not isinstance(leaving, torch.Tensor):
            return Message(number, Steps(), pack_steps(leaving))
        hidden = encode(leaving, self.boundary)
        return Message(number, run, pack_tokens(entering.ids) + bytes(hidden) if run.read_all else hidden)

    def _read(self, run: Pass, body: memoryview) -> Entering:
        shard = self.shard
        ids_bytes = TOKEN_BYTES * run.rows if shard.takes_ids or run.read_all else 0
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
