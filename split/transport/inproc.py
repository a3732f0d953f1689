"""All shards in this process, on this thread: for tests, and to measure what a split costs without a network."""

import time
from collections import deque
from collections.abc import Sequence

from typing_extensions import override

from split.chain.messages import ShardFigures
from split.transport.base import REPORTED_PASSES, Hop, Message, ShardReport, Stage, To, Transport


class InProcess(Transport):
    """A chain of stages, called in turn. Messages are bytes as on a wire; nothing is lost."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = list(stages)
        self.layers = [stage.layers for stage in stages]
        self.context = min(stage.context for stage in stages)
        self._answers: deque[Message] = deque()
        self._hops: list[dict[int, Hop]] = [{} for _ in self._stages]

    @override
    def send(self, shard: int, message: Message) -> None:
        under_way = deque([(shard, message)])
        while under_way:
            place, message = under_way.popleft()
            stage, began, sent_bytes = self._stages[place], time.monotonic(), 0
            for to, sent in stage.take(message):
                sent_bytes += len(sent.body)
                if to is To.client:
                    self._answers.append(sent)
                else:
                    stage.boundary_bytes += len(sent.body)
                    under_way.append((place + (1 if to is To.next else -1), sent))
            ended = time.monotonic()
            self._hops[place][message.number] = Hop(began, began, ended, ended, stage.coding_seconds, sent_bytes)
            self._hops[place].pop(message.number - REPORTED_PASSES, None)

    @override
    def collect(self, wait_seconds: float | None = None) -> Message:
        assert self._answers, "no shard has anything to say"
        return self._answers.popleft()

    @override
    def restore(self, deadline: float) -> None:
        for stage in self._stages:
            stage.forget()
        self._answers.clear()

    @override
    def reports(self) -> list[ShardReport[ShardFigures]]:
        return [
            ShardReport(
                layers=stage.layers, figures=stage.figures(f"shard {place}"), clock_offset_seconds=0.0, hops=dict(hops)
            )
            for place, (stage, hops) in enumerate(zip(self._stages, self._hops, strict=True), 1)
        ]

    @override
    def shutdown(self) -> None:
        self._stages.clear()
