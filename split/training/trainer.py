"""`DistributedTrainer`: optimizer steps over a model that is cut into shards.

The trainer gives ids to the first shard and labels to the last one, the shards do the rest between themselves; what
comes back is the loss and one scalar a shard, from which the global gradient norm is made. How gradients come about is
a `Backward`: `Explicit` here, over any transport; `split.training.autograd.Autograd` over torch's.
"""

from __future__ import annotations

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

from lab import faults
from lab.learning import training
from lab.learning.examples import Batch as Examples
from lab.learning.training import learning_rate_at
from lab.settings import OptimizationSettings, UserError
from lab.wire import Head
from split.chain.messages import Fault, FaultCode
from split.training.checkpoint import Manifest, forget_steps_before, step_folder, write_manifest
from split.training.messages import Apply, Batch, Done, Figures, Save, Saved, Start, Started, Step, unpack_spans
from split.training.schedule import Schedule, Timeline
from split.transport.base import ChainLost, Message, ShardLost, ShardReport, Transport

log = logging.getLogger(__name__)

MOST_LOSSES_A_STEP = 5
Answer = TypeVar("Answer", bound=Head)


class TrainingFault(faults.Fault):
    """A shard could not do what it was asked."""


@dataclass(frozen=True, kw_only=True)
class StepFigures(training.StepFigures):
    """One optimizer step over all shards."""

    seconds: float
    bubble_fraction: float
    """The share of the shards' time, from the first operation to the last one, in which they wait."""
    timeline: Timeline | None
    """When each shard did what, by the trainer's clock; None where torch's engine decides that."""
    held: list[int]
    """The most micro-batches that each shard held at once."""
    boundary_bytes: int
    """That shards sent to their neighbours."""
    rss_bytes: list[int]
    """Of each shard."""


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """What came of a step's forwards and backwards; the gradients themselves stay where they are."""

    loss: float
    squares: list[float]
    """Sum of the squares of each shard's gradients."""
    is_finite: list[bool]
    """Whether each shard's hidden states were, or its loss."""
    bubble_fraction: float
    timeline: Timeline | None
    held: list[int]
    boundary_bytes: int
    rss_bytes: list[int]


class Backward(Protocol):
    """How gradients come about, and how they are applied."""

    def begin(self) -> None:
        """The shards have been started (again)."""
        ...

    def gradients(self, step: int, micro_batches: Sequence[Examples], plan: Step) -> Gradients:
        """All forwards and backwards of a step."""
        ...

    def apply(self, step: int, apply: Apply) -> None:
        """The optimizer's step at every shard."""
        ...


class Shards:
    """Orders that all shards get alike, and their answers, by place."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.count = len(transport.layers)
        self.clock_offsets = [0.0] * self.count
        """What to add to each shard's clock to have ours."""

    def send(self, shard: int, step: int, head: Head, body: bytes | memoryview = b"") -> None:
        """A message to one shard."""
        self.transport.send(shard, Message(step, head, body))

    def tell(self, step: int, head: Head) -> None:
        """The same to every shard."""
        for shard in range(self.count):
            self.send(shard, step, head)

    def collect(self, kind: type[Answer]) -> list[tuple[Answer, bytes | memoryview]]:
        """One answer of every shard, by place. Raises `ShardLost`, `TrainingFault`, UserError for what is refused."""
        found: dict[int, tuple[Answer, bytes | memoryview]] = {}
        while len(found) < self.count:
            answer = self.transport.collect()
            if isinstance(answer.head, Fault):
                raise _raised(answer.head)
            if not isinstance(answer.head, kind):
                raise TrainingFault(
                    f"{kind.__name__.upper()} was due, a shard sent {type(answer.head).__name__.upper()}"
                )
            found[answer.head.shard] = (answer.head, answer.body)  # type: ignore[attr-defined]  # all answers have it
        return [found[shard] for shard in range(self.count)]

    def figures(self) -> list[Figures]:
        """Sizes of every shard, now; the clocks are compared on the way."""
        reports: Sequence[ShardReport[Any]] = self.transport.reports()
        self.clock_offsets = [report.clock_offset_seconds for report in reports]
        return [report.figures for report in reports]


class Explicit:
    """Boundary backward: each shard keeps input and output of a micro-batch, gets dL/dy, sends dL/dx."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards

    def begin(self) -> None:
        """See `Backward.begin`."""

    def gradients(self, step: int, micro_batches: Sequence[Examples], plan: Step) -> Gradients:
        """See `Backward.gradients`."""
        shards = self._shards
        shards.tell(step, plan)
        for number, batch in enumerate(micro_batches):
            head = Batch(
                micro_batch=number,
                lengths=batch.attention_BT.sum(1).tolist(),
                columns=batch.ids_BT.shape[1],
            )
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

    def apply(self, step: int, apply: Apply) -> None:
        """See `Backward.apply`."""
        self._shards.tell(step, apply)


class DistributedTrainer:
    """Takes optimizer steps, saves them, and goes on from the last one that is valid when a shard is lost.

    Args:
        shards: In their places, not started yet.
        backward: How gradients come about.
        batches: Batches from the first step on, the same whenever it is called.
        optimization: Schedule, clipping, accumulation.
        schedule: Which shard does which micro-batch when.
        manifest: The last valid step, and what a checkpoint says besides: recipe, total steps, micro-batches.
        checkpoints: Where manifests are.
        recovery_seconds: How long to try to bring back a lost shard.
    """

    def __init__(
        self,
        shards: Shards,
        backward: Backward,
        *,
        batches: Callable[[], Iterator[Examples]],
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
        """Of the last valid step; at step 0 there is nothing on disk for it."""
        self.recoveries = 0
        self._lost_since_step = 0
        self.weights_delta_norms: list[float] = []
        """Of each shard, at the last checkpoint."""
        self._surely(self._begin, again=False)

    @property
    def losses(self) -> list[float]:
        """Of every step so far."""
        return self._losses

    @property
    def step(self) -> int:
        """Steps taken."""
        return len(self._losses)

    @property
    def saved(self) -> Path | None:
        """The folder of the last checkpoint; None before there is one."""
        manifest = self.manifest
        return step_folder(self._checkpoints, manifest.run, manifest.step) if manifest.step else None

    def train_step(self) -> StepFigures:
        """Take the next optimizer step. After a loss it is the one after the last valid step.

        Raises:
            ShardLost: a shard was lost and did not come back in time.
            TrainingFault: a shard failed.
            UserError: loss or gradient is not finite; a replacement that has not its part of the checkpoint.
        """
        figures: StepFigures = self._surely(self._train_step)
        return figures

    def save(self) -> Path | None:
        """Make the step that was taken last a checkpoint; return its folder, None when a shard was lost meanwhile."""
        saved: Path | None = self._surely(self._save, again=False)
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
        self._losses.append(found.loss)
        self._lost_since_step = 0
        return StepFigures(
            step=step,
            loss=found.loss,
            tokens=tokens,
            learning_rate=learning_rate,
            gradient_norm=norm,
            seconds=time.perf_counter() - begin,
            bubble_fraction=found.bubble_fraction,
            timeline=found.timeline,
            held=found.held,
            boundary_bytes=found.boundary_bytes,
            rss_bytes=found.rss_bytes,
        )

    def _check_finite(self, step: int, found: Gradients, norm: float) -> None:
        if math.isfinite(found.loss) and math.isfinite(norm):
            return
        if False in found.is_finite:
            shard = found.is_finite.index(False)
        else:  # on the way back
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
        self.shards.tell(self.step, Save(keep_from=before))
        saved = [head for head, _ in self.shards.collect(Saved)]
        self.weights_delta_norms = [head.weights_delta_norm for head in saved]
        self.manifest.step = self.step
        self.manifest.digests = [head.digest for head in saved]
        self.manifest.loss_by_step = list(self._losses)
        folder = write_manifest(self._checkpoints, self.manifest)
        forget_steps_before(self._checkpoints, self.manifest.run, before)
        return folder

    def _begin(self) -> None:
        """Have every shard where the last valid step left it."""
        manifest = self.manifest
        self._losses = list(manifest.loss_by_step)
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

    def _surely(self, call: Callable[[], Any], again: bool = True) -> Any:
        """What `call` returns, however often shards are lost meanwhile, within `recovery_seconds` of each loss."""
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
        if self._lost_since_step > MOST_LOSSES_A_STEP:  # what comes back well and is lost again at once will always be
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
    """What every gradient is multiplied with, as `torch.nn.utils.clip_grad_norm_` has it; 1 without clipping."""
    if not optimization.max_gradient_norm:
        return 1.0
    return min(1.0, optimization.max_gradient_norm / (norm + 1e-6))


def split_batch(batch: Examples, parts: int) -> list[Examples]:
    """A batch as micro-batches of equally many examples. All keep the padding of the whole, as far as they need it."""
    rows = len(batch.ids_BT) // parts
    assert rows * parts == len(batch.ids_BT), f"{len(batch.ids_BT)} examples in {parts} micro-batches"
    return [_rows(batch, slice(first, first + rows)) for first in range(0, len(batch.ids_BT), rows)]


def _rows(batch: Examples, rows: slice) -> Examples:
    attention_BT = batch.attention_BT[rows]
    columns = int(attention_BT.sum(1).max())
    labels_BT = batch.labels_BT[rows, :columns]
    return Examples(
        batch.ids_BT[rows, :columns], attention_BT[:, :columns], labels_BT, int((labels_BT[:, 1:] >= 0).sum())
    )


def _int32(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().astype(np.dtype("<i4")).tobytes()


def _raised(fault: Fault) -> Exception:
    match fault.code:
        case FaultCode.link:
            return ShardLost(fault.text)
        case FaultCode.refused:
            return UserError(fault.text)
        case _:
            return TrainingFault(f"{fault.code.name}: {fault.text}")
