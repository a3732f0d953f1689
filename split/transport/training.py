"""What carries messages between a trainer and shards that learn; and the way without a network."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

from split.training.stage import To, TrainingStage
from split.transport.base import Message


class TrainingTransport(Protocol):
    """The way from the trainer to every shard and back; shards reach their neighbours by themselves. One thread."""

    @property
    def layers(self) -> list[range]:
        """Of each shard, first to last."""
        ...

    def send(self, shard: int, message: Message) -> None:
        """Give a shard a message, after those before it, without waiting for its work. Raises `ShardLost`."""
        ...

    def collect(self) -> Message:
        """Return the next message of any shard to the trainer. Raises `ShardLost`, within its deadline."""
        ...

    def restore(self, deadline: float) -> None:
        """Bring up the chain again, until `deadline` (monotonic seconds), with nothing under way in it.

        Raises:
            ShardLost: not within that time; `ChainLost`: never.
        """
        ...

    def shutdown(self) -> None:
        """Leave every shard."""
        ...


class InProcessTraining:
    """All shards in this process, on this thread: for tests, and for what a split costs without a network."""

    def __init__(self, stages: Sequence[TrainingStage], layers: Sequence[range]) -> None:
        self._stages, self.layers = list(stages), list(layers)
        self._answers: deque[Message] = deque()

    def send(self, shard: int, message: Message) -> None:
        """See `TrainingTransport.send`; the work is done here and now, and what it makes others do."""
        under_way = deque([(shard, message)])
        while under_way:
            place, message = under_way.popleft()
            for to, sent in self._stages[place].take(message):
                if to is To.trainer:
                    self._answers.append(sent)
                else:
                    self._stages[place].boundary_bytes += len(sent.body)
                    under_way.append((place + (1 if to is To.next else -1), sent))

    def collect(self) -> Message:
        """See `TrainingTransport.collect`."""
        assert self._answers, "no shard has anything to say"
        return self._answers.popleft()

    def restore(self, deadline: float) -> None:
        """See `TrainingTransport.restore`."""
        self._answers.clear()

    def shutdown(self) -> None:
        """Drop the shards."""
        self._stages.clear()
