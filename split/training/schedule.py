"""Order of the micro-batches at each shard, as plain data: GPipe (arXiv 1811.06965) and 1F1B (arXiv 1806.03377,
non-interleaved with a flush, arXiv 2104.04473). Loads no torch.

    p = 2 shards, m = 4 micro-batches; F forward, B backward, of micro-batch 0..3

    GPipe   shard 0   F0 F1 F2 F3 .. .. B0 B1 B2 B3        1F1B    shard 0   F0 F1 .. B0 F2 B1 F3 B2 .. B3
            shard 1      F0 F1 F2 F3 B0 B1 B2 B3                   shard 1      F0 B0 F1 B1 F2 B2 F3 B3

With forward f_s and backward b_s seconds at shard s and nothing lost between shards, a step of GPipe takes

    T = sum_s f_s + (m - 1) max_s f_s + sum_s b_s + (m - 1) max_s b_s

(a flow shop of equal jobs, twice: the last shard begins its backwards when its last forward is done). 1F1B takes at
least

    T = max_s [ sum_{r<s} (f_r + b_r) + m (f_s + b_s) ]

(a shard can begin when the first micro-batch has come through those before it, and its last backward must go through
them), and just that when the shards are equal. The rest is the bubble: 1 - m sum_s (f_s + b_s) / (p T), which is
(p - 1) / (m + p - 1) for equal shards under both. Shards of unequal times wait for the slowest one in every
micro-batch, a part of the bubble that more micro-batches do not shrink; another cut does. `least_seconds` has the
formulas; `replay` gives the times of either schedule exactly, links included.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Self


class Schedule(Enum):
    """`gpipe`: all forwards, then all backwards. `one_f_one_b`: a backward as soon as there is one."""

    gpipe = "gpipe"
    one_f_one_b = "one_f_one_b"


class Phase(Enum):
    """Direction of a micro-batch through a shard."""

    forward = "forward"
    backward = "backward"


@dataclass(frozen=True, order=True)
class Operation:
    """Forward or backward of one micro-batch at one shard."""

    micro_batch: int
    phase: Phase


def operations(schedule: Schedule, *, shards: int, shard: int, micro_batches: int) -> list[Operation]:
    """The operations of a shard (from 0) in one step, in order. Backwards come in the order of the forwards, as in a
    whole model, so that gradients add up in the same order."""
    assert 0 <= shard < shards, f"shard {shard} of {shards}"
    ahead = min(most_held(schedule, shards=shards, shard=shard, micro_batches=micro_batches), micro_batches)
    order = [Operation(number, Phase.forward) for number in range(ahead)]
    for number in range(micro_batches):
        order.append(Operation(number, Phase.backward))
        if ahead + number < micro_batches:
            order.append(Operation(ahead + number, Phase.forward))
    return order


def most_held(schedule: Schedule, *, shards: int, shard: int, micro_batches: int) -> int:
    """The most micro-batches whose activations the shard holds at once: p - s under 1F1B, m under GPipe."""
    return micro_batches if schedule is Schedule.gpipe else min(shards - shard, micro_batches)


def even_bubble(shards: int, micro_batches: int) -> float:
    """The bubble's share of a step when all shards take equally long: (p - 1) / (m + p - 1)."""
    return (shards - 1) / (micro_batches + shards - 1)


def least_seconds(
    schedule: Schedule, forward_seconds: Sequence[float], backward_seconds: Sequence[float], micro_batches: int
) -> float:
    """T of the formulas above: exact under GPipe, a lower bound under 1F1B."""
    if schedule is Schedule.gpipe:
        return sum(sum(seconds) + (micro_batches - 1) * max(seconds) for seconds in (forward_seconds, backward_seconds))
    both = [forward + backward for forward, backward in zip(forward_seconds, backward_seconds, strict=True)]
    return max(sum(both[:shard]) + micro_batches * own for shard, own in enumerate(both))


@dataclass(frozen=True)
class Span:
    """An operation with its times, in seconds of one clock."""

    operation: Operation
    begin: float
    end: float

    def shifted(self, seconds: float) -> Self:
        """The span by a clock that is `seconds` ahead."""
        return replace(self, begin=self.begin + seconds, end=self.end + seconds)


@dataclass(frozen=True)
class Timeline:
    """A step as it ran, or as a replay predicts it."""

    shards: list[list[Span]]
    """The operations of each shard, in order."""

    @property
    def seconds(self) -> float:
        """Time from the start of the first operation to the end of the last one."""
        spans = [span for shard in self.shards for span in shard]
        return max(span.end for span in spans) - min(span.begin for span in spans)

    @property
    def busy_seconds(self) -> float:
        """Time during which shards work, over all shards."""
        return sum(span.end - span.begin for shard in self.shards for span in shard)

    @property
    def bubble_fraction(self) -> float:
        """Share of the shards' time in which they wait."""
        return 1 - self.busy_seconds / (len(self.shards) * self.seconds)


def replay(
    orders: Sequence[Sequence[Operation]],
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    link_seconds: float = 0.0,
) -> Timeline:
    """Simulate a schedule: each shard does its operations in order, each as soon as its input has arrived.

    Args:
        orders: The operations of each shard, first to last.
        forward_seconds: Time of one forward at each shard.
        backward_seconds: Time of one backward at each shard; the last shard's follows its own forward.
        link_seconds: Time of a result on its way to the neighbour.

    Raises:
        ValueError: orders in which shards wait for each other forever.
    """
    count = len(orders)
    ends: list[dict[Operation, float]] = [{} for _ in range(count)]
    spans: list[list[Span]] = [[] for _ in range(count)]
    free = [0.0] * count
    advanced = True
    while advanced:
        advanced = False
        for shard, order in enumerate(orders):
            while len(spans[shard]) < len(order):
                operation = order[len(spans[shard])]
                ready = _ready(operation, shard, ends, link_seconds)
                if ready is None:
                    break
                seconds = (forward_seconds if operation.phase is Phase.forward else backward_seconds)[shard]
                begin = max(free[shard], ready)
                free[shard] = ends[shard][operation] = begin + seconds
                spans[shard].append(Span(operation, begin, begin + seconds))
                advanced = True
    for shard, order in enumerate(orders):
        if len(spans[shard]) < len(order):
            raise ValueError(f"shard {shard} waits for the input of {order[len(spans[shard])]} for ever")
    return Timeline(spans)


def _ready(operation: Operation, shard: int, ends: Sequence[dict[Operation, float]], link: float) -> float | None:
    """Time at which the input arrives; None until it is computed."""
    if operation.phase is Phase.forward:
        return 0.0 if shard == 0 else _after(ends[shard - 1].get(operation), link)
    if shard == len(ends) - 1:
        return ends[shard].get(Operation(operation.micro_batch, Phase.forward))
    return _after(ends[shard + 1].get(operation), link)


def _after(end: float | None, link: float) -> float | None:
    return None if end is None else end + link
