"""A shard's process in the chain: clients attach, the shard before sends to it, and it sends to the next one.

Each client has its own chain through the shards: a connection to each of them, and one between neighbours. When one of
these ends at this shard, on either side, the client's other connections end with it, and what the shard holds for the
client is dropped; the same then happens along the chain. Other clients are not affected.
"""

import asyncio
import contextlib
import functools
import logging
import queue
import secrets
import ssl
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, NoReturn

from lab.wire.endpoint import Endpoint
from lab.wire.faults import BadFrame, PeerSilent, WireError
from lab.wire.frame_connection import FrameConnection, connect
from lab.wire.frames import Head, encode_start
from split.chain.address import Address
from split.chain.messages import Ask, Attach, Fault, FaultCode, Join, Welcome, send
from split.transport.base import REPORTED_PASSES, Hop, Message, Stage, To, welcome_of

log = logging.getLogger(__name__)

GONE_SECONDS = 0.5
"""Seconds between two checks for a client's end while its results wait to be sent."""


class Outgoing(NamedTuple):
    """A result that is to be sent."""

    to: To
    message: Message
    hop: Hop | None
    """Times of the pass that gave it, without `sent` and `sent_bytes`; None for other messages."""


@dataclass(eq=False)
class Client:
    """One client at this shard."""

    key: int
    """The number in its ATTACH."""
    connections: dict[To, FrameConnection]
    """Connections to the client and to our neighbours in its chain."""
    hops: deque[bytes] = field(default_factory=lambda: deque(maxlen=REPORTED_PASSES))
    send_lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while an answer is sent: a client that has the answer and asks for a report finds its pass in it."""
    waiting: int = 0
    """Messages that were received and are not computed yet."""
    room: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when one of them was computed, or passed on."""
    unsent: deque[Outgoing] = field(default_factory=deque)
    """Results that could not be sent at once, and all later ones: the event loop sends them."""
    all_sent: threading.Event = field(default_factory=threading.Event)
    """Set while there are none of these."""
    sender: asyncio.Task[None] | None = None

    @property
    def is_gone(self) -> bool:
        """Whether one of its connections has ended, even if nobody has read that yet; from any thread."""
        return any(one.has_left for one in tuple(self.connections.values()))

    def wait_until_sent(self) -> bool:
        """Wait until no result is waiting to be sent, on the thread that computes; False if the client has gone."""
        while not self.all_sent.wait(GONE_SECONDS):
            if self.is_gone:
                return False
        return not self.is_gone

    def end(self) -> None:
        """Close all connections; on the event loop."""
        for one in self.connections.values():
            one.close()
        self.room.set()
        self.all_sent.set()


@dataclass(frozen=True, kw_only=True)
class Place:
    """A shard's position in its chain, and how it reaches the others."""

    name: str
    """Name of the shard, for messages."""
    model_layers: int
    """Layers of the whole model."""
    endpoint: Endpoint
    """Our side of the wire, talking to clients and shards."""
    next_addresses: Sequence[Address]
    """Address of the next shard from here; tried before those that a client sends."""
    client_tls: ssl.SSLContext | None
    """TLS of the connection to the next shard."""


class ChainServer(ABC):
    """Serves one stage over tcp. Belongs to its event loop; the stage works on a separate thread, which also sends the
    results: so the loop wakes only once between the arrival of hidden states and the departure of the next ones.
    """

    phase: str
    """Name of the phase after ATTACH or JOIN, in errors."""
    most_waiting_messages: int
    """Messages of one client that were read and not computed; with more, its socket is not read."""
    timed: tuple[type[Head], ...] = ()
    """Messages of which a client can ask for the times."""

    def __init__(self, stage: Stage, place: Place) -> None:
        self.stage, self.place, self.endpoint = stage, place, place.endpoint
        self._to_next = replace(self.endpoint, peer_roles=frozenset({self.endpoint.role}))
        self._instance = secrets.randbits(32)
        self.attached = 0
        """Clients that have attached so far."""
        self.clients: dict[int, Client] = {}
        self.jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        """Work of the thread, in order; None ends it."""
        self._gone: deque[int] = deque()
        """Clients that have left, to be forgotten."""
        self.under_way = 0
        """Number of messages of all clients that are not computed yet."""
        self.loop: asyncio.AbstractEventLoop

    @abstractmethod
    def takes(self, head: Head, origin: To) -> bool:
        """Whether this server accepts such a message from there."""

    def check_attaching(self, connection: FrameConnection, attach: Attach) -> None:
        """Raises a `WireError` for a client that cannot be served at the moment."""
        if attach.client in self.clients:
            raise BadFrame(connection.peer, "attached twice")

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Run the thread until the end of the block, within a running event loop."""
        self.loop = asyncio.get_running_loop()
        threading.Thread(target=self._work, name="stage").start()
        try:
            yield
        finally:
            self.jobs.put(None)

    async def handle(self, connection: FrameConnection) -> None:
        """Serve one connection until it ends."""
        head = await _first_head(connection)
        if isinstance(head, Attach):
            await self._serve_client(connection, head)
        elif isinstance(head, Join):
            await self._serve_previous(connection, head)
        else:
            raise BadFrame(connection.peer, f"began with {type(head).__name__.upper()}, not with ATTACH or JOIN")

    # Connections

    async def _serve_client(self, connection: FrameConnection, attach: Attach) -> None:
        connection.peer.phase = "ATTACH"
        self.check_attaching(connection, attach)
        client = self.clients[attach.client] = Client(attach.client, {To.client: connection})
        client.all_sent.set()
        self.attached += 1
        self._end_with(client, connection)
        try:
            if self.stage.layers.stop < self.place.model_layers:
                link = client.connections[To.next] = await self._join_next(connection, attach)
                _start(self._serve_neighbour(client, link, To.next))
            self._welcome(connection)
            await self._take_all(client, connection, To.client)
        except WireError as error:
            connection.refuse(error)  # before all of them are closed
            raise
        finally:
            del self.clients[attach.client]
            client.end()
            self._gone.append(attach.client)
            self.jobs.put(self._forget_gone)

    async def _serve_previous(self, connection: FrameConnection, join: Join) -> None:
        client = self.clients.get(join.client)
        if client is None or To.previous in client.connections:
            raise BadFrame(connection.peer, "joined for a client that is not attached, or is joined already")
        client.connections[To.previous] = connection
        self._end_with(client, connection)
        self._welcome(connection)
        raise await self._serve_neighbour(client, connection, To.previous)

    async def _serve_neighbour(self, client: Client, connection: FrameConnection, origin: To) -> WireError:
        """Serve a neighbour; returns why its connection ended. By then the client knows, and all it has here ended."""
        try:
            await self._take_all(client, connection, origin)
        except WireError as error:
            own = client.connections[To.client]
            if not own.has_left:
                log.warning("%s", error)
                with contextlib.suppress(WireError):
                    tell_lost(own, str(error))
            client.end()
            return error

    @staticmethod
    def _end_with(client: Client, connection: FrameConnection) -> None:
        """End the client when this connection ends, whatever its other tasks are waiting for."""

        async def wait() -> None:
            await connection.wait_ended()
            client.end()

        _start(wait())

    async def _take_all(self, client: Client, connection: FrameConnection, origin: To) -> NoReturn:
        """Read while the thread computes, so that a waiting message counts as queueing, not as time on the wire."""
        own = client.connections[To.client]
        while True:
            frame = await connection.recv()
            if own.fault is not None:  # its earlier messages have no reader
                raise own.fault
            if isinstance(frame.head, Ask):
                self._report(client)
            elif self.takes(frame.head, origin):
                message = Message(frame.session, frame.head, frame.body)
                client.waiting += 1
                self.under_way += 1
                self.jobs.put(functools.partial(self._compute, client, message, time.monotonic()))
                while own.fault is None and client.waiting + len(client.unsent) >= self.most_waiting_messages:
                    client.room.clear()
                    await client.room.wait()
            else:
                raise BadFrame(connection.peer, f"sent {type(frame.head).__name__.upper()} after its first frame")

    def _welcome(self, connection: FrameConnection) -> None:
        send(connection, 0, welcome_of(self.stage, self.place.model_layers, self._instance))
        connection.peer.phase = self.phase

    def _report(self, client: Client) -> None:
        figures = self.stage.figures(self.place.name)
        with client.send_lock:
            hops = b"".join(client.hops)
        send(client.connections[To.client], 0, figures, hops)

    # The next shard

    async def _join_next(self, client: FrameConnection, attach: Attach) -> FrameConnection:
        """Connect to the next shard that a client names. The client is notified if that fails; the attempt ends when it
        leaves.

        Raises:
            WireError: the client left, or the next shard is not there.
        """
        joining = asyncio.ensure_future(self._try_next(client, attach))
        ended = asyncio.ensure_future(client.wait_ended())
        try:
            await asyncio.wait((joining, ended), return_when=asyncio.FIRST_COMPLETED)
            if joining.done():
                return joining.result()
            raise client.fault or BadFrame(client.peer, "left")
        finally:
            for task in (joining, ended):
                task.cancel()

    async def _try_next(self, client: FrameConnection, attach: Attach) -> FrameConnection:
        reasons = []
        for address in [*self.place.next_addresses, *_addresses(client, attach)]:
            try:
                link = await connect(address.host, address.port, self._to_next, tls=self.place.client_tls)
            except WireError as error:
                reasons.append(str(error))
                continue
            try:
                if await _is_meant(link, attach):
                    return link
                reasons.append(f"{address} is another shard than the next one that is meant")
            except (WireError, TimeoutError) as error:
                reasons.append(str(error) or f"{address} did not answer JOIN")
            except asyncio.CancelledError:
                link.close()
                raise
            link.close()
        ends = f"layers must end at the model's {self.place.model_layers}, got {self.stage.layers.stop}"
        text = "the next shard is not there: " + ("; ".join(reasons) or f"{ends}; project.next is not set")
        tell_lost(client, text)
        raise BadFrame(client.peer, text)

    # On the thread

    def _work(self) -> None:
        while (job := self.jobs.get()) is not None:
            try:
                self._forget_gone()
                job()
            except Exception:
                log.exception("shard %s continues after a fault of ours", self.place.name)

    def _forget_gone(self) -> None:
        """Forget clients that have left before computing any message, even theirs: others may have their room."""
        while self._gone:
            self.forget(self._gone.popleft())

    def forget(self, key: int) -> None:
        """Drop what is held for a client."""
        self.stage.forget(key)

    def _compute(self, client: Client, message: Message, arrived: float) -> None:
        try:
            if client.is_gone:  # its results have no reader
                self.stage.forget(client.key)
                self.call_on_loop(client.end)
            else:
                self.do(client, message, arrived)
        except Exception:
            self.call_on_loop(client.end)
            raise
        finally:
            self.call_on_loop(self.on_computed, client)

    def do(self, client: Client, message: Message, arrived: float) -> None:
        """Compute a message and send its results; the next message is computed while they travel."""
        for place, result in enumerate(self.results(client, message, arrived)):
            if place and not client.wait_until_sent():
                return
            self.hand_out(client, result)

    def results(self, client: Client, message: Message, arrived: float) -> Iterator[Outgoing]:
        """Results of the stage for a message."""
        began = time.monotonic()
        for to, result in self.stage.take(message, client.key):
            computed = time.monotonic()
            hop = Hop(arrived, began, computed, computed, self.stage.coding_seconds, 0)
            yield Outgoing(to, result, hop if isinstance(message.head, self.timed) else None)

    def hand_out(self, client: Client, result: Outgoing) -> None:
        """Send a result; from the thread if possible, which saves waking the event loop."""
        to, (number, head, body), hop = result
        connection = client.connections[to]
        kind = self.endpoint.table.number(head)
        try:
            with client.send_lock:
                sent_bytes = 0 if client.unsent else connection.send_at_once(kind, number, head, body)
                waits = not sent_bytes
                if waits:
                    sent_bytes = len(encode_start(self.endpoint.table, kind, number, head, len(body))) + len(body)
                if to is not To.client:
                    self.stage.boundary_bytes += sent_bytes
                hop = hop and hop._replace(sent_bytes=sent_bytes)
                if waits:
                    client.all_sent.clear()
                    client.unsent.append(result._replace(hop=hop))
                    self.call_on_loop(self._start_sending, client)
                else:
                    _note(client, number, hop)
        except WireError as error:
            log.info("%s", error)
            self.call_on_loop(client.end)

    def call_on_loop(self, call: Callable[..., None], *arguments: object) -> None:
        """Call something on the event loop."""
        with contextlib.suppress(RuntimeError):  # it is closed: the server has ended
            self.loop.call_soon_threadsafe(call, *arguments)

    # On the event loop

    def on_computed(self, client: Client) -> None:
        """A message of this client was computed."""
        self.under_way -= 1
        client.waiting -= 1
        client.room.set()

    def _start_sending(self, client: Client) -> None:
        if client.unsent and (client.sender is None or client.sender.done()):
            client.sender = self.loop.create_task(self._send_unsent(client))

    async def _send_unsent(self, client: Client) -> None:
        """Send what could not be sent at once, while the thread computes."""
        try:
            while client.unsent:
                to, message, hop = client.unsent[0]
                connection = client.connections[to]
                await connection.drain()  # before, not after: the next pass is computed while this one travels
                # The time before sending: the receiver may have it before we read the clock again.
                sent = time.monotonic()
                send(connection, *message)
                _note(client, message.number, hop and hop._replace(sent=sent))
                with client.send_lock:
                    client.unsent.popleft()
                    if not client.unsent:
                        client.all_sent.set()
                client.room.set()
        except WireError as error:
            log.info("%s", error)
            client.end()


_TASKS: set[asyncio.Task[Any]] = set()
"""An event loop keeps no strong reference to its tasks."""


def _start(work: Coroutine[None, None, Any]) -> None:
    task = asyncio.get_running_loop().create_task(work)
    _TASKS.add(task)
    task.add_done_callback(_TASKS.discard)


def _note(client: Client, number: int, hop: Hop | None) -> None:
    if hop is not None:
        client.hops.append(hop.pack(number))


async def _first_head(connection: FrameConnection) -> Any:
    """The first frame's head. Raises `PeerSilent` for a peer that connects and sends nothing."""
    seconds = connection.endpoint.deadlines.handshake_seconds
    try:
        async with asyncio.timeout(seconds):
            return (await connection.recv()).head
    except TimeoutError:
        raise PeerSilent(connection.peer, f"sent no first frame within {seconds:g} s") from None


async def _is_meant(link: FrameConnection, attach: Attach) -> bool:
    send(link, 0, Join(client=attach.client))
    async with asyncio.timeout(link.endpoint.deadlines.handshake_seconds):
        welcome = (await link.recv()).head
    if not isinstance(welcome, Welcome) or welcome.instance != attach.next_instance:
        return False
    link.peer.phase = f"layers {welcome.first}:{welcome.last}"
    return True


def _addresses(client: FrameConnection, attach: Attach) -> list[Address]:
    try:
        return [Address.parse(text) for text in attach.next]
    except ValueError as error:
        raise BadFrame(client.peer, f"sent ATTACH with an address that {error}") from None


def tell_lost(client: FrameConnection, text: str) -> None:
    """Tell a client that its chain is broken at this shard."""
    send(client, 0, Fault(code=FaultCode.link, text=text[:1024]))
