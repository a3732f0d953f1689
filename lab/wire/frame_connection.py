"""The asyncio end of a wire: one connection of a server, or of a server that connects to the next one."""

import asyncio
import os
import ssl
import threading
from collections import deque

from lab.wire.conversation import Conversation
from lab.wire.endpoint import Endpoint
from lab.wire.faults import Peer, PeerGone, PeerSilent, WireError, unreachable
from lab.wire.frames import Buffer, Frame, Head, encode
from lab.wire.listener import explain_hangup, tls_refused
from lab.wire.peer_connection import PeerConnection
from lab.wire.waiting import has_ended


class FrameConnection(PeerConnection, asyncio.BufferedProtocol):
    """Frames over an asyncio transport. Belongs to its loop; other threads may only `send_at_once`.

    A callback protocol rather than asyncio streams: it reads into one buffer that is used again, and a received frame
    wakes its reader at once. When the application does not take its frames, the socket is not read.
    """

    def __init__(self, endpoint: Endpoint, *, listening: bool) -> None:
        super().__init__(endpoint, Peer(role=endpoint.expected_role, address="?", phase="connect"))
        self._listening = listening
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._writing = threading.Lock()
        self._descriptor: int | None = None  # the socket, while it is open
        self._direct: int | None = None  # the same, where a thread may write to it past the transport
        self._rest = b""  # of a frame that a thread began to write
        self._backlog: deque[Frame] = deque()
        self._backlog_bytes = 0
        self._reading = True
        self._reader: asyncio.Future[None] | None = None  # the one task that waits for a frame
        self._room = asyncio.Event()  # set while the transport takes what we write
        self._room.set()
        self._closed = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()  # before `_closed`, which waits for what leaves
        self._tick: asyncio.TimerHandle | None = None

    # For the application

    async def shake_hands(self) -> None:
        """Wait for the end of the handshake; to be called once, before anything else. Raises a `WireError`."""
        seconds = self.endpoint.deadlines.handshake_seconds
        try:
            async with asyncio.timeout(seconds):
                while self._conversation.agreed is None:
                    await self._wake()
        except TimeoutError:
            raise self._fail(PeerSilent(self.peer, f"did not finish the handshake in {seconds:g} s")) from None
        self._beat()

    async def recv(self) -> Frame:
        """Return the next frame of the application. Waits as long as the peer lives. One task at a time.

        Raises `PeerSilent`, `PeerGone`, `PeerRefused`, `BadFrame`, after the frames that came before.
        """
        while not self._backlog:
            await self._wake()
        frame = self._backlog.popleft()
        self._backlog_bytes -= _weight(frame)
        if not self._reading and self._backlog_bytes <= self.endpoint.limits.backlog_bytes // 2 and self._fault is None:
            self._reading = True
            self._transport.resume_reading()
        return frame

    def send(self, number: int, session: int, head: Head, *body: Buffer) -> None:
        """Send one frame in one write, without waiting. Raises `PeerSilent` when too much waits for the peer already.

        After large frames, `await drain()`.
        """
        if self._fault is not None:
            raise self._fault
        frame = encode(self.endpoint.table, number, session, head, *body)
        waiting = self._transport.get_write_buffer_size()
        if waiting and waiting + len(frame) > self.endpoint.limits.outgoing_bytes:
            raise self._fail(PeerSilent(self.peer, f"does not read: {waiting} bytes wait for it"))
        self._write(frame)

    def send_at_once(self, number: int, session: int, head: Head, *body: Buffer) -> int:
        """From any thread: send one frame without the event loop, which saves waking it; return its bytes. 0: it was
        not sent, because other bytes wait to be sent or the transport does not permit it (TLS); use `send`.

        Raises what ended the connection.
        """
        if self._fault is not None:
            raise self._fault
        frame = encode(self.endpoint.table, number, session, head, *body)
        with self._writing:
            if self._direct is None or self._rest or self._fault or self._transport.get_write_buffer_size():
                return 0
            try:
                count = os.write(self._direct, frame)
            except OSError:  # no room, or the end of the connection, which the loop is about to see
                return 0
            self.bytes_sent += count
            self._rest = bytes(memoryview(frame)[count:])
        if self._rest:
            self._loop.call_soon_threadsafe(self._write, b"")
        return len(frame)

    @property
    def has_left(self) -> bool:
        """From any thread: whether the connection has ended, or its end has arrived and is not read yet."""
        if self._fault is not None:
            return True
        with self._writing:
            return self._descriptor is not None and has_ended(self._descriptor)

    async def drain(self) -> None:
        """Wait until the peer has taken most of what was sent. Raises `PeerSilent`, `PeerGone`."""
        if self._room.is_set() and self._fault is None:
            return
        seconds = self.endpoint.deadlines.send_seconds
        try:
            async with asyncio.timeout(seconds):
                await self._room.wait()
        except TimeoutError:
            raise self._fail(PeerSilent(self.peer, f"took nothing of what we sent for {seconds:g} s")) from None
        if self._fault is not None:
            raise self._fault

    def close(self) -> None:
        """Close the connection after what was sent has left, within `send_seconds`. Closing twice does nothing."""
        self._end(PeerGone(self.peer, "was left by us"))

    def refuse(self, error: WireError) -> None:
        """End the connection for a reason of the application, and send the reason to the peer."""
        self._fail(error)

    async def pause(self, seconds: float) -> None:
        """Wait for `seconds`, or until the connection ends."""
        if seconds > 0:
            await asyncio.wait({self._ended}, timeout=seconds)

    async def wait_ended(self) -> None:
        """Wait until the connection has ended, on whichever side."""
        await asyncio.shield(self._ended)

    async def wait_closed(self) -> None:
        """Wait until the socket is closed."""
        await asyncio.shield(self._closed)

    # For asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin the handshake."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        plain = transport.get_extra_info("sslcontext") is None
        if os.name == "posix" and isinstance(self._loop, asyncio.SelectorEventLoop):
            self._descriptor = transport.get_extra_info("socket").fileno()
            self._direct = self._descriptor if plain else None
        self.peer.address = address(transport)
        self._conversation = Conversation(self.endpoint, self.peer, listening=self._listening, now=self._loop.time())
        self._flush()

    def get_buffer(self, sizehint: int) -> memoryview:
        """The memory for the next bytes."""
        return self._conversation.reader.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Take `nbytes` that were put into the buffer."""
        if self._fault is not None:  # what a peer says after we refused it
            self._conversation.reader.forget()
            return
        now = self._loop.time()
        conversation = self._conversation
        conversation.received(nbytes, now)
        try:
            while (frame := conversation.next_frame(now)) is not None:
                self._backlog.append(frame)
                self._backlog_bytes += _weight(frame)
        except WireError as error:
            self._fail(error)
            return
        if conversation.outbox:
            self._flush()
        if self._backlog_bytes > self.endpoint.limits.backlog_bytes and self._reading:
            self._reading = False
            self._transport.pause_reading()
        self._wake_reader()

    def eof_received(self) -> bool:
        """Treat the end of the peer's stream as the end of the connection: half-closing is not supported."""
        where = " in the middle of a frame" if self._conversation.reader.in_frame else ""
        self._end(PeerGone(self.peer, f"closed the connection{where}"))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Wake all waiting tasks."""
        with self._writing:
            self._direct = self._descriptor = None  # the socket is closed next, and its number given to another
        self._end(PeerGone(self.peer, f"broke the connection ({exc})" if exc else "closed the connection"))
        self._room.set()
        if not self._closed.done():
            self._closed.set_result(None)

    def pause_writing(self) -> None:
        """Note that the transport's buffer is full."""
        self._room.clear()

    def resume_writing(self) -> None:
        """Note that the transport's buffer has room again."""
        self._room.set()

    # Inside

    async def _wake(self) -> None:
        """Wait until something arrived or the connection ended; raise its fault then."""
        if self._fault is not None:
            raise self._fault
        assert self._reader is None, "one task receives from a connection"
        self._reader = self._loop.create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _beat(self) -> None:
        if self._fault is not None:
            return
        now = self._loop.time()
        if not self._reading:  # we do not listen to it: its silence proves nothing
            self._conversation.heartbeat.heard(now)
        try:
            self._conversation.beat(now)
        except PeerSilent as silent:
            self._fail(silent)
            return
        self._flush()
        self._tick = self._loop.call_at(self._conversation.heartbeat.next_event(), self._beat)

    def _flush(self) -> None:
        outbox = self._conversation.outbox
        # Heartbeats may be dropped: to a peer that does not read they would only pile up.
        if outbox and (self._conversation.agreed is None or self._room.is_set()):
            self._write(bytearray().join(outbox))
        outbox.clear()

    def _write(self, data: bytearray | bytes) -> None:
        with self._writing:
            if self._rest:
                data, self._rest = self._rest + data, b""
            if data:
                self.bytes_sent += len(data)
                self._transport.write(data)

    def _fail(self, error: WireError) -> WireError:
        """End the connection for a reason of ours, tell the peer, and return the reason; the first one stays."""
        if self._fault is None:
            farewell = self._conversation.farewell(error)
            if farewell is not None:
                self._write(farewell)
        self._end(error)
        if isinstance(error, PeerSilent):
            self._transport.abort()
        return self._fault or error

    def _end(self, error: WireError) -> None:
        if self._fault is not None:
            return
        self._fault = error
        self._ended.set_result(None)
        if self._tick is not None:
            self._tick.cancel()
        self._write(b"")
        self._transport.close()
        if self._transport.get_write_buffer_size():  # give it that long to leave, then drop it
            self._tick = self._loop.call_later(self.endpoint.deadlines.send_seconds, self._transport.abort)
        self._wake_reader()


async def connect(host: str, port: int, endpoint: Endpoint, *, tls: ssl.SSLContext | None) -> FrameConnection:
    """Connect from a running loop and shake hands. Raises `Unreachable`, `TlsRefused` or what the handshake found."""
    peer = Peer(role=endpoint.expected_role, address=f"{host}:{port}", phase="connect")
    seconds = endpoint.deadlines.connect_seconds
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(seconds):
            _, connection = await loop.create_connection(
                lambda: FrameConnection(endpoint, listening=False), host, port, ssl=tls
            )
    except (ssl.SSLError, ConnectionResetError) as error:  # without TLS it is reset only later
        raise tls_refused(peer, error) from None
    except OSError as error:  # TimeoutError is one
        raise unreachable(peer, error, seconds) from None
    connection.peer.address = peer.address
    try:
        await connection.shake_hands()
    except PeerGone as gone:
        raise (gone if tls else await asyncio.to_thread(explain_hangup, gone, host, port, seconds)) from None
    except asyncio.CancelledError:  # the caller has left
        connection.close()
        raise
    return connection


def address(transport: asyncio.BaseTransport) -> str:
    """Return the other end of `transport` as `host:port`."""
    name = transport.get_extra_info("peername")
    return f"{name[0]}:{name[1]}" if name else "?"


def _weight(frame: Frame) -> int:
    """Return the approximate memory of a waiting frame; an empty one is not free."""
    return 512 + len(frame.body)
