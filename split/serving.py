"""One shard's process: clients attach, the shard before it hands on to it, it hands on to the next one directly.

Each client has a chain of its own through the shards: a connection to each of them, and one between each two. When its
connection ends, its link to the next shard and its texts end with it, and nothing else does.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import ssl
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from lab.device import read_memory
from lab.wire import BadFrame, Endpoint, Frame, FrameConnection, FrameServer, WireError, connect
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
"""Of one client, taken from the socket and not yet computed; beyond it the socket is not read."""


class _Done(NamedTuple):
    """What came of a message, and when (monotonic seconds)."""

    began: float
    result: Message | None
    computed: float
    coding_seconds: float


@dataclass
class _Client:
    """One client at this shard."""

    connection: FrameConnection
    """Where answers go."""
    link: FrameConnection | None = None
    """To the next shard; None at the last one."""
    hops: deque[bytes] = field(default_factory=lambda: deque(maxlen=REPORTED_PASSES))


class ShardServer:
    """Serves one stage. Belongs to its event loop; passes run on one thread of their own.

    Args:
        stage: The shard. Its thread is the server's.
        name: For people.
        model_layers: Of the whole model.
        endpoint: Our side of the wire, role `shard`, talking to clients and shards.
        next_addresses: Where the next shard may be found from here; goes before what a client says.
        client_tls: For the link to the next shard.
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
    ) -> None:
        self._stage, self._name, self._model_layers = stage, name, model_layers
        self.endpoint = endpoint
        self._next_addresses, self._client_tls = list(next_addresses), client_tls
        self._instance = secrets.randbits(32)
        self._clients: dict[int, _Client] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="forward")

    async def serve(
        self,
        *,
        host: str,
        port: int,
        max_connections: int,
        tls: ssl.SSLContext | None,
        announce: Callable[[int], None],
    ) -> None:
        """Serve until cancelled; `announce(port)` is called when it listens. Raises `OSError` for a taken address."""
        server = FrameServer(
            self.endpoint,
            self.handle,
            host=host,
            port=port,
            max_connections=max_connections,
            tls=tls,
            handle_first_protocol=None,
        )
        try:
            async with server:
                announce(server.port)
                await asyncio.get_running_loop().create_future()
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

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
            self._thread.submit(self._stage.forget, attach.client)

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
        waiting: asyncio.Queue[tuple[Frame, float]] = asyncio.Queue(WAITING_MESSAGES)
        worker = asyncio.get_running_loop().create_task(self._work(key, client, waiting))
        try:
            while True:
                frame = await connection.recv()
                if isinstance(frame.head, Ask):
                    self._report(client)
                elif isinstance(frame.head, (Open, Close, Pass, Fault)):
                    await waiting.put((frame, time.monotonic()))
                else:
                    raise BadFrame(connection.peer, f"sent {type(frame.head).__name__.upper()} after its first frame")
        finally:
            worker.cancel()

    async def _work(self, key: int, client: _Client, waiting: asyncio.Queue[tuple[Frame, float]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                frame, arrived = await waiting.get()
                message = Message(frame.session, frame.head, frame.body)
                done = await loop.run_in_executor(self._thread, self._compute, key, message)
                sent, sent_bytes = await self._hand_on(client, done.result) if done.result else (done.computed, 0)
                if isinstance(frame.head, Pass):
                    times = arrived, done.began, done.computed, sent, done.coding_seconds
                    client.hops.append(HOP.pack(frame.session, *times, sent_bytes))
        except WireError as error:
            log.info("%s", error)
            client.connection.close()
        except Exception:
            log.exception("shard %s lost a client by a fault of ours", self._name)
            client.connection.close()

    def _compute(self, key: int, message: Message) -> _Done:
        began = time.monotonic()
        result = self._stage.take(key, message)
        return _Done(began, result, time.monotonic(), self._stage.coding_seconds)

    async def _hand_on(self, client: _Client, message: Message) -> tuple[float, int]:
        """Send on; return when that began (the receiver may have it before we look at the clock again), and bytes."""
        to = client.connection if client.link is None else client.link
        await to.drain()  # before, not after: the next pass is computed while this one travels
        sent, before = time.monotonic(), to.bytes_sent
        to.send(message_type(message.head), message.number, message.head, message.body)
        return sent, to.bytes_sent - before

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
        client.connection.send(message_type(report), 0, report, b"".join(client.hops))


_TASKS: set[asyncio.Task[None]] = set()
"""An event loop keeps no strong reference to its tasks."""


def _link_fault(text: str) -> Fault:
    return Fault(code=FaultCode.link, session=0, text=text[:1024])
