"""One shard's process: clients attach, the shard before it hands on to it, it hands on to the next one directly.

Each client has a chain of its own through the shards: a connection to each of them, and one between each two. When one
of these ends here, on whichever side, the others and its texts end with it, and so along the chain; nothing else does.

A text for which there is no room waits in line, in the order in which texts came.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import queue
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from typing_extensions import override

from lab.device import read_memory
from lab.wire import BadFrame, Endpoint, FrameConnection, WireError
from lab.wire.frames import encode_start
from split.chain.address import Address
from split.chain.messages import Ask, Attach, Fault, FaultCode, Join, send
from split.chain.server import ChainServer, tell_lost
from split.inference.messages import HOP, REPORTED_PASSES, Close, Open, Opened, Pass, Report
from split.inference.stage import Stage
from split.transport.base import Message

log = logging.getLogger(__name__)

WAITING_MESSAGES = 16
"""Of one client, taken from the socket and not yet handed on; beyond it the socket is not read."""
LOOK_SECONDS = 1.0
"""Between two looks for idle texts while others wait for their room."""


class _Done(NamedTuple):
    """What came of a message, and when (monotonic seconds)."""

    message: Message
    result: Message | None
    arrived: float
    began: float
    computed: float
    coding_seconds: float

    def hop(self, sent: float, sent_bytes: int) -> bytes:
        """As the client is told."""
        times = self.arrived, self.began, self.computed, sent, self.coding_seconds
        return HOP.pack(self.message.number, *times, sent_bytes)


@dataclass
class _Client:
    """One client at this shard."""

    key: int
    """The number that it attached with."""
    connection: FrameConnection
    """Where it hears from us."""
    link: FrameConnection | None = None
    """To the next shard; None at the last one."""
    before: FrameConnection | None = None
    """From the shard before; None at the first one."""
    hops: deque[bytes] = field(default_factory=lambda: deque(maxlen=REPORTED_PASSES))
    telling: threading.Lock = field(default_factory=threading.Lock)
    """Held while an answer leaves: who has it and asks for a report finds its pass there."""
    waiting: int = 0
    """Messages that were taken and are not computed."""
    room: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when one of them was computed, or handed on."""
    leaving: deque[_Done] = field(default_factory=deque)
    """What could not be handed on at once, and all that came of later messages: the event loop hands it on."""
    leaver: asyncio.Task[None] | None = None

    @property
    def to(self) -> FrameConnection:
        """Where results go."""
        return self.connection if self.link is None else self.link

    @property
    def is_gone(self) -> bool:
        """From any thread: whether one of its connections has ended, be it only just now and unread."""
        return any(one is not None and one.has_left for one in (self.connection, self.link, self.before))

    def end(self) -> None:
        """Close all of them; on the event loop."""
        for one in (self.connection, self.link, self.before):
            if one is not None:
                one.close()
        self.room.set()


@dataclass
class _Waiting:
    """A text that waits for room."""

    client: _Client
    message: Message
    """Its OPEN."""
    arrived: float
    place: int = 0
    """As its client was told."""


class ShardServer(ChainServer):
    """Serves one stage. Belongs to its event loop; passes run on one thread of their own, which also hands on what came
    of them: between the arrival of hidden states and the departure of the next ones the event loop is woken once.

    Args:
        stage: The shard. Its thread is the server's.
        name: For people.
        model_layers: Of the whole model.
        endpoint: Our side of the wire, role `shard`, talking to clients and shards.
        next_addresses: Where the next shard may be found from here; goes before what a client says.
        client_tls: For the link to the next shard.
        awake_seconds: For so long after a pass the next one is looked for without sleeping.
        most_waiting: Texts in line for room; more are refused at once.
    """

    def __init__(
        self,
        stage: Stage,
        *,
        name: str,
        model_layers: int,
        endpoint: Endpoint,
        next_addresses: Sequence[Address],
        client_tls: ssl.SSLContext | None,
        awake_seconds: float,
        most_waiting: int,
    ) -> None:
        super().__init__(
            layers=stage.shard.layers,
            model_layers=model_layers,
            endpoint=endpoint,
            next_addresses=next_addresses,
            client_tls=client_tls,
        )
        self._stage, self._name = stage, name
        self._most_waiting = most_waiting
        self.clients = 0
        """That have attached."""
        self._gone: deque[int] = deque()
        """Clients whose texts are to be forgotten, before anything else is computed."""
        self._line: list[_Waiting] = []
        """Of the thread."""
        self._is_looking = False
        self._clients: dict[int, _Client] = {}
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        """Of the thread, in turn; None ends it."""
        self._loop: asyncio.AbstractEventLoop
        self._awake_seconds = awake_seconds
        self._awake_until = 0.0
        self._awake: asyncio.Task[None] | None = None
        self._under_way = 0

    @override
    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._work, name="forward").start()
        try:
            yield
        finally:
            self._jobs.put(None)

    # A client

    @override
    async def serve_client(self, connection: FrameConnection, attach: Attach) -> None:
        if attach.client in self._clients:
            raise BadFrame(connection.peer, "attached twice")
        client = self._clients[attach.client] = _Client(attach.client, connection)
        self.clients += 1
        self._end_with(client, connection)
        try:
            if not self._stage.shard.gives_steps:
                client.link = await self.join_next(connection, attach)
                self._watch(client, client.link)
            self._welcome(connection)
            await self._take_all(client, connection)
        except WireError as error:
            connection.refuse(error)  # before it is closed with the others
            raise
        finally:
            del self._clients[attach.client]
            client.end()
            self._gone.append(attach.client)
            self._jobs.put(self._forget_gone)

    def _watch(self, client: _Client, link: FrameConnection) -> None:
        """The next shard says nothing on a link; when it ends, the client is to know why."""

        async def wait() -> None:
            try:
                frame = await link.recv()
                reason = f"{link.peer} sent {type(frame.head).__name__.upper()} to the shard before it"
            except WireError as error:
                reason = str(error)
            self._part(client, reason)

        _start(wait())

    @staticmethod
    def _end_with(client: _Client, connection: FrameConnection) -> None:
        """Whatever else is waited for: when this connection ends, the client does."""

        async def wait() -> None:
            await connection.wait_ended()
            client.end()

        _start(wait())

    @staticmethod
    def _part(client: _Client, reason: str) -> None:
        """A neighbour of this client's chain is lost: it is told, and all that it has here ends."""
        if not client.connection.has_left:
            log.warning("%s", reason)
            with contextlib.suppress(WireError):
                tell_lost(client.connection, reason)
        client.end()

    # A chain

    @override
    async def serve_previous(self, connection: FrameConnection, join: Join) -> None:
        client = self._clients.get(join.client)
        if client is None or client.before is not None:
            raise BadFrame(connection.peer, "joined for a client that is not attached, or is joined already")
        client.before = connection
        self._end_with(client, connection)
        self._welcome(connection)
        try:
            await self._take_all(client, connection)
        except WireError as error:
            self._part(client, str(error))
            raise

    async def _take_all(self, client: _Client, connection: FrameConnection) -> None:
        """Read and compute at the same time: messages that wait show as queueing, not as the wire's time."""
        while True:
            frame = await connection.recv()
            if client.connection.fault is not None:  # what came before is of no use to anybody
                raise client.connection.fault
            if isinstance(frame.head, Ask):
                self._report(client)
            elif isinstance(frame.head, (Open, Close, Pass, Fault)):
                message = Message(frame.session, frame.head, frame.body)
                client.waiting += 1
                self._under_way += 1
                self._jobs.put(functools.partial(self._compute, client, message, time.monotonic()))
                while client.connection.fault is None and client.waiting + len(client.leaving) >= WAITING_MESSAGES:
                    client.room.clear()
                    await client.room.wait()
            else:
                raise BadFrame(connection.peer, f"sent {type(frame.head).__name__.upper()} after its first frame")

    # On the thread

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._forget_gone()
                job()
            except Exception:
                log.exception("shard %s goes on after a fault of ours", self._name)

    def _forget_gone(self) -> None:
        """Whoever has left goes before everybody's messages, its own included: its room is another's now."""
        while self._gone:
            key = self._gone.popleft()
            self._stage.forget(key)
            self._line = [waiting for waiting in self._line if waiting.client.key != key]
            self._admit()

    def _compute(self, client: _Client, message: Message, arrived: float) -> None:
        """The result leaves from here where it can, before the event loop has woken."""
        if client.is_gone:  # nobody waits for it
            self._stage.forget(client.key)
            self._tell_loop(client.end)
        elif isinstance(message.head, Open) and self._line:
            self._queue(client, message, arrived)
        else:
            self._do(client, message, arrived)
        self._tell_loop(self._after, client)

    def _do(self, client: _Client, message: Message, arrived: float) -> None:
        began = time.monotonic()
        result = self._fitting(self._stage.take(client.key, message))
        if isinstance(message.head, Open) and result is not None and _is_full(result):
            self._queue(client, message, arrived)
            return
        if isinstance(message.head, Close):
            self._line = [one for one in self._line if (one.client, one.message.number) != (client, message.number)]
        self._hand_out(client, _Done(message, result, arrived, began, time.monotonic(), self._stage.coding_seconds))
        if isinstance(message.head, Close):
            self._admit()

    def _fitting(self, result: Message | None) -> Message | None:
        """A result that fits a frame, or why it does not."""
        most = self.endpoint.limits.payload_bytes
        if result is None or len(result.body) < most - 2**16:  # no head is larger
            return result
        try:
            table = self.endpoint.table
            start = encode_start(table, table.number(result.head), result.number, result.head, len(result.body))
            fits = len(start) + len(result.body) <= most
        except ValueError:
            fits = False
        if fits:
            return result
        text = f"network.max_frame_bytes must be at least what this pass gives, {len(result.body)} bytes, got {most}"
        return Message(result.number, Fault(code=FaultCode.refused, text=text))

    def _hand_out(self, client: _Client, done: _Done) -> None:
        try:
            with client.telling:
                sent_bytes = self._send_at_once(client, done)
                if done.result is not None and not sent_bytes:
                    client.leaving.append(done)
                elif isinstance(done.message.head, Pass):
                    client.hops.append(done.hop(done.computed, sent_bytes))
        except WireError as error:
            log.info("%s", error)
            self._tell_loop(client.end)

    def _tell_loop(self, call: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # it is closed: the server has ended
            self._loop.call_soon_threadsafe(call, *arguments)

    @staticmethod
    def _send_at_once(client: _Client, done: _Done) -> int:
        """Hand on; the bytes, 0 where it must wait for its turn."""
        result = done.result
        if result is None or client.leaving:
            return 0
        to = client.to
        return to.send_at_once(to.endpoint.table.number(result.head), result.number, result.head, result.body)

    # The line, on the thread

    def _queue(self, client: _Client, message: Message, arrived: float) -> None:
        """A text waits for room behind those that came before."""
        if len(self._line) >= self._most_waiting:
            text = f"there is no room now, and {len(self._line)} texts wait in line already, which is the most"
            result = Message(message.number, Fault(code=FaultCode.full, text=text))
            self._stage.counts.refused += 1
            self._hand_out(client, _Done(message, result, arrived, arrived, arrived, 0.0))
            return
        self._line.append(_Waiting(client, message, arrived))
        self._tell_places()
        self._tell_loop(self._look_again)

    def _admit(self) -> None:
        """Texts from the front of the line get what room there is."""
        while self._line:
            waiting = self._line[0]
            if waiting.client.is_gone:
                del self._line[0]
                continue
            began = time.monotonic()
            result = self._stage.take(waiting.client.key, waiting.message)
            if result is not None and _is_full(result):
                break
            del self._line[0]
            done = _Done(waiting.message, result, waiting.arrived, began, time.monotonic(), 0.0)
            self._hand_out(waiting.client, done)
            self._tell_loop(self._after_admission, waiting.client)
        self._tell_places()

    def _tell_places(self) -> None:
        for place, waiting in enumerate(self._line, 1):
            if waiting.place != place:
                waiting.place = place
                self._tell_loop(_tell_place, waiting.client, waiting.message.number, place)

    # On the loop again

    def _after_admission(self, client: _Client) -> None:
        if client.leaving and (client.leaver is None or client.leaver.done()):
            client.leaver = self._loop.create_task(self._hand_on(client))

    def _look_again(self) -> None:
        """A text that is idle for long enough gives its room to one that waits, although nothing else happens."""
        if not self._is_looking:
            self._is_looking = True
            self._loop.call_later(LOOK_SECONDS, self._jobs.put, self._look)

    def _look(self) -> None:
        self._is_looking = False
        self._admit()
        if self._line:
            self._tell_loop(self._look_again)

    def _after(self, client: _Client) -> None:
        self._under_way -= 1
        self._after_admission(client)
        client.waiting -= 1
        client.room.set()
        self._stay_awake()

    async def _hand_on(self, client: _Client) -> None:
        """Send what could not leave at once, while the thread goes on."""
        to = client.to
        try:
            while client.leaving:
                await to.drain()  # before, not after: the next pass is computed while this one travels
                done = client.leaving[0]
                assert done.result is not None
                # When it began: the receiver may have it before we look at the clock again.
                sent, before = time.monotonic(), to.bytes_sent
                send(to, done.result.number, done.result.head, done.result.body)
                if isinstance(done.message.head, Pass):
                    client.hops.append(done.hop(sent, to.bytes_sent - before))
                client.leaving.popleft()
                client.room.set()
        except WireError as error:
            log.info("%s", error)
            client.end()

    def _stay_awake(self) -> None:
        """A core that sleeps until the next pass takes tenths of a millisecond to be at work again."""
        self._awake_until = time.monotonic() + self._awake_seconds
        if self._awake is None or self._awake.done():
            self._awake = self._loop.create_task(self._look_around())

    async def _look_around(self) -> None:
        """Ask the system for what has arrived, again and again; whoever else wants this core goes first."""
        while not self._under_way and time.monotonic() < self._awake_until:
            _yield_core()
            await asyncio.sleep(0)

    def _welcome(self, connection: FrameConnection) -> None:
        limits = self._stage.shard.limits
        self.welcome(connection, "session", context=limits.context, sessions=limits.sessions)

    def _report(self, client: _Client) -> None:
        shard = self._stage.shard
        memory = read_memory(shard.device)
        report = Report(
            clock_seconds=time.monotonic(),
            name=self._name,
            device=str(shard.device),
            weights_bytes=shard.weights_bytes,
            kv_bytes=shard.cache.allocated_bytes,
            rss_bytes=memory.rss_bytes,
            peak_rss_bytes=memory.peak_rss_bytes,
            device_memory_used_bytes=memory.device_used_bytes,
            device_memory_total_bytes=memory.device_total_bytes,
        )
        with client.telling:
            hops = b"".join(client.hops)
        send(client.connection, 0, report, hops)


_yield_core: Callable[[], None] = getattr(os, "sched_yield", lambda: time.sleep(0))  # Windows has no sched_yield

_TASKS: set[asyncio.Task[None]] = set()
"""An event loop keeps no strong reference to its tasks."""


def _start(work: Coroutine[None, None, None]) -> None:
    task = asyncio.get_running_loop().create_task(work)
    _TASKS.add(task)
    task.add_done_callback(_TASKS.discard)


def _is_full(result: Message) -> bool:
    return isinstance(result.head, Fault) and result.head.code is FaultCode.full


def _tell_place(client: _Client, number: int, place: int) -> None:
    with contextlib.suppress(WireError):
        send(client.connection, number, Opened(place=place))
