"""What carries messages between a client and its shards. Knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from lab.faults import Lost
from lab.wire import Head


class Message(NamedTuple):
    """What travels along the chain, and from its end to the client."""

    number: int
    """Of the text (OPEN, CLOSE) or of the pass (PASS)."""
    head: Head
    body: bytes | memoryview = b""


class ShardLost(Lost):
    """A shard, or the link to it, is gone; what was under way is lost. `Transport.restore` may bring the chain back."""


class ChainLost(ShardLost):
    """A loss that no waiting mends."""


class Hop(NamedTuple):
    """One pass at one shard; monotonic seconds of the client's clock."""

    arrived: float
    began: float
    computed: float
    sent: float
    coding: float
    """Seconds between `began` and `computed` that went into turning bytes into tensors and back."""
    sent_bytes: int
    """Handed on, headers included (in process: there are none)."""


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """One shard's figures, now."""

    name: str
    layers: range
    device: str
    weights_bytes: int
    kv_bytes: int
    rss_bytes: int
    peak_rss_bytes: int
    device_memory_used_bytes: int | None
    device_memory_total_bytes: int | None
    hops: dict[int, Hop]
    """Its last passes, by number."""


class Transport(Protocol):
    """The way of messages through all shards, and of answers back. Belongs to one thread."""

    def submit(self, message: Message) -> None:
        """Send a message to the first shard, without waiting for its work. Raises `ShardLost`."""
        ...

    def collect(self, wait_seconds: float | None = None) -> Message:
        """Return the next answer: to each PASS in order, to an OPEN also later than to what was sent after it.

        Raises:
            ShardLost: also when nothing came within the transport's own deadline.
            TimeoutError: nothing came within `wait_seconds`, where these are given.
        """
        ...

    def restore(self, deadline: float) -> None:
        """Bring up the chain again, until `deadline` (monotonic seconds): every shard there, no text in it.

        Raises:
            ShardLost: not within that time; `ChainLost`: never.
        """
        ...

    def reports(self) -> list[ShardReport]:
        """The figures of every shard, first to last. Raises `ShardLost`."""
        ...

    def shutdown(self) -> None:
        """Leave every shard."""
        ...
