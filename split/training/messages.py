"""Messages of split training. The transports carry them; over tcp they are frames of `lab.wire`.

    trainer             shard 1                      shard 2 (last)
    START(recipe)  ->   loads, STARTED               loads, STARTED             a checkpoint's step, or the base model
    STEP           ->   its order from the schedule  the same
    TOKENS ids     ->   forward                      TOKENS labels              one for each micro-batch
                        HIDDEN                  ->   forward, loss, backward
                        backward                <-   GRADIENT                   of the loss by the hidden states
                   <-   DONE(squares of gradients)   DONE(loss)
    APPLY(scale)   ->   optimizer step               optimizer step             the same clipping everywhere
    SAVE           ->   writes its part, SAVED       writes its part, SAVED

Every message's number is its step's. A shard does its operations in the order of `split.training.schedule`, each as
soon as its input has arrived, so the order of messages of different senders makes no difference. TIED carries the
gradient of an embedding that is also the head, in both directions along the chain.

ATTACH, WELCOME, JOIN, ASK and FAULT are those of every chain (`split.chain.messages`).

Shapes: B examples, T positions, H hidden size, V vocabulary.
"""

import struct
from typing import Annotated

import msgspec

from lab.wire.fields import LongText, ShortText, Uint31, Uint32, Uint63
from lab.wire.frames import Head, MessageTable
from lab.wire.tensors import TensorSpec
from split.chain.messages import Answer, Ask, Attach, Count, Fault, Join, ShardFigures, Welcome, frame_table
from split.training.schedule import Operation, Phase, Schedule, Span
from split.training.settings import MAX_EXAMPLES, MAX_MICRO_BATCHES, Train

PROTOCOL = range(3, 4)
MAX_JOINT_MICRO_BATCHES = 64
"""In a step by torch's own autograd: each may keep a thread of a shard's agent waiting, of twice as many."""

Fraction = Annotated[float, msgspec.Meta(ge=0, lt=1)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Examples = Annotated[list[Count], msgspec.Meta(min_length=1, max_length=MAX_EXAMPLES)]
MicroBatchNumber = Annotated[int, msgspec.Meta(ge=0, lt=MAX_MICRO_BATCHES)]


class Recipe(Head):
    """Settings that every shard trains with; the others come with each step."""

    train: Train
    lora_rank: Count
    lora_alpha: Positive
    lora_dropout: Fraction
    lora_targets: Annotated[list[ShortText], msgspec.Meta(max_length=64)]
    weight_decay: NotNegative
    beta1: Fraction
    beta2: Fraction
    activation_checkpointing: bool
    seed: Uint63
    """Seed of a new adapter and of dropout."""


class Start(Head):
    """Load this shard of a run, in the state after the message's step."""

    shard: Uint31
    """Its place in the chain, from 0."""
    shards: Uint31
    run: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]
    """Name of the run, for its checkpoints."""
    digest: ShortText
    """Digest of the shard's part of the checkpoint; empty at step 0, which has none."""
    recipe: Recipe


class Started(Answer):
    """The shard is loaded."""

    shard: Uint31
    trainable: int
    """Parameters that training changes."""


class Step(Head):
    """Start the forwards and backwards of one optimizer step."""

    schedule: Schedule
    micro_batches: Annotated[int, msgspec.Meta(ge=1, le=MAX_MICRO_BATCHES)]
    """Micro-batches in one turn of the schedule."""
    turns: Annotated[int, msgspec.Meta(ge=1, le=MAX_MICRO_BATCHES)]
    """Turns of the schedule, one after the other, before the gradients are used (accumulation)."""
    tokens: Annotated[int, msgspec.Meta(ge=1, lt=2**40)]
    """Tokens that the loss counts in the whole step: each micro-batch's sum of cross-entropies is divided by it."""


class Tokens(Head):
    """A micro-batch's ids for the first shard, labels for the last one: B x T int32 in the body, ids first if the only
    shard needs both."""

    micro_batch: MicroBatchNumber
    lengths: Examples
    """Positions of each example that are not padding."""
    columns: Count
    """T."""


class Hidden(Head):
    """A micro-batch's hidden states B x T x H, to the next shard."""

    micro_batch: MicroBatchNumber
    lengths: Examples
    tensor: TensorSpec


class Gradient(Head):
    """Gradient of the loss by a micro-batch's hidden states B x T x H, to the shard that made them."""

    micro_batch: MicroBatchNumber
    tensor: TensorSpec


class Tied(Head):
    """Rows of the gradient of one copy of a tied embedding, for the other copy."""

    to_last: bool
    row: Uint31
    tensor: TensorSpec


class Done(Answer):
    """All forwards and backwards of a step are done at this shard. The body holds their times: `OPERATION` each."""

    shard: Uint31
    loss: float
    """Mean over the step's tokens, in nats, from the last shard; 0 from others."""
    squares: float
    """Sum of the squares of all gradients of this shard; a tied embedding's count at the first shard only."""
    is_finite: bool
    """Whether all hidden states of this shard were finite, at the last shard the loss."""
    held: Uint31
    """Most micro-batches that it held at once."""
    boundary_bytes: int
    """Bytes that it sent to its neighbours, including headers if there are any."""
    rss_bytes: int


class Apply(Head):
    """Take the optimizer's step."""

    scale: Annotated[float, msgspec.Meta(gt=0, le=1)]
    """Factor of every gradient, from clipping."""
    learning_rate: NotNegative


class Save(Head):
    """Write this shard's part of the checkpoint after the message's step."""

    keep_from: Uint32
    """Parts of earlier steps may be removed."""


class Saved(Answer):
    """The part is on disk."""

    shard: Uint31
    digest: ShortText
    """SHA-256 over the part's files."""
    folder: LongText
    weights_delta_norm: float
    """Norm of the change of its trainable weights since the run began."""


class Figures(ShardFigures):
    """A shard's present sizes, in answer to ASK."""

    shard: Uint31
    gradient_bytes: int
    optimizer_bytes: int


OPERATION = struct.Struct("<IBdd")
"""Micro-batch, whether it is a backward, begin and end (monotonic seconds of that machine)."""


def pack_spans(spans: list[Span]) -> bytes:
    """The body of DONE."""
    return b"".join(
        OPERATION.pack(span.operation.micro_batch, span.operation.phase is Phase.backward, span.begin, span.end)
        for span in spans
    )


def unpack_spans(body: bytes | memoryview) -> list[Span]:
    """The operations of DONE. Raises ValueError for a body of another length."""
    if len(body) % OPERATION.size:
        raise ValueError(f"operations must be {OPERATION.size} bytes each, got {len(body)} in all")
    return [
        Span(Operation(number, Phase.backward if backward else Phase.forward), begin, end)
        for number, backward, begin, end in OPERATION.iter_unpack(body)
    ]


_HEAD_BYTES = 2**15


def table(body_bytes: int) -> MessageTable:
    """The frames of both roles; tensors up to `body_bytes`."""
    heads: tuple[type[Head], ...] = (
        Attach, Welcome, Join, Fault, Ask, Figures, Start, Started, Step, Tokens, Hidden, Gradient, Tied, Done, Apply,
        Save, Saved,
    )  # fmt: skip
    bodies: dict[type[Head], int] = {Done: 2 * MAX_MICRO_BATCHES * OPERATION.size}
    bodies |= dict.fromkeys((Tokens, Hidden, Gradient, Tied), body_bytes)
    return frame_table(dict.fromkeys(heads, _HEAD_BYTES), bodies)
