"""A training shard in its chain: takes messages, yields messages; the transports only deliver them.

It takes messages in any order, and does its operations in the order of the schedule, each as soon as its input has
arrived. Knows nothing about networks.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lab.device import read_memory, synchronize
from lab.wire.faults import Peer, WireError
from lab.wire.frames import Head
from lab.wire.tensors import TensorSpec, read_tensor, tensor_bytes, tensor_spec
from split.chain.messages import Fault, FaultCode, process_figures
from split.training.checkpoint import Part, Parts, part_of
from split.training.messages import (
    Apply,
    Done,
    Figures,
    Gradient,
    Hidden,
    Save,
    Saved,
    Start,
    Started,
    Step,
    Tied,
    Tokens,
    pack_spans,
)
from split.training.schedule import Operation, Phase, Span, most_held, operations
from split.training.settings import MAX_MICRO_BATCHES
from split.training.shard import MicroBatch, TrainingShard
from split.transport.base import Message, Sent, Stage, To

log = logging.getLogger(__name__)

MOST_WAITING = 4 * MAX_MICRO_BATCHES
TIED_BYTES = 2**22
"""Most bytes of one message with a piece of a tied embedding's gradient."""


InitialWeight = Callable[[str], Tensor]


class TrainingStage(Stage):
    """One shard of a run.

    Args:
        layers: Layers that it holds.
        load: The shard as it is before the first step, and how to read its weights as they were then.
        checkpoints: Where parts of checkpoints are on this machine.
    """

    context, sessions, coding_seconds = 0, 1, 0.0

    def __init__(
        self, layers: range, load: Callable[[Start], tuple[TrainingShard, InitialWeight]], checkpoints: Path
    ) -> None:
        self.layers = layers
        self._load, self._checkpoints = load, checkpoints
        self.shard: TrainingShard
        self._initial: InitialWeight
        self.boundary_bytes = 0
        """Operations of this step."""
        self._start: Start | None = None
        self._waiting: dict[tuple[int, type[Head], int], Message] = {}
        """Messages not used yet, by step, kind and micro-batch."""
        self._step: Step | None = None
        self._number = 0
        self._order: deque[Operation] = deque()
        self._spans: list[Span] = []
        self._most_held = self._bound = 0
        self._is_finite = True
        self._tied_rows = 0
        """Rows of the other copy's gradient that arrived in this step."""

    @override
    def forget(self, client: Hashable = 0) -> None:
        self._waiting.clear()
        self._order.clear()
        self._step = None
        if self._start is not None:
            self.shard.forget_gradients()

    @override
    def take(self, message: Message, client: Hashable = 0) -> Iterator[Sent]:
        try:
            yield from self._take(message)
        except (ValueError, WireError) as refused:
            yield To.client, _fault(message, FaultCode.refused, str(refused))
        except Exception as error:  # of torch or a device, too: tell the trainer
            log.exception("step %d failed", message.number)
            yield To.client, _fault(message, FaultCode.failed, f"{type(error).__name__}: {error}")

    def _take(self, message: Message) -> Iterator[Sent]:
        head = message.head
        if isinstance(head, Start):
            yield self._begin(message.number, head)
        elif self._start is None:
            raise ValueError(f"START must come first, got {type(head).__name__.upper()}")
        elif isinstance(head, Step):
            self._plan(message.number, head)
            yield from self._advance()
        elif isinstance(head, (Tokens, Hidden, Gradient)):
            if len(self._waiting) >= MOST_WAITING:
                raise ValueError(f"messages of steps to come must be at most {MOST_WAITING}, got more")
            self._waiting[message.number, type(head), head.micro_batch] = message
            yield from self._advance()
        elif isinstance(head, Tied):
            yield from self._take_tied(message, head)
        elif isinstance(head, Apply):
            self.shard.apply(head.scale, head.learning_rate)
        elif isinstance(head, Save):
            yield To.client, self._save(message.number, head)
        else:
            raise ValueError(
                f"a shard must get messages of a trainer or a neighbour, got {type(head).__name__.upper()}"
            )

    # A run

    def _begin(self, step: int, start: Start) -> Sent:
        self.forget()
        if self._start is not None:  # free the old shard first: there is memory for one
            self._start = None
            del self.shard, self._initial
        self.shard, self._initial = self._load(start)
        self._start = start
        self._parts = Parts(self._checkpoints, start.run, start.shard)
        if step:
            weights, optimizer = self._parts.read(self._part(step), start.digest)
            with torch.no_grad():
                for name, weight in self.shard.weights.items():
                    weight.copy_(weights[name])
            if self.shard.optimizer is not None:
                self.shard.optimizer.load_tensors(list(self.shard.weights), optimizer)
        trainable = sum(weight.numel() for weight in self.shard.weights.values())
        return To.client, Message(step, Started(shard=start.shard, trainable=trainable))

    def _part(self, step: int) -> Part:
        start = self._start
        assert start is not None
        return part_of(step, start.shard, start.shards, self.shard.layers, start.recipe)

    def _save(self, step: int, save: Save) -> Message:
        assert self._start is not None
        shard = self.shard
        optimizer = shard.optimizer.tensors(list(shard.weights)) if shard.optimizer else {}
        self._parts.forget_before(save.keep_from)
        digest = self._parts.write(self._part(step), dict(shard.weights), optimizer)
        weights = shard.weights.items()
        delta = sum(_squared_distance(weight.detach(), self._initial(name)) for name, weight in weights)
        head = Saved(
            shard=self._start.shard,
            digest=digest,
            folder=str(self._parts.folder(step).absolute())[-1024:],
            weights_delta_norm=math.sqrt(delta),
        )
        return Message(step, head)

    @override
    def figures(self, name: str) -> Figures:
        start, shard = self._start, getattr(self, "shard", None)  # both may change meanwhile
        return Figures(
            shard=start.shard if start else 0,
            weights_bytes=shard.weights_bytes if shard else 0,
            gradient_bytes=shard.gradient_bytes if shard else 0,
            optimizer_bytes=shard.optimizer_bytes if shard else 0,
            **process_figures(shard.device if shard else torch.device("cpu")),
        )

    # A step

    def _plan(self, number: int, step: Step) -> None:
        """The operations of a step: the schedule, once for each turn."""
        assert self._start is not None
        if step.micro_batches * step.turns > MAX_MICRO_BATCHES:
            raise ValueError(
                f"micro-batches of a step must be at most {MAX_MICRO_BATCHES}, got {step.turns} x {step.micro_batches}"
            )
        place = {"shards": self._start.shards, "shard": self._start.shard, "micro_batches": step.micro_batches}
        self._number, self._step = number, step
        self._order = deque(
            Operation(operation.micro_batch + turn * step.micro_batches, operation.phase)
            for turn in range(step.turns)
            for operation in operations(step.schedule, **place)
        )
        self._bound = most_held(step.schedule, **place)
        self._spans, self._most_held, self._is_finite, self._tied_rows = [], 0, True, 0
        self.boundary_bytes = 0
        self.shard.forget_gradients()

    def _advance(self) -> Iterator[Sent]:
        """Do the operations that are next and have their input."""
        while self._order:
            inputs = self._inputs(self._order[0])
            if inputs is None:
                return
            operation = self._order.popleft()
            begin = time.monotonic()
            sent = (
                self._forward(operation, *inputs)
                if operation.phase is Phase.forward
                else self._backward(operation, *inputs)
            )
            synchronize(self.shard.device)
            self._spans.append(Span(operation, begin, time.monotonic()))
            self._most_held = max(self._most_held, len(self.shard.held))
            assert len(self.shard.held) <= self._bound, (
                f"{len(self.shard.held)} micro-batches held, {self._bound} may be"
            )
            if sent is not None:
                yield sent
            if not self._order:
                yield from self._end()

    def _inputs(self, operation: Operation) -> list[Message] | None:
        """The messages that an operation needs; None if one has not arrived yet."""
        shard = self.shard
        kinds: list[type[Head]] = []
        if operation.phase is Phase.forward:
            kinds += [] if shard.is_first else [Hidden]
            kinds += [Tokens] if shard.is_first or shard.is_last else []
        elif not shard.is_last:
            kinds.append(Gradient)
        keys = [(self._number, kind, operation.micro_batch) for kind in kinds]
        if not all(key in self._waiting for key in keys):
            return None
        return [self._waiting.pop(key) for key in keys]

    def _forward(self, operation: Operation, *inputs: Message) -> Sent | None:
        assert self._step is not None
        shard, number = self.shard, operation.micro_batch
        batch = inputs[-1]
        assert isinstance(batch.head, (Tokens, Hidden))
        lengths = batch.head.lengths
        states, labels = None, None
        if isinstance(batch.head, Tokens):
            states, labels = _ids(batch.head, memoryview(batch.body), shard)
        if isinstance(inputs[0].head, Hidden):
            states = self._tensor(inputs[0].head.tensor, inputs[0].body)
            lengths = inputs[0].head.lengths
            if states.dim() != 3 or states.shape[0] != len(lengths) or states.shape[2] != shard.hidden_size:
                raise ValueError(f"hidden states must be {len(lengths)} x T x {shard.hidden_size}, got {states.shape}")
        assert states is not None
        output = shard.forward(MicroBatch(self._number, number, states, lengths, labels, self._step.tokens))
        if output is None:
            return None
        self._is_finite = self._is_finite and bool(output.isfinite().all())
        head = Hidden(micro_batch=number, lengths=list(lengths), tensor=tensor_spec(output))
        return To.next, Message(self._number, head, tensor_bytes(output))

    def _backward(self, operation: Operation, *inputs: Message) -> Sent | None:
        gradient, number = None, operation.micro_batch
        if inputs:
            head = inputs[0].head
            assert isinstance(head, Gradient)
            gradient = self._tensor(head.tensor, inputs[0].body)
            if gradient.shape != self.shard.held[number].output.shape:
                raise ValueError(f"a gradient must have the shape of what was sent, got {list(gradient.shape)}")
        back = self.shard.backward(number, gradient)
        if back is None:
            return None
        return To.previous, Message(
            self._number, Gradient(micro_batch=number, tensor=tensor_spec(back)), tensor_bytes(back)
        )

    def _end(self) -> Iterator[Sent]:
        """End the operations of a step: send a tied embedding's gradient to the other copy, then tell the trainer."""
        tied = self.shard.tied
        if tied is not None:
            assert tied.grad is not None
            to = To.next if self.shard.is_first else To.previous
            rows = max(1, TIED_BYTES // (tied.shape[1] * tied.element_size()))
            for row, piece in zip(range(0, tied.shape[0], rows), tied.grad.split(rows), strict=True):
                head = Tied(to_last=self.shard.is_first, row=row, tensor=tensor_spec(piece))
                # A copy: the other copy's gradient is added to ours while this message may still be in transit.
                yield to, Message(self._number, head, tensor_bytes(piece.clone()))
        yield from self._add_tied()

    def _take_tied(self, message: Message, head: Tied) -> Iterator[Sent]:
        if self.shard.tied is None or head.to_last == self.shard.is_first:  # not for this shard
            yield To.next if head.to_last else To.previous, message
            return
        self._waiting[message.number, Tied, head.row] = message
        yield from self._add_tied()

    def _add_tied(self) -> Iterator[Sent]:
        """Add the other copy's gradient once ours is complete; then the step is done."""
        if self._order or self._step is None:
            return
        tied = self.shard.tied
        if tied is not None:
            for key in [key for key in self._waiting if key[:2] == (self._number, Tied)]:
                message = self._waiting.pop(key)
                assert isinstance(message.head, Tied)
                assert tied.grad is not None
                piece = self._tensor(message.head.tensor, message.body)
                tied.grad[key[2] : key[2] + len(piece)] += piece
                self._tied_rows += len(piece)
            if self._tied_rows < tied.shape[0]:
                return
        self._step = None
        yield To.client, self._done()

    def _done(self) -> Message:
        assert self._start is not None
        head = Done(
            shard=self._start.shard,
            loss=self.shard.loss,
            squares=self.shard.squares(),
            is_finite=self._is_finite and math.isfinite(self.shard.loss),
            held=self._most_held,
            boundary_bytes=self.boundary_bytes,
            rss_bytes=read_memory(self.shard.device).rss_bytes,
        )
        return Message(self._number, head, pack_spans(self._spans))

    def _tensor(self, spec: TensorSpec, body: bytes | memoryview) -> Tensor:
        if not spec.dtype.torch.is_floating_point:
            raise ValueError(f"hidden states and gradients must be of a floating dtype, got {spec.dtype.name}")
        peer = Peer(role="shard", address="the neighbour", phase=f"step {self._number}")
        return read_tensor(spec, memoryview(body), peer=peer).to(self.shard.device)


def _squared_distance(one: Tensor, other: Tensor) -> float:
    """The distance in float64, piece by piece: a whole embedding in float64 would be as large as everything else."""
    pieces = zip(one.flatten().split(2**18), other.flatten().split(2**18), strict=True)
    return sum(float((a.cpu().double() - b.double()).square().sum()) for a, b in pieces)


def _ids(batch: Tokens, body: memoryview, shard: TrainingShard) -> tuple[Tensor | None, Tensor | None]:
    """Ids B x T and labels B x T of a batch, as far as this shard needs them. Raises ValueError for anything else."""
    shape = (len(batch.lengths), batch.columns)
    wanted = [shard.is_first, shard.is_last]
    if len(body) != 4 * shape[0] * shape[1] * sum(wanted) or max(batch.lengths) > batch.columns:
        raise ValueError(f"a batch must hold {sum(wanted)} x {shape[0]} x {shape[1]} ids, got {len(body)} bytes")
    arrays = iter(torch.from_numpy(np.frombuffer(body, dtype="<i4").astype(np.int64)).reshape(-1, *shape))
    ids, labels = (next(arrays).to(shard.device) if is_wanted else None for is_wanted in wanted)
    if ids is not None and not 0 <= int(ids.min()) <= int(ids.max()) < shard.vocabulary_size:
        raise ValueError(f"ids must be in [0, {shard.vocabulary_size}), got {int(ids.min())} to {int(ids.max())}")
    if labels is not None and not -100 <= int(labels.min()) <= int(labels.max()) < shard.vocabulary_size:
        raise ValueError(f"labels must be in [-100, {shard.vocabulary_size}), got others")
    return ids, labels


def _fault(message: Message, code: FaultCode, text: str) -> Message:
    return Message(message.number, Fault(code=code, text=" ".join(text.split())[:1024]))
