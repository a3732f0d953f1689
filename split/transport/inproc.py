"""All shards in this process, one after the other: for tests, and for what a split costs without a network."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from lab.device import read_memory
from split.inference.messages import Pass
from split.inference.stage import Stage
from split.transport.base import Hop, Message, ShardReport


class InProcess:
    """A chain of stages, called in turn. Messages are bytes as on a wire; nothing is lost."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = list(stages)
        self._answers: deque[Message] = deque()
        self._hops: list[dict[int, Hop]] = [{} for _ in self._stages]

    def submit(self, message: Message) -> None:
        """See `Transport.submit`; the work is done here and now."""
        on_its_way: Message | None = message
        for index, stage in enumerate(self._stages):
            if on_its_way is None:
                return
            began = time.monotonic()
            on_its_way = stage.take(0, on_its_way)
            ended = time.monotonic()
            if isinstance(message.head, Pass):
                self._hops[index][message.number] = _hop(began, ended, stage, on_its_way)
        if on_its_way is not None:
            self._answers.append(on_its_way)

    def collect(self, wait_seconds: float | None = None) -> Message:
        """See `Transport.collect`."""
        return self._answers.popleft()

    def restore(self, deadline: float) -> None:
        """See `Transport.restore`."""
        for stage in self._stages:
            stage.forget(0)
        self._answers.clear()

    def reports(self) -> list[ShardReport]:
        """See `Transport.reports`; the process's memory stands at every shard."""
        return [
            report_of(stage, f"shard {index + 1}", hops)
            for index, (stage, hops) in enumerate(zip(self._stages, self._hops, strict=True))
        ]

    def shutdown(self) -> None:
        """Drop the shards."""
        self._stages.clear()


def _hop(began: float, ended: float, stage: Stage, handed_on: Message | None) -> Hop:
    sent_bytes = len(handed_on.body) if handed_on else 0
    return Hop(began, began, ended, ended, stage.coding_seconds, sent_bytes)


def report_of(stage: Stage, name: str, hops: dict[int, Hop]) -> ShardReport:
    """The figures of a stage in this process."""
    memory = read_memory(stage.shard.device)
    return ShardReport(
        name=name,
        layers=stage.shard.layers,
        device=str(stage.shard.device),
        weights_bytes=stage.shard.weights_bytes,
        kv_bytes=stage.shard.cache.allocated_bytes,
        rss_bytes=memory.rss_bytes,
        peak_rss_bytes=memory.peak_rss_bytes,
        device_memory_used_bytes=memory.device_used_bytes,
        device_memory_total_bytes=memory.device_total_bytes,
        hops=hops,
    )
