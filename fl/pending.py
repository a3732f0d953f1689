"""Messages that were sent to nodes and whose replies are still to come."""

import time
from collections.abc import Iterator

from flwr.app import Message
from flwr.serverapp import Grid

PAUSE_PER_LOOK = 9.0
"""Shortest pause after a look for replies, relative to the processor's time that the look took: of the cores of a
simulation, which its clients need, a server that waits for many of them takes a tenth of one."""
LONGEST_PAUSE_SECONDS = 1.0


class PendingMessages:
    """The node of every message that has no reply yet, and when it expires."""

    def __init__(self) -> None:
        self._sent: dict[str, tuple[int, float]] = {}
        self._look_seconds = 0.0

    def __len__(self) -> int:
        return len(self._sent)

    @property
    def nodes(self) -> set[int]:
        """The nodes that have not replied."""
        return {node_id for node_id, _ in self._sent.values()}

    @property
    def pause_seconds(self) -> float:
        """Pause from the last look for replies to the next one."""
        return min(LONGEST_PAUSE_SECONDS, PAUSE_PER_LOOK * self._look_seconds)

    def push(self, grid: Grid, message: Message, seconds: float) -> bool:
        """Send a message that expires after `seconds`; whether it could be sent.

        One message per push: if one of many fails, the results of pushing differ between kinds of grid.
        """
        message_id = next(iter(grid.push_messages([message])), None)
        if message_id:
            self._sent[message_id] = message.metadata.dst_node_id, time.monotonic() + seconds
        return bool(message_id)

    def pull(self, grid: Grid) -> Iterator[tuple[int, Message | None]]:
        """(node, reply) for every reply that has come, and (node, None) for every message that has expired.

        One message per pull: pulling many would hold every reply that has arrived.
        """
        self._look_seconds = 0.0  # without what is made of the replies
        for message_id, (node_id, expires) in [*self._sent.items()]:
            began = time.thread_time()
            reply = next(iter(grid.pull_messages([message_id])), None)
            self._look_seconds += time.thread_time() - began
            if reply is not None or time.monotonic() > expires:
                del self._sent[message_id]
                yield node_id, reply
                del reply  # before the next one is pulled

    def take(self, others: "PendingMessages") -> None:
        """Wait for the replies to `others` as well."""
        self._sent |= others._sent
