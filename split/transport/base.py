"""Transports carry messages between a client and the stages of its chain; both interfaces. Knows no tensors."""

import math
import struct
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Generic, NamedTuple, Protocol, TypeVar

from lab.faults import Lost
from lab.wire.frames import Head
from split.chain.messages import Fault, FaultCode, ShardFigures, Welcome

F = TypeVar("F", bound=ShardFigures, covariant=True)

CLOCK_ROUNDS = 5
"""Number of round trips, the shortest of which gives the offset of a shard's clock from ours."""
REPORTED_PASSES = 4096
"""Hops that a shard remembers for each client."""


class Message(NamedTuple):
    """A message along the chain, or from a shard to the client."""

    number: int
    """Number of the request (OPEN, CLOSE), of the pass (PASS), or of the training step."""
    head: Head
    body: bytes | memoryview = b""


class To(Enum):
    """Receiver of a message, seen from a shard."""

    client = "client"
    previous = "previous"
    next = "next"


Sent = tuple[To, Message]


class Stage(Protocol):
    """A shard in its chain: takes a message, yields messages; transports only deliver them. One thread at a time."""

    layers: range
    """Layers of the model that the shard holds."""
    context: int
    """Most tokens of a request; 0 in training."""
    sessions: int
    """Most concurrent requests."""
    coding_seconds: float
    """Seconds that the last message took to turn bytes into tensors and back."""
    boundary_bytes: int
    """Bytes sent to neighbours; the transport counts them."""

    def take(self, message: Message, client: Hashable = 0) -> Iterator[Sent]:
        """Handle a client's message, and yield the resulting messages, each as soon as it is ready.

        Never raises for the content of a message: a `Fault` is sent instead.
        """

    def forget(self, client: Hashable = 0) -> None:
        """Drop all that is held for a client that has left."""

    def figures(self, name: str) -> ShardFigures:
        """The sizes of the shard and the clock of its machine, now; from any thread. `name` is for people."""


def welcome_of(stage: Stage, model_layers: int, instance: int = 0) -> Welcome:
    """A shard's answer to ATTACH and JOIN."""
    layers = stage.layers
    return Welcome(
        instance=instance,
        first=layers.start,
        last=layers.stop,
        model_layers=model_layers,
        context=stage.context,
        sessions=stage.sessions,
    )


class ChainMismatch(ValueError):
    """The shards that answered are not the layers of one model, from first to last."""


def check_layers(welcomes: Sequence[Welcome], names: Sequence[object]) -> None:
    """Refuse shards that do not make up the model. Raises `ChainMismatch`."""
    expected, model_layers = 0, welcomes[-1].model_layers
    for welcome, name in zip(welcomes, names, strict=True):
        if welcome.first != expected:
            fault = "overlap" if welcome.first < expected else "leave a gap"
            raise ChainMismatch(
                f"layers must go on at {expected}, got {welcome.first}:{welcome.last} at {name}: they {fault}"
            )
        expected = welcome.last
    if expected != model_layers:
        raise ChainMismatch(f"layers must end at the model's {model_layers}, got {expected} at {names[-1]}")


class ShardLost(Lost):
    """A shard, or the link to it, is gone, with all messages in transit. `Transport.restore` may repair the chain."""


class ChainLost(ShardLost):
    """A loss that waiting cannot repair."""


def check_link(answer: Message) -> Message:
    """The answer itself. Raises `ShardLost` for a fault of code link."""
    if isinstance(answer.head, Fault) and answer.head.code is FaultCode.link:
        raise ShardLost(answer.head.text)
    return answer


_HOP = struct.Struct("<IdddddI")
HOP_BYTES = _HOP.size


class Hop(NamedTuple):
    """One pass at one shard; monotonic seconds, of the client's clock in a report and of the shard's own before."""

    arrived: float
    began: float
    computed: float
    sent: float
    coding: float
    """Seconds between `began` and `computed` spent on turning bytes into tensors and back."""
    sent_bytes: int
    """Bytes sent on, headers included (in process: none)."""

    def pack(self, number: int) -> bytes:
        """The hop of pass `number`, encoded."""
        return _HOP.pack(number, *self)


@dataclass(frozen=True, kw_only=True)
class ShardReport(Generic[F]):
    """Present figures of one shard."""

    layers: range
    figures: F
    clock_offset_seconds: float
    """Difference between our clock and the shard's; add it to the shard's times."""
    hops: dict[int, Hop]
    """Its last passes, by number."""


def ask_figures(layers: range, ask: Callable[[], tuple[F, bytes | memoryview, float]]) -> ShardReport[F]:
    """Ask for a shard's report. The clocks are compared by the shortest of some round trips, as in NTP (RFC 5905).

    Args:
        layers: Layers of the shard.
        ask: Returns the shard's figures, its packed hops, and when they arrived.
    """
    shortest, offset = math.inf, 0.0
    for _ in range(CLOCK_ROUNDS):
        asked = time.monotonic()
        figures, packed, answered = ask()
        if answered - asked < shortest:
            shortest = answered - asked
            offset = (asked + answered) / 2 - figures.clock_seconds
    hops = {
        number: Hop(arrived + offset, began + offset, computed + offset, sent + offset, coding, sent_bytes)
        for number, arrived, began, computed, sent, coding, sent_bytes in _HOP.iter_unpack(packed)
    }
    return ShardReport(layers=layers, figures=figures, clock_offset_seconds=offset, hops=hops)


class Transport(Protocol):
    """Carries messages between a client and every shard of its chain; shards reach their neighbours by themselves.

    Belongs to one thread.
    """

    layers: list[range]
    """Layers of each shard, first to last."""
    context: int
    """Most tokens of a request that every shard takes."""

    def send(self, shard: int, message: Message) -> None:
        """Give a shard a message, after those before it, without waiting for its work. Raises `ShardLost`."""

    def collect(self, wait_seconds: float | None = None) -> Message:
        """Return the next message of any shard to the client; those of one shard come in the order of its work.

        Raises:
            ShardLost: also when nothing came within the transport's own deadline.
            TimeoutError: nothing came within `wait_seconds`, where these are given.
        """

    def restore(self, deadline: float) -> None:
        """Repair the chain until `deadline` (monotonic seconds): every shard connected, no message in transit.

        Raises:
            ShardLost: not within that time; `ChainLost`: never.
        """

    def reports(self) -> list[ShardReport[ShardFigures]]:
        """The figures of every shard, first to last. Raises `ShardLost`."""

    def shutdown(self) -> None:
        """Leave every shard."""
