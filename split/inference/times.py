"""Parts of a token's time: each pass by hop, and each hop by kind of work.

The parts follow each other from the client's send to its receive, so that they add up to the pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from split.inference.messages import Report
from split.inference.sharded_model import PassTime
from split.transport.base import Hop, ShardReport


@dataclass(frozen=True)
class HopParts:
    """Seconds of one pass at one shard."""

    wire: float
    """From the send of the shard before (the client, at first) to the arrival."""
    queue: float
    """From the arrival to the shard's thread."""
    serialise: float
    """Bytes into tensors and back."""
    compute: float
    wait: float
    """From the result to its send, while earlier results leave."""


@dataclass(frozen=True)
class PassParts:
    """One pass, taken apart."""

    number: int
    rows: int
    submitted: float
    hops: Sequence[HopParts]
    answer_wire: float
    """From the last shard back to the client."""

    @property
    def total_seconds(self) -> float:
        """Sum of the parts."""
        return self.answer_wire + sum(sum(vars(hop).values()) for hop in self.hops)


def take_apart(passes: Sequence[PassTime], reports: Sequence[ShardReport[Report]]) -> list[PassParts]:
    """The passes that every shard still remembers, oldest first."""
    return [
        _parts(timed, [report.hops[timed.number] for report in reports])
        for timed in passes
        if all(timed.number in report.hops for report in reports)
    ]


def _parts(timed: PassTime, hops: Sequence[Hop]) -> PassParts:
    left = timed.submitted
    parts = []
    for hop in hops:
        parts.append(
            HopParts(
                wire=hop.arrived - left,
                queue=hop.began - hop.arrived,
                serialise=hop.coding,
                compute=hop.computed - hop.began - hop.coding,
                wait=hop.sent - hop.computed,
            )
        )
        left = hop.sent
    return PassParts(timed.number, timed.rows, timed.submitted, parts, timed.answered - left)


def as_row(parts: PassParts, names: Sequence[str]) -> Mapping[str, float]:
    """Flat figures of one pass, for metrics."""
    row: dict[str, float] = {"answer_wire_seconds": parts.answer_wire, "pass_seconds": parts.total_seconds}
    for name, hop in zip(names, parts.hops, strict=True):
        row |= {f"{name}_{part}_seconds": value for part, value in vars(hop).items()}
    return row
