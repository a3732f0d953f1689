"""The process of an inference shard: many clients, whose passes are computed one after the other.

A request for which there is no room waits in line; the line is in order of arrival.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from typing_extensions import override

from lab.wire.faults import WireError
from lab.wire.frames import Head, encode_start
from split.chain.messages import Fault, FaultCode, send
from split.chain.server import ChainServer, Client, Outgoing, Place
from split.inference.messages import Close, Open, Opened, Pass, Reopen, SetAside
from split.inference.stage import InferenceStage
from split.transport.base import Message, To

CHECK_SECONDS = 1.0
"""Seconds between two checks for idle requests while others wait for room."""


@dataclass
class _Waiting:
    """A request that waits for room."""

    client: Client
    message: Message
    """Its OPEN."""
    arrived: float
    place: int = 0
    """The last place in line that was reported to its client."""


class ShardServer(ChainServer):
    """Serves one stage.

    Args:
        awake_seconds: Time after a pass in which the next one is looked for without sleeping.
        most_waiting: Most requests in line for room; more are refused at once.
    """

    stage: InferenceStage

    phase = "session"
    most_waiting_messages = 16
    timed = (Pass,)

    def __init__(self, stage: InferenceStage, place: Place, *, awake_seconds: float, most_waiting: int) -> None:
        super().__init__(stage, place)
        self._most_waiting = most_waiting
        self._line: list[_Waiting] = []
        """The line; belongs to the thread."""
        self._is_scheduled = False
        self._awake_seconds = awake_seconds
        self._awake_until = 0.0
        self._awake: asyncio.Task[None] | None = None

    @override
    def takes(self, head: Head, origin: To) -> bool:
        return origin is not To.next and isinstance(head, (Open, Close, Pass, SetAside, Reopen, Fault))

    @override
    def do(self, client: Client, message: Message, arrived: float) -> None:
        head = message.head
        if isinstance(head, Open) and self._line and self.stage.may_wait(client.key, message.number, head):
            self._queue(client, message, arrived)
            return
        for result in self.results(client, message, arrived):
            if isinstance(head, Open) and _is_full(result.message):
                self._queue(client, message, arrived)
            else:
                self.hand_out(client, self._fitting(result))
        if isinstance(head, Close):
            self._line = [one for one in self._line if (one.client, one.message.number) != (client, message.number)]
        if isinstance(head, (Close, SetAside)):
            self._admit()

    @override
    def forget(self, key: int) -> None:
        super().forget(key)
        self._line = [waiting for waiting in self._line if waiting.client.key != key]
        self._admit()

    def _fitting(self, result: Outgoing) -> Outgoing:
        """The result, or a fault if it does not fit into a frame."""
        (number, head, body), most, table = result.message, self.endpoint.limits.payload_bytes, self.endpoint.table
        if len(body) < most - 2**16:  # no head is larger
            return result
        with contextlib.suppress(ValueError):
            if len(encode_start(table, table.number(head), number, head, len(body))) + len(body) <= most:
                return result
        text = f"network.max_frame_bytes must be at least what this pass gives, {len(body)} bytes, got {most}"
        return result._replace(message=Message(number, Fault(code=FaultCode.refused, text=text)))

    # The line, on the thread

    def _queue(self, client: Client, message: Message, arrived: float) -> None:
        """Put a request in line, behind earlier ones."""
        if len(self._line) >= self._most_waiting:
            text = f"there is no room now, and {len(self._line)} requests already wait in line, which is the most"
            self.stage.counts.refused += 1
            fault = Message(message.number, Fault(code=FaultCode.full, text=text))
            self.hand_out(client, Outgoing(self.stage.onward, fault, None))
            return
        self._line.append(_Waiting(client, message, arrived))
        self._report_places()
        self.call_on_loop(self._schedule_check)

    def _admit(self) -> None:
        """Give free room to the requests at the front of the line."""
        while self._line:
            waiting = self._line[0]
            if waiting.client.is_gone:
                del self._line[0]
                continue
            results = list(self.results(waiting.client, waiting.message, waiting.arrived))
            if any(_is_full(result.message) for result in results):
                break
            del self._line[0]
            for result in results:
                self.hand_out(waiting.client, result)
        self._report_places()

    def _report_places(self) -> None:
        for place, waiting in enumerate(self._line, 1):
            if waiting.place != place:
                waiting.place = place
                self.call_on_loop(_report_place, waiting.client, waiting.message.number, place)

    def _check_idle(self) -> None:
        self._is_scheduled = False
        self._admit()
        if self._line:
            self.call_on_loop(self._schedule_check)

    # On the loop

    def _schedule_check(self) -> None:
        """Check again later: a request that stays idle gives its room to a waiting one, without another message."""
        if not self._is_scheduled:
            self._is_scheduled = True
            self.loop.call_later(CHECK_SECONDS, self.jobs.put, self._check_idle)

    @override
    def on_computed(self, client: Client) -> None:
        super().on_computed(client)
        # A core that sleeps until the next pass takes tenths of a millisecond to work again.
        self._awake_until = time.monotonic() + self._awake_seconds
        if self._awake is None or self._awake.done():
            self._awake = self.loop.create_task(self._poll_awake())

    async def _poll_awake(self) -> None:
        """Poll for arrivals without sleeping; other processes of this core go first."""
        while not self.under_way and time.monotonic() < self._awake_until:
            _yield_core()
            await asyncio.sleep(0)


_yield_core: Callable[[], None] = getattr(os, "sched_yield", lambda: time.sleep(0))  # Windows has no sched_yield


def _is_full(result: Message) -> bool:
    return isinstance(result.head, Fault) and result.head.code is FaultCode.full


def _report_place(client: Client, number: int, place: int) -> None:
    with contextlib.suppress(WireError):
        send(client.connections[To.client], number, Opened(place=place))
