"""Split training over torch.distributed.rpc: the messages of `split.training.messages`, and torch's own autograd.

Trusted networks only: it is pickle (`split.transport.rpc`). With backward=autograd the shards' seats are called
instead: hidden states are fetched by the next shard from the one that made them, and torch notes on both sides what
its distributed backward will need.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed.rpc as torch_rpc
from torch import Tensor
from torch.distributed.autograd import get_gradients  # type: ignore[attr-defined]  # public, but not in __all__
from torch.distributed.rpc import PyRRef  # type: ignore[attr-defined]  # the same

from lab.device import read_memory
from lab.wire import Head
from split.chain.messages import Fault, FaultCode
from split.training.shard import Entering
from split.training.stage import To, TrainingStage
from split.transport.base import Message, ShardLost
from split.transport.rpc import INBOX, Member, Place, RpcChain, as_tensor, check_delivered, tell_client

log = logging.getLogger(__name__)

WORKER_THREADS = 128
"""Of each process's agent. A call that waits for another shard's result keeps one until the result is there."""


class Gathered(NamedTuple):
    """What a shard says after a distributed backward."""

    squares: float
    is_finite: bool
    held: int
    boundary_bytes: int
    busy_seconds: float
    """Processor time since the step began."""
    rss_bytes: int


class LearnerSeat(Member):
    """A stage that learns, in a group."""

    worker_threads = WORKER_THREADS
    gradient_seconds = 30.0
    """Longest wait for a gradient after the backward."""

    def __init__(self, stage: TrainingStage, place: Place) -> None:
        super().__init__(place)
        self._stage = stage
        self._neighbours: dict[To, Any] = {}
        self._arrived: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="stage", daemon=True)
        self._computing = threading.Lock()

    def join(self, before: Any, behind: Any) -> None:
        """The trainer has found all seats: the RRefs of our neighbours, None where there is none."""
        self._neighbours = {To.previous: before, To.next: behind}
        self._thread.start()

    def deliver(self, number: int, head: Head, body: Tensor) -> None:
        """Take a message; it is done after those before it."""
        self._arrived.put(Message(number, head, body.numpy().data))

    def _work(self) -> None:
        while True:
            for to, message in self._stage.take(self._arrived.get()):
                body = as_tensor(message.body)
                if to is To.trainer:
                    tell_client(0, message.number, message.head, body)
                    continue
                self._stage.boundary_bytes += len(message.body)
                future = self._neighbours[to].rpc_async().deliver(message.number, message.head, body)
                future.add_done_callback(lambda done, number=message.number: check_delivered(done, 0, number))

    # backward=autograd

    def parameters(self) -> list[Any]:
        """RRefs to the trainable weights."""
        return [torch_rpc.RRef(weight) for weight in self._stage.shard.weights.values()]

    def adopt(self, local_optimizer: Any) -> None:
        """The optimizer that `DistributedOptimizer` made here goes on where the shard's own one stood."""
        shard, made = self._stage.shard, local_optimizer.local_value().optim
        assert shard.optimizer is not None
        names = list(shard.weights)
        made.load_tensors(names, shard.optimizer.tensors(names))
        shard.optimizer = made

    def begin_step(self) -> None:
        """Forget what the step before left."""
        self._stage.shard.forget_gradients()
        self._stage.boundary_bytes = 0
        self._is_finite = True
        self._forwards = 0
        self._began = time.process_time()

    def forward(
        self, step: int, micro_batch: int, states: Any, lengths: Sequence[int], labels_BT: Tensor | None, tokens: int
    ) -> Tensor:
        """A micro-batch's hidden states, from the last shard its share of the loss; in the caller's context."""
        if isinstance(states, PyRRef):
            states = states.to_here()  # from the shard before, which notes that its gradient will come from here
        with self._computing:
            leaving = self._stage.shard.run(Entering(step, micro_batch, states, lengths, labels_BT, tokens))
            self._forwards += 1
            self._is_finite = self._is_finite and bool(leaving.isfinite().all())
            if leaving.dim():
                self._stage.boundary_bytes += (2 if leaving.requires_grad else 1) * leaving.nbytes  # and its gradient
        return leaving

    def gather(self, context: int) -> Gathered:
        """Take the gradients out of the context, so that all else is as after a backward of our own."""
        self._take_gradients(context)
        shard = self._stage.shard
        return Gathered(
            squares=shard.squares(),
            is_finite=self._is_finite,
            held=self._forwards,
            boundary_bytes=self._stage.boundary_bytes,
            busy_seconds=time.process_time() - self._began,
            rss_bytes=read_memory(shard.device).rss_bytes,
        )

    def scale(self, context: int, scale: float, learning_rate: float) -> None:
        """Clip, and say how fast to learn; `DistributedOptimizer` steps with what the context holds."""
        shard = self._stage.shard
        if shard.optimizer is None:
            return
        self._take_gradients(context)
        shard.scale_gradients(scale)
        shard.optimizer.set_learning_rate(learning_rate)

    def tied_gradient(self, context: int) -> Tensor:
        """Of our copy of a tied embedding."""
        tied = self._stage.shard.tied
        assert tied is not None
        return get_gradients(context)[tied]

    def sum_tied(self, context: int, other: Any) -> None:
        """Give both copies of a tied embedding the sum of their gradients; nothing where it is not tied."""
        if self._stage.shard.tied is None:
            return
        total = self.tied_gradient(context) + other.rpc_sync().tied_gradient(context)
        self.set_tied(context, total)
        other.rpc_sync().set_tied(context, total)

    def set_tied(self, context: int, total: Tensor) -> None:
        """The gradient that both copies have."""
        self.tied_gradient(context).copy_(total)

    def _take_gradients(self, context: int) -> None:
        """A weight's gradient is put into the context once, when that of every micro-batch is in it."""
        deadline = time.monotonic() + self.gradient_seconds
        weights = self._stage.shard.weights
        while missing := [name for name, weight in weights.items() if weight not in get_gradients(context)]:
            # torch's backward returned before the gradients of another process were there, once in 60 runs under load
            if time.monotonic() >= deadline:
                raise RuntimeError(f"no gradient of {missing[0]} came within {self.gradient_seconds:g} s")
            log.info("%d of %d gradients are still to come", len(missing), len(weights))
            time.sleep(0.001)
        gradients = get_gradients(context)
        for weight in weights.values():
            weight.grad = gradients[weight]


class RpcTraining(RpcChain):
    """A `TrainingTransport`: the trainer's end of a group. A process that is lost cannot be replaced."""

    worker_threads = WORKER_THREADS

    @property
    def seats(self) -> list[Any]:
        """RRefs, first to last."""
        return self._seats

    def send(self, shard: int, message: Message) -> None:
        """See `TrainingTransport.send`; returns when the message is there."""
        if self._lost is not None:
            raise self._lost
        try:
            self._seats[shard].rpc_sync().deliver(message.number, message.head, as_tensor(message.body))
        except RuntimeError as error:
            raise self.lost(error) from None

    def collect(self, wait_seconds: float | None = None) -> Message:
        """See `TrainingTransport.collect`."""
        seconds = self._network.request_timeout_seconds
        try:
            _, answer = INBOX.get(timeout=seconds)
        except queue.Empty:
            raise ShardLost(f"no answer came within {seconds:g} s") from None
        if isinstance(answer, ShardLost):
            raise answer
        if isinstance(answer.head, Fault) and answer.head.code is FaultCode.link:
            raise ShardLost(answer.head.text)
        return answer

    def lost(self, error: RuntimeError) -> ShardLost:
        """What one of torch's errors means for a run."""
        said = " ".join(str(error).split())[:300]  # who, then what was raised there
        self._lost = self._lost or ShardLost(f"a shard is gone ({said})")
        return self._lost

    def _link(self) -> None:
        for before, seat, behind in zip([None, *self._seats[:-1]], self._seats, [*self._seats[1:], None], strict=True):
            seat.rpc_sync().join(before, behind)
