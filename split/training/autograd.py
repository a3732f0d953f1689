"""Gradients over the cut by torch.distributed.autograd, steps by `DistributedOptimizer`; the numbers of `Explicit`.

All micro-batches of a step live in one context and go back in one joint backward: a backward for each of them hangs
until its time-out. So the forwards are pipelined, and a shard holds all micro-batches, as under GPipe.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Sequence
from typing import Any

from torch.distributed.autograd import backward, context  # type: ignore[attr-defined]  # public, but not in __all__
from torch.distributed.optim import DistributedOptimizer

from lab.learning.examples import Batch
from lab.settings import UserError
from split.training.messages import Apply, Recipe, Step
from split.training.optimizer import MasterAdamW
from split.training.settings import Train
from split.training.trainer import Gradients, Shards, TrainingFault
from split.transport.training_rpc import WORKER_THREADS, RpcTraining

MOST_MICRO_BATCHES = WORKER_THREADS // 2
"""Each may keep a thread of a shard's agent waiting; some must be left to bring it what it waits for."""


class Autograd:
    """A `Backward` over the seats of a group.

    Args:
        shards: Over `rpc`.
        recipe: What is trained, and how.
    """

    def __init__(self, shards: Shards, recipe: Recipe) -> None:
        assert isinstance(shards.transport, RpcTraining)
        self._transport = shards.transport
        self._recipe = recipe
        self._sums_tied = recipe.train is Train.everything and shards.count > 1
        self._optimizer: Any = None
        self._context: Any = None
        self._context_id = 0

    def begin(self) -> None:
        """See `Backward.begin`: an optimizer at every shard that has something to learn."""
        recipe = self._recipe
        weights = [weight for seat in self._transport.seats for weight in seat.rpc_sync().parameters()]
        logging.getLogger("torch.distributed.optim").setLevel(logging.ERROR)  # that it is plain Python is what we want
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates the TorchScript that it uses here
            self._optimizer = DistributedOptimizer(
                MasterAdamW, weights, lr=0.0, betas=(recipe.beta1, recipe.beta2), weight_decay=recipe.weight_decay
            )
        made = {optimizer.owner().name: optimizer for optimizer in self._optimizer.remote_optimizers}
        for seat in self._transport.seats:
            if seat.owner().name in made:
                seat.rpc_sync().adopt(made[seat.owner().name])

    def gradients(self, step: int, micro_batches: Sequence[Batch], plan: Step) -> Gradients:
        """See `Backward.gradients`."""
        if len(micro_batches) > MOST_MICRO_BATCHES:
            raise UserError(
                f"project.micro_batches x optimization.accumulation must be at most {MOST_MICRO_BATCHES} for "
                f"backward=autograd, got {len(micro_batches)}"
            )
        self._leave_context()
        try:
            return self._gradients(step, micro_batches, plan)
        except RuntimeError as error:  # all of torch's RPC errors are
            if isinstance(error, TrainingFault):
                raise
            raise self._transport.lost(error) from None

    def apply(self, step: int, apply: Apply) -> None:
        """See `Backward.apply`."""
        try:
            for seat in self._transport.seats:
                seat.rpc_sync().scale(self._context_id, apply.scale, apply.learning_rate)
            self._optimizer.step(self._context_id)
            self._leave_context()
        except RuntimeError as error:
            raise self._transport.lost(error) from None

    def _gradients(self, step: int, micro_batches: Sequence[Batch], plan: Step) -> Gradients:
        seats = self._transport.seats
        for seat in seats:
            seat.rpc_sync().begin_step()
        begin = time.perf_counter()
        self._context = context()
        self._context_id = self._context.__enter__()
        shares = [self._forward(step, number, batch, plan.tokens) for number, batch in enumerate(micro_batches)]
        losses = [share.wait() for share in shares]
        backward(self._context_id, losses)
        if self._sums_tied:
            seats[0].rpc_sync().sum_tied(self._context_id, seats[-1])
        gathered = [seat.rpc_sync().gather(self._context_id) for seat in seats]
        seconds = time.perf_counter() - begin
        return Gradients(
            loss=sum(float(loss.detach()) for loss in losses),
            squares=[one.squares for one in gathered],
            is_finite=[one.is_finite for one in gathered],
            bubble_fraction=max(0.0, 1 - sum(one.busy_seconds for one in gathered) / (len(seats) * seconds)),
            timeline=None,
            held=[one.held for one in gathered],
            boundary_bytes=sum(one.boundary_bytes for one in gathered),
            rss_bytes=[one.rss_bytes for one in gathered],
        )

    def _forward(self, step: int, number: int, batch: Batch, tokens: int) -> Any:
        """The future of a micro-batch's share of the loss; its way there goes from shard to shard."""
        lengths = batch.attention_BT.sum(1).tolist()
        states: Any = batch.ids_BT
        *others, last = self._transport.seats
        for seat in others:
            states = seat.remote().forward(step, number, states, lengths, None, tokens)
        return last.rpc_async().forward(step, number, states, lengths, batch.labels_BT, tokens)

    def _leave_context(self) -> None:
        if self._context is not None:
            self._context.__exit__(None, None, None)
            self._context = None
