"""One shard's process: clients attach, the shard before it hands on to it, it hands on to the next one directly.

Each client has a chain of its own through the shards: a connection to each of them, and one between each two. When its
connection ends, its link to the next shard and its texts end with it, and nothing else does.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import queue
import secrets
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from lab.device import read_memory
from lab.wire import BadFrame, Endpoint, FrameConnection, WireError, connect
from split.address import Address
from split.messages import (
    HOP,
    REPORTED_PASSES,
    Ask,
    Attach,
    Close,
    Fault,
    FaultCode,
    Join,
    Open,
    Pass,
    Report,
    Welcome,
    message_type,
)
from split.stage import Stage
from split.transport.base import Message

log = logging.getLogger(__name__)

WAITING_MESSAGES = 16
"""Of one client, taken from the socket and not yet handed on; beyond it the socket is not read."""


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

    connection: FrameConnection
    """Where answers go."""
    link: FrameConnection | None = None
    """To the next shard; None at the last one."""
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


class ShardServer:
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
    ) -> None:
        self._stage, self._name, self._model_layers = stage, name, model_layers
        self.endpoint = endpoint
        self._next_addresses, self._client_tls = list(next_addresses), client_tls
        self._instance = secrets.randbits(32)
        self._clients: dict[int, _Client] = {}
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        """Of the thread, in turn; None ends it."""
        self._loop: asyncio.AbstractEventLoop
        self._awake_seconds = awake_seconds
        self._awake_until = 0.0
        self._awake: asyncio.Task[None] | None = None
        self._under_way = 0

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Its thread works as long as the block lasts."""
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._work, name="forward").start()
        try:
            yield
        finally:
            self._jobs.put(None)

    async def handle(self, connection: FrameConnection) -> None:
        """One connection, until it ends."""
        head = (await connection.recv()).head
        if isinstance(head, Attach):
            await self._serve_client(connection, head)
        elif isinstance(head, Join):
            await self._serve_link(connection, head)
        else:
            raise BadFrame(connection.peer, f"began with {type(head).__name__.upper()}, not with ATTACH or JOIN")

    # A client

    async def _serve_client(self, connection: FrameConnection, attach: Attach) -> None:
        connection.peer.phase = "ATTACH"
        if attach.client in self._clients:
            raise BadFrame(connection.peer, "attached twice")
        client = self._clients[attach.client] = _Client(connection)
        try:
            if not self._stage.shard.gives_steps:
                await self._join_next(client, attach)
            connection.send(message_type(self._welcome()), 0, self._welcome())
            connection.peer.phase = "session"
            await self._take_all(attach.client, client, connection)
        finally:
            del self._clients[attach.client]
            if client.link is not None:
                client.link.close()
            self._jobs.put(functools.partial(self._stage.forget, attach.client))

    async def _join_next(self, client: _Client, attach: Attach) -> None:
        """Connect to the process that the client means. The client is told when that cannot be."""
        reasons = []
        for address in [*self._next_addresses, *(Address.parse(text) for text in attach.next)]:
            try:
                link = await connect(address.host, address.port, self._link_endpoint(), tls=self._client_tls)
            except WireError as error:
                reasons.append(str(error))
                continue
            link.send(message_type(Join(client=0)), 0, Join(client=attach.client))
            welcome = (await link.recv()).head
            if isinstance(welcome, Welcome) and welcome.instance == attach.next_instance:
                client.link = link
                link.peer.phase = f"layers {welcome.first}:{welcome.last}"
                self._watch(client, link)
                return
            reasons.append(f"{address} is another shard than the client's next one")
            link.close()
        layers = self._stage.shard.layers
        nobody = f"layers must end at the model's {self._model_layers}, got {layers.stop}; project.next is not set"
        text = "the next shard is not there: " + ("; ".join(reasons) or nobody)
        client.connection.send(message_type(_link_fault("")), 0, _link_fault(text))
        raise BadFrame(client.connection.peer, text)

    def _watch(self, client: _Client, link: FrameConnection) -> None:
        """The next shard says nothing on a link; when it ends, the client is to know why."""

        async def wait() -> None:
            try:
                frame = await link.recv()
                link.close()
                reason = f"{link.peer} sent {type(frame.head).__name__.upper()} to the shard before it"
            except WireError as error:
                reason = str(error)
            if client.connection.fault is None:
                log.warning("%s", reason)
                client.connection.send(message_type(_link_fault("")), 0, _link_fault(reason))

        task = asyncio.get_running_loop().create_task(wait())
        _TASKS.add(task)
        task.add_done_callback(_TASKS.discard)

    def _link_endpoint(self) -> Endpoint:
        return replace(self.endpoint, peer_roles=frozenset({"shard"}))

    # A chain

    async def _serve_link(self, connection: FrameConnection, join: Join) -> None:
        client = self._clients.get(join.client)
        if client is None:
            raise BadFrame(connection.peer, "joined for a client that is not attached")
        connection.send(message_type(self._welcome()), 0, self._welcome())
        connection.peer.phase = "session"
        await self._take_all(join.client, client, connection)

    async def _take_all(self, key: int, client: _Client, connection: FrameConnection) -> None:
        """Read and compute at the same time: messages that wait show as queueing, not as the wire's time."""
        while True:
            frame = await connection.recv()
            if isinstance(frame.head, Ask):
                self._report(client)
            elif isinstance(frame.head, (Open, Close, Pass, Fault)):
                message = Message(frame.session, frame.head, frame.body)
                client.waiting += 1
                self._under_way += 1
                self._jobs.put(functools.partial(self._compute, key, client, message, time.monotonic()))
                while client.waiting + len(client.leaving) >= WAITING_MESSAGES:
                    client.room.clear()
                    await client.room.wait()
            else:
                raise BadFrame(connection.peer, f"sent {type(frame.head).__name__.upper()} after its first frame")

    # On the thread

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _compute(self, key: int, client: _Client, message: Message, arrived: float) -> None:
        """The result leaves from here where it can, before the event loop has woken."""
        if client.connection.fault is not None:  # nobody waits for it
            self._tell_loop(self._after, client)
            return
        try:
            began = time.monotonic()
            result = self._stage.take(key, message)
            done = _Done(message, result, arrived, began, time.monotonic(), self._stage.coding_seconds)
            with client.telling:
                sent_bytes = self._send_at_once(client, result)
                if result is not None and not sent_bytes:
                    client.leaving.append(done)
                elif isinstance(message.head, Pass):
                    client.hops.append(done.hop(done.computed, sent_bytes))
        except WireError as error:
            log.info("%s", error)
            self._tell_loop(client.connection.close)
        except Exception:
            log.exception("shard %s lost a client by a fault of ours", self._name)
            self._tell_loop(client.connection.close)
        self._tell_loop(self._after, client)

    def _tell_loop(self, call: Callable[..., None], *arguments: _Client) -> None:
        with contextlib.suppress(RuntimeError):  # it is closed: the server has ended
            self._loop.call_soon_threadsafe(call, *arguments)

    @staticmethod
    def _send_at_once(client: _Client, result: Message | None) -> int:
        """Hand on; the bytes, 0 where it must wait for its turn."""
        if result is None or client.leaving:
            return 0
        return client.to.send_at_once(message_type(result.head), result.number, result.head, result.body)

    # On the loop again

    def _after(self, client: _Client) -> None:
        self._under_way -= 1
        if client.leaving and (client.leaver is None or client.leaver.done()):
            client.leaver = self._loop.create_task(self._hand_on(client))
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
                to.send(message_type(done.result.head), done.result.number, done.result.head, done.result.body)
                if isinstance(done.message.head, Pass):
                    client.hops.append(done.hop(sent, to.bytes_sent - before))
                client.leaving.popleft()
                client.room.set()
        except WireError as error:
            log.info("%s", error)
            client.connection.close()

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

    def _welcome(self) -> Welcome:
        shard = self._stage.shard
        return Welcome(
            instance=self._instance,
            first=shard.layers.start,
            last=shard.layers.stop,
            model_layers=self._model_layers,
            context=shard.limits.context,
            sessions=shard.limits.sessions,
        )

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
        client.connection.send(message_type(report), 0, report, hops)


_yield_core: Callable[[], None] = getattr(os, "sched_yield", lambda: time.sleep(0))  # Windows has no sched_yield

_TASKS: set[asyncio.Task[None]] = set()
"""An event loop keeps no strong reference to its tasks."""


def _link_fault(text: str) -> Fault:
    return Fault(code=FaultCode.link, text=text[:1024])
