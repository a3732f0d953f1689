"""`DistributedTrainer`: optimizer steps over a model that is split into shards.

The trainer sends ids to the first shard and labels to the last one; the shards do the rest among themselves. It gets
the loss and one scalar from each shard, from which it computes the global gradient norm. A `Backward` computes the
gradients: `ExplicitBackward` in this module, over any transport, or `AutogradBackward` over torch's RPC.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from typing_extensions import override

from lab import faults
from lab.learning.examples import Batch
from lab.learning.training import learning_rate_at
from lab.settings import OptimizationSettings, UserError
from lab.wire.frames import Head
from split.chain.messages import Fault, FaultCode
from split.training.checkpoint import Manifest, forget_steps_before, step_folder, write_manifest
from split.training.messages import Apply, Done, Figures, Save, Saved, Start, Started, Step, Tokens, unpack_spans
from split.training.schedule import Schedule, Timeline
from split.transport.base import ChainLost, Message, ShardLost, ShardReport, Transport

log = logging.getLogger(__name__)

MOST_LOSSES_A_STEP = 5
Answer = TypeVar("Answer", bound=Head)


class TrainingFault(faults.Fault):
    """A shard could not process a message."""


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Figures of a step's forwards and backwards; the gradients themselves stay at the shards."""

    loss: float
    """Mean cross-entropy per counted token, in nats, before the step."""
    squares: list[float]
    """Sum of the squares of each shard's gradients."""
    is_finite: list[bool]
    """Whether each shard's hidden states, or its loss, were finite."""
    bubble_fraction: float
    """Share of the shards' time, from the first operation to the last one, during which they wait."""
    timeline: Timeline | None
    """Operations of each shard, by the trainer's clock; None where torch's engine orders them."""
    held: list[int]
    """Most micro-batches that each shard held at once."""
    boundary_bytes: int
    """Bytes that shards sent to their neighbours."""
    rss_bytes: list[int]
    """Memory of each shard's process."""


@dataclass(frozen=True, kw_only=True)
class StepFigures(Gradients):
    """Figures of one optimizer step."""

    step: int
    """Number of the step, from 0."""
    tokens: int
    """Tokens that the loss counted."""
    learning_rate: float
    gradient_norm: float
    """Norm over all shards, before clipping."""
    seconds: float


class Backward(Protocol):
    """A way to compute gradients and to apply them."""

    def begin(self) -> None:
        """Get ready after the shards have been started, or started again."""

    def gradients(self, step: int, micro_batches: Sequence[Batch], plan: Step) -> Gradients:
        """Do all forwards and backwards of a step."""

    def apply(self, step: int, apply: Apply) -> None:
        """Take the optimizer's step at every shard."""


class Shards:
    """The shards of a transport: messages to all of them, and their answers, by place."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.count = len(transport.layers)
        self.clock_offsets = [0.0] * self.count
        """Difference between our clock and each shard's, to add to its times."""

    def send(self, shard: int, step: int, head: Head, body: bytes | memoryview = b"") -> None:
        """Send a message to one shard."""
        self.transport.send(shard, Message(step, head, body))

    def send_to_all(self, step: int, head: Head) -> None:
        """Send a message to every shard."""
        for shard in range(self.count):
            self.send(shard, step, head)

    def collect(self, kind: type[Answer]) -> list[tuple[Answer, bytes | memoryview]]:
        """One answer of every shard, by place. Raises `ShardLost`, `TrainingFault`, or UserError for a refusal."""
        found: dict[int, tuple[Answer, bytes | memoryview]] = {}
        while len(found) < self.count:
            answer = self.transport.collect()
            if isinstance(answer.head, Fault):
                raise _fault_of(answer.head)
            if not isinstance(answer.head, kind):
                raise TrainingFault(
                    f"{kind.__name__.upper()} was due, a shard sent {type(answer.head).__name__.upper()}"
                )
            found[answer.head.shard] = (answer.head, answer.body)  # type: ignore[attr-defined]  # all answers have it
        return [found[shard] for shard in range(self.count)]

    def figures(self) -> list[Figures]:
        """Current figures of every shard; also sets `clock_offsets`."""
        reports: Sequence[ShardReport[Any]] = self.transport.reports()
        self.clock_offsets = [report.clock_offset_seconds for report in reports]
        return [report.figures for report in reports]


class ExplicitBackward(Backward):
    """Backward across the boundary: each shard keeps input and output of a micro-batch, gets dL/dy, sends dL/dx."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards

    @override
    def begin(self) -> None:
        pass

    @override
    def gradients(self, step: int, micro_batches: Sequence[Batch], plan: Step) -> Gradients:
        shards = self._shards
        shards.send_to_all(step, plan)
        for number, batch in enumerate(micro_batches):
            head = Tokens(micro_batch=number, lengths=batch.attention_BT.sum(1).tolist(), columns=batch.ids_BT.shape[1])
            parts = [_int32(batch.ids_BT), _int32(batch.labels_BT)]
            if shards.count == 1:
                shards.send(0, step, head, b"".join(parts))
            else:
                shards.send(0, step, head, parts[0])
                shards.send(shards.count - 1, step, head, parts[1])
        done = shards.collect(Done)
        timeline = Timeline(
            [
                [span.shifted(offset) for span in unpack_spans(body)]
                for (_, body), offset in zip(done, shards.clock_offsets, strict=True)
            ]
        )
        heads = [head for head, _ in done]
        return Gradients(
            loss=heads[-1].loss,
            squares=[head.squares for head in heads],
            is_finite=[head.is_finite for head in heads],
            bubble_fraction=timeline.bubble_fraction,
            timeline=timeline,
            held=[head.held for head in heads],
            boundary_bytes=sum(head.boundary_bytes for head in heads),
            rss_bytes=[head.rss_bytes for head in heads],
        )

    @override
    def apply(self, step: int, apply: Apply) -> None:
        self._shards.send_to_all(step, apply)


class DistributedTrainer:
    """Takes optimizer steps, saves them, and continues from the last valid one when a shard is lost.

    Args:
        shards: The shards, not started yet.
        backward: Computes the gradients.
        batches: Makes batches from the first step on, the same at each call.
        optimization: Learning rate, clipping, accumulation.
        schedule: Order of the micro-batches at each shard.
        manifest: The last valid step, with recipe, total steps and micro-batches.
        checkpoints: Folder of the manifests.
        recovery_seconds: How long to try to bring back a lost shard.
    """

    def __init__(
        self,
        shards: Shards,
        backward: Backward,
        *,
        batches: Callable[[], Iterator[Batch]],
        optimization: OptimizationSettings,
        schedule: Schedule,
        manifest: Manifest,
        checkpoints: Path,
        recovery_seconds: float,
    ) -> None:
        self.shards = shards
        self._backward, self._all_batches = backward, batches
        self._optimization, self._schedule = optimization, schedule
        self._checkpoints, self._recovery_seconds = checkpoints, recovery_seconds
        self.manifest = manifest
        """The last valid step; at step 0 it is not on disk."""
        self.losses: list[float] = []
        """Loss of every step so far."""
        self.recoveries = 0
        self._lost_since_step = 0
        self.weights_delta_norms: list[float] = []
        """Change of each shard's weights since the beginning, at the last checkpoint."""
        self._with_recovery(self._begin, again=False)

    @property
    def step(self) -> int:
        """Number of steps taken."""
        return len(self.losses)

    @property
    def saved(self) -> Path | None:
        """The folder of the last checkpoint; None before there is one."""
        manifest = self.manifest
        return step_folder(self._checkpoints, manifest.run, manifest.step) if manifest.step else None

    def train_step(self) -> StepFigures:
        """Take the next optimizer step; after the loss of a shard, the one after the last valid step.

        Raises:
            ShardLost: a shard was lost and did not come back in time.
            TrainingFault: a shard failed.
            UserError: loss or gradient is not finite, or a replacement lacks its part of the checkpoint.
        """
        figures: StepFigures = self._with_recovery(self._train_step)
        return figures

    def save(self) -> Path | None:
        """Make the last step a checkpoint; return its folder, None if a shard was lost meanwhile."""
        saved: Path | None = self._with_recovery(self._save, again=False)
        return saved

    # A step

    def _train_step(self) -> StepFigures:
        step, optimization = self.step, self._optimization
        begin = time.perf_counter()
        batches = list(islice(self._batches, optimization.accumulation))
        micro_batches = [part for batch in batches for part in split_batch(batch, self.manifest.micro_batches)]
        tokens = sum(batch.targets for batch in micro_batches)
        plan = Step(
            schedule=self._schedule,
            micro_batches=self.manifest.micro_batches,
            turns=optimization.accumulation,
            tokens=tokens,
        )
        found = self._backward.gradients(step, micro_batches, plan)
        norm = math.sqrt(sum(found.squares)) if all(map(math.isfinite, found.squares)) else math.nan
        self._check_finite(step, found, norm)
        learning_rate = learning_rate_at(step, self.manifest.total_steps, optimization)
        self._backward.apply(step, Apply(scale=clip_scale(norm, optimization), learning_rate=learning_rate))
        self.losses.append(found.loss)
        self._lost_since_step = 0
        return StepFigures(
            **vars(found),
            step=step,
            tokens=tokens,
            learning_rate=learning_rate,
            gradient_norm=norm,
            seconds=time.perf_counter() - begin,
        )

    def _check_finite(self, step: int, found: Gradients, norm: float) -> None:
        if math.isfinite(found.loss) and math.isfinite(norm):
            return
        if False in found.is_finite:
            shard = found.is_finite.index(False)
        else:  # in a backward
            shard = max(place for place, squares in enumerate(found.squares) if not math.isfinite(squares))
        layers = self.shards.transport.layers[shard]
        valid = self.manifest.step
        kept = f"step {valid} is kept in {self._checkpoints / self.manifest.run}" if valid else "no step was saved yet"
        raise UserError(
            f"loss and gradients must be finite, got loss {found.loss:g} and gradient norm {norm:g} at step {step}, "
            f"first at shard {shard + 1} (layers {layers.start}:{layers.stop}); {kept}"
        )

    # Checkpoints and recovery

    def _save(self) -> Path:
        before = self.manifest.step
        self.shards.send_to_all(self.step, Save(keep_from=before))
        saved = [head for head, _ in self.shards.collect(Saved)]
        self.weights_delta_norms = [head.weights_delta_norm for head in saved]
        self.manifest.step = self.step
        self.manifest.digests = [head.digest for head in saved]
        self.manifest.loss_by_step = list(self.losses)
        folder = write_manifest(self._checkpoints, self.manifest)
        forget_steps_before(self._checkpoints, self.manifest.run, before)
        return folder

    def _begin(self) -> None:
        """Set every shard to the last valid step."""
        manifest = self.manifest
        self.losses = list(manifest.loss_by_step)
        self._batches = islice(self._all_batches(), manifest.step * self._optimization.accumulation, None)
        for shard in range(self.shards.count):
            digest = manifest.digests[shard] if manifest.step else ""
            start = Start(
                shard=shard, shards=self.shards.count, run=manifest.run, digest=digest, recipe=manifest.recipe
            )
            self.shards.send(shard, manifest.step, start)
        started = [head for head, _ in self.shards.collect(Started)]
        if not sum(head.trainable for head in started):
            raise UserError("project.train must leave something to train, got 0 trainable parameters")
        self.trainable = [head.trainable for head in started]
        self.shards.figures()  # compares the clocks
        self._backward.begin()

    def _with_recovery(self, call: Callable[[], Any], again: bool = True) -> Any:
        """The result of `call`, repeated after each loss of a shard that is repaired within `recovery_seconds`."""
        while True:
            try:
                return call()
            except ShardLost as lost:
                self._recover(lost)
            if not again:
                return None

    def _recover(self, lost: ShardLost) -> None:
        deadline = time.monotonic() + self._recovery_seconds
        self._lost_since_step += 1
        if self._lost_since_step > MOST_LOSSES_A_STEP:  # a shard that is lost again and again will not recover
            raise lost
        while True:
            if isinstance(lost, ChainLost) or time.monotonic() >= deadline:
                raise lost
            log.warning("%s; bringing the shards back to step %d", lost, self.manifest.step)
            try:
                self.shards.transport.restore(deadline)
                self._begin()
                self.recoveries += 1
                return
            except ShardLost as again:
                lost = again


def clip_scale(norm: float, optimization: OptimizationSettings) -> float:
    """Factor of every gradient, as in `torch.nn.utils.clip_grad_norm_`; 1 without clipping."""
    if not optimization.max_gradient_norm:
        return 1.0
    return min(1.0, optimization.max_gradient_norm / (norm + 1e-6))


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """A batch as `parts` micro-batches of equally many examples, each padded to its own longest example."""
    rows = len(batch.ids_BT) // parts
    assert rows * parts == len(batch.ids_BT), f"{len(batch.ids_BT)} examples in {parts} micro-batches"
    return [_rows(batch, slice(first, first + rows)) for first in range(0, len(batch.ids_BT), rows)]


def _rows(batch: Batch, rows: slice) -> Batch:
    attention_BT = batch.attention_BT[rows]
    columns = int(attention_BT.sum(1).max())
    labels_BT = batch.labels_BT[rows, :columns]
    return Batch(batch.ids_BT[rows, :columns], attention_BT[:, :columns], labels_BT, int((labels_BT[:, 1:] >= 0).sum()))


def _int32(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().astype(np.dtype("<i4")).tobytes()


def _fault_of(fault: Fault) -> Exception:
    match fault.code:
        case FaultCode.link:
            return ShardLost(fault.text)
        case FaultCode.refused:
            return UserError(fault.text)
        case _:
            return TrainingFault(f"{fault.code.name}: {fault.text}")
