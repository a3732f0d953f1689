"""Gradients across the cut by torch.distributed.autograd, steps by `DistributedOptimizer`: those of `ExplicitBackward`.

The trainer calls every member of the group. Each shard fetches hidden states from the one that made them, and torch
records on both sides what its distributed backward will need. All micro-batches of a step share one context and one
joint backward: a backward for each of them hangs until its time-out. So the forwards are pipelined, and a shard holds
all micro-batches, as under GPipe.
"""

import logging
import threading
import time
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed.rpc as torch_rpc
from torch import Tensor
from torch.distributed.autograd import (  # type: ignore[attr-defined]  # public, but not in __all__
    backward,
    context,
    get_gradients,
)
from torch.distributed.optim import DistributedOptimizer
from torch.distributed.rpc import PyRRef  # type: ignore[attr-defined]  # the same
from typing_extensions import override

from lab.device import read_memory
from lab.learning.examples import Batch
from lab.settings import UserError
from split.training.messages import MAX_JOINT_MICRO_BATCHES, Apply, Recipe, Step
from split.training.optimizer import MasterAdamW, adamw_options
from split.training.settings import Train
from split.training.shard import MicroBatch
from split.training.stage import TrainingStage
from split.training.trainer import Backward, Gradients, Shards, TrainingFault
from split.transport.rpc import RpcChain, RpcShard

log = logging.getLogger(__name__)


class BackwardFigures(NamedTuple):
    """Figures of a shard after a distributed backward."""

    squares: float
    is_finite: bool
    held: int
    boundary_bytes: int
    busy_seconds: float
    """Processor time since the step began."""
    rss_bytes: int


class AutogradRpcShard(RpcShard):
    """A training stage in a group; with backward=autograd its shard is called directly."""

    stage: TrainingStage
    worker_threads = 2 * MAX_JOINT_MICRO_BATCHES
    gradient_seconds = 30.0
    """Time limit for a gradient after the backward."""

    def __init__(self, stage: TrainingStage, name: str, model_layers: int, fingerprints: dict[str, str]) -> None:
        super().__init__(stage, name, model_layers, fingerprints)
        self._computing = threading.Lock()

    def parameters(self) -> list[Any]:
        """RRefs to the trainable weights."""
        return [torch_rpc.RRef(weight) for weight in self.stage.shard.weights.values()]

    def adopt(self, local_optimizer: Any) -> None:
        """Continue the shard's optimizer as the one that `DistributedOptimizer` made."""
        shard, made = self.stage.shard, local_optimizer.local_value().optim
        assert shard.optimizer is not None
        names = list(shard.weights)
        made.load_tensors(names, shard.optimizer.tensors(names))
        shard.optimizer = made

    def begin_step(self) -> None:
        """Forget what is left of the step before."""
        self.stage.shard.forget_gradients()
        self.stage.boundary_bytes = 0
        self._is_finite = True
        self._forwards = 0
        self._began = time.process_time()

    def forward(
        self, step: int, micro_batch: int, states: Any, lengths: Sequence[int], labels_BT: Tensor | None, tokens: int
    ) -> Tensor:
        """Hidden states of a micro-batch, from the last shard its share of the loss; in the caller's context."""
        if isinstance(states, PyRRef):
            states = states.to_here()  # from the shard before, which records that we will send its gradient
        with self._computing:
            output = self.stage.shard.compute(MicroBatch(step, micro_batch, states, lengths, labels_BT, tokens))
            self._forwards += 1
            self._is_finite = self._is_finite and bool(output.isfinite().all())
            if output.dim():
                self.stage.boundary_bytes += (2 if output.requires_grad else 1) * output.nbytes  # and its gradient
        return output

    def gather(self, context: int) -> BackwardFigures:
        """Move the gradients out of the context, so that everything else is as after our own backward."""
        self._take_gradients(context)
        shard = self.stage.shard
        return BackwardFigures(
            squares=shard.squares(),
            is_finite=self._is_finite,
            held=self._forwards,
            boundary_bytes=self.stage.boundary_bytes,
            busy_seconds=time.process_time() - self._began,
            rss_bytes=read_memory(shard.device).rss_bytes,
        )

    def scale(self, context: int, scale: float, learning_rate: float) -> None:
        """Clip, and set the learning rate; `DistributedOptimizer` steps with the gradients in the context."""
        shard = self.stage.shard
        if shard.optimizer is None:
            return
        self._take_gradients(context)
        shard.scale_gradients(scale)
        shard.optimizer.set_learning_rate(learning_rate)

    def tied_gradient(self, context: int) -> Tensor:
        """Gradient of our copy of a tied embedding."""
        tied = self.stage.shard.tied
        assert tied is not None
        return get_gradients(context)[tied]

    def sum_tied(self, context: int, other: Any) -> None:
        """Give both copies of a tied embedding the sum of their gradients; does nothing if it is not tied."""
        if self.stage.shard.tied is None:
            return
        total = self.tied_gradient(context) + other.rpc_sync().tied_gradient(context)
        self.set_tied(context, total)
        other.rpc_sync().set_tied(context, total)

    def set_tied(self, context: int, total: Tensor) -> None:
        """Set the gradient that both copies have."""
        self.tied_gradient(context).copy_(total)

    def _take_gradients(self, context: int) -> None:
        """Put the gradient of each weight into the context, once it includes all micro-batches."""
        deadline = time.monotonic() + self.gradient_seconds
        weights = self.stage.shard.weights
        while missing := [name for name, weight in weights.items() if weight not in get_gradients(context)]:
            # under load, once in 60 runs, torch's backward returned before the gradients of another process had arrived
            if time.monotonic() >= deadline:
                raise RuntimeError(f"no gradient of {missing[0]} came within {self.gradient_seconds:g} s")
            log.info("%d of %d gradients are still to come", len(missing), len(weights))
            time.sleep(0.001)
        gradients = get_gradients(context)
        for weight in weights.values():
            weight.grad = gradients[weight]


class AutogradBackward(Backward):
    """A `Backward` over the members of a group: the shards, reached over `rpc`."""

    def __init__(self, shards: Shards, recipe: Recipe) -> None:
        assert isinstance(shards.transport, RpcChain)
        self._transport = shards.transport
        self._recipe = recipe
        self._sums_tied = recipe.train is Train.everything and shards.count > 1
        self._optimizer: Any = None
        self._context: Any = None
        self._context_id = 0

    @override
    def begin(self) -> None:
        # an optimizer at every shard that has trainable weights
        weights = [weight for member in self._transport.members for weight in member.rpc_sync().parameters()]
        logging.getLogger("torch.distributed.optim").setLevel(logging.ERROR)  # it warns of plain Python, which we want
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates the TorchScript that it uses here
            self._optimizer = DistributedOptimizer(MasterAdamW, weights, **adamw_options(self._recipe))
        made = {optimizer.owner().name: optimizer for optimizer in self._optimizer.remote_optimizers}
        for member in self._transport.members:
            if member.owner().name in made:
                member.rpc_sync().adopt(made[member.owner().name])

    @override
    def gradients(self, step: int, micro_batches: Sequence[Batch], plan: Step) -> Gradients:
        if len(micro_batches) > MAX_JOINT_MICRO_BATCHES:
            raise UserError(
                f"project.micro_batches x optimization.accumulation must be at most {MAX_JOINT_MICRO_BATCHES} for "
                f"backward=autograd, got {len(micro_batches)}"
            )
        self._leave_context()
        try:
            return self._gradients(step, micro_batches, plan)
        except RuntimeError as error:  # all of torch's RPC errors are
            if isinstance(error, TrainingFault):
                raise
            raise self._transport.lost(error) from None

    @override
    def apply(self, step: int, apply: Apply) -> None:
        try:
            for member in self._transport.members:
                member.rpc_sync().scale(self._context_id, apply.scale, apply.learning_rate)
            self._optimizer.step(self._context_id)
            self._leave_context()
        except RuntimeError as error:
            raise self._transport.lost(error) from None

    def _gradients(self, step: int, micro_batches: Sequence[Batch], plan: Step) -> Gradients:
        members = self._transport.members
        for member in members:
            member.rpc_sync().begin_step()
        begin = time.perf_counter()
        self._context = context()
        self._context_id = self._context.__enter__()
        shares = [self._forward(step, number, batch, plan.tokens) for number, batch in enumerate(micro_batches)]
        losses = [share.wait() for share in shares]
        backward(self._context_id, losses)
        if self._sums_tied:
            members[0].rpc_sync().sum_tied(self._context_id, members[-1])
        gathered = [member.rpc_sync().gather(self._context_id) for member in members]
        seconds = time.perf_counter() - begin
        return Gradients(
            loss=sum(float(loss.detach()) for loss in losses),
            squares=[one.squares for one in gathered],
            is_finite=[one.is_finite for one in gathered],
            bubble_fraction=max(0.0, 1 - sum(one.busy_seconds for one in gathered) / (len(members) * seconds)),
            timeline=None,
            held=[one.held for one in gathered],
            boundary_bytes=sum(one.boundary_bytes for one in gathered),
            rss_bytes=[one.rss_bytes for one in gathered],
        )

    def _forward(self, step: int, number: int, batch: Batch, tokens: int) -> Any:
        """The future of a micro-batch's share of the loss; hidden states travel from shard to shard."""
        lengths = batch.attention_BT.sum(1).tolist()
        states: Any = batch.ids_BT
        *others, last = self._transport.members
        for member in others:
            states = member.remote().forward(step, number, states, lengths, None, tokens)
        return last.rpc_async().forward(step, number, states, lengths, batch.labels_BT, tokens)

    def _leave_context(self) -> None:
        if self._context is not None:
            self._context.__exit__(None, None, None)
            self._context = None
