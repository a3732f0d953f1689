"""Messages of every chain of shards, for inference and training; over tcp they are frames of `lab.wire`.

    client                       shard 1                    shard 2 (last)
    ATTACH         ---------------------------------->      last to first, with the address of the next shard
                   <----------------------------------      WELCOME layers
    ATTACH next    ---------->   JOIN            ---->
                                                 <----      WELCOME
                   <----------   WELCOME layers, or FAULT if it cannot reach the next shard
    ASK            ---------->
                   <----------   REPORT (inference), FIGURES (training)

Each pillar adds its own: `split.inference.messages`, `split.training.messages`.
"""

import time
from collections.abc import Mapping
from enum import Enum, IntEnum
from typing import Annotated, Any

import msgspec
import torch

from lab.device import read_memory
from lab.wire.fields import LongText, ShortText, Uint31, Uint32, Uint63
from lab.wire.frame_connection import FrameConnection
from lab.wire.frame_socket import FrameSocket
from lab.wire.frames import FIRST_APPLICATION_TYPE, Head, MessageKind, MessageTable

Count = Annotated[int, msgspec.Meta(ge=1, lt=2**20)]

MAX_ADDRESSES = 16


class Attach(Head):
    """The client's first frame to each shard: its number, and the next shard."""

    client: Uint63
    """A random number of this connection attempt; JOIN names it to the next shard."""
    next: Annotated[list[ShortText], msgspec.Meta(max_length=MAX_ADDRESSES)]
    """Address of the next shard, `host:port`; a shard's own `project.next` is tried first. Empty: the last shard."""
    next_instance: Uint32
    """Number of the process that it must be: the one that the client is attached to."""


class Answer(Head):
    """A message of a shard to its client, on the client's own connection."""


class Welcome(Head):
    """A shard's answer to ATTACH and JOIN: its layers. It is sent once all later shards have been joined."""

    instance: Uint32
    """A random number of this process."""
    first: Uint31
    last: Uint31
    """Layers first..last - 1."""
    model_layers: Uint31
    context: Uint31
    sessions: Uint31


class Join(Head):
    """A shard's first frame to the next one."""

    client: Uint63


class Ask(Head):
    """A client asks a shard for its `ShardFigures`."""


class ShardFigures(Answer):
    """The sizes of a shard at the moment, in answer to ASK; each pillar adds its own."""

    clock_seconds: float
    """The monotonic clock of the shard's machine at its answer."""
    device: ShortText
    weights_bytes: int
    rss_bytes: int
    peak_rss_bytes: int
    device_memory_used_bytes: int | None
    device_memory_total_bytes: int | None


class FaultCode(Enum):
    """Reasons why a request cannot continue, or a message had no effect."""

    unfit = "unfit"
    """NaN or infinity in its hidden states or logits."""
    full = "full"
    """No slot, or no memory for keys and values."""
    lost = "lost"
    """The shard does not hold the request up to that position (it was evicted, or the shard is new): rebuild it."""
    refused = "refused"
    """The message is invalid at this shard."""
    link = "link"
    """The shard has lost a neighbour, or cannot reach the next one."""
    failed = "failed"
    """The shard failed."""


def process_figures(device: torch.device) -> dict[str, Any]:
    """Present memory of this process and its device: fields that all `ShardFigures` have."""
    memory = read_memory(device)
    return {
        "clock_seconds": time.monotonic(),
        "device": str(device),
        "rss_bytes": memory.rss_bytes,
        "peak_rss_bytes": memory.peak_rss_bytes,
        "device_memory_used_bytes": memory.device_used_bytes,
        "device_memory_total_bytes": memory.device_total_bytes,
    }


class Fault(Answer):
    """A message that had no effect, and why."""

    code: FaultCode
    text: LongText


def frame_table(heads: Mapping[type[Head], int], bodies: Mapping[type[Head], int]) -> MessageTable:
    """The frames of a pillar, numbered in the order of `heads`.

    Args:
        heads: Most bytes of each head.
        bodies: Most bytes of a body, for the frames that have one.
    """
    names = [head.__name__.lower() for head in heads]
    types = IntEnum("MessageType", names, start=FIRST_APPLICATION_TYPE)  # type: ignore[misc]  # mypy wants literals
    return MessageTable(
        {
            number: MessageKind(head=head, max_bytes=most + bodies.get(head, 0), has_body=head in bodies)
            for number, (head, most) in zip(types, heads.items(), strict=True)
        }
    )


def send(connection: FrameConnection | FrameSocket, number: int, head: Head, body: bytes | memoryview = b"") -> None:
    """Send a frame of the type that carries `head`."""
    connection.send(connection.endpoint.table.number(head), number, head, body)
