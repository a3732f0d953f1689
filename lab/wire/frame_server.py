"""A listener: shakes hands with each peer that connects, and starts one coroutine for each connection.

When all connections are in use, further peers are refused; those that speak frames get the reason.
"""

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable
from typing import Self

from lab.wire.endpoint import Endpoint
from lab.wire.faults import BadFrame, Peer, PeerFull, PeerGone, WireError
from lab.wire.frame_connection import FrameConnection, address
from lab.wire.frames import Error, Opening, WireType, encode, sniff
from lab.wire.handshake import HANDSHAKE_TABLE

logger = logging.getLogger(__name__)

HandleFrames = Callable[[FrameConnection], Awaitable[None]]
HandleFirstProtocol = Callable[[asyncio.StreamReader, asyncio.StreamWriter, asyncio.Event], Awaitable[None]]

REFUSAL_SECONDS = 2.0
"""Time for a peer to introduce itself and to read its refusal."""
MOST_REFUSALS = 64
"""Most concurrent refusals with a reason; further connections are closed without one."""
MOST_AHEAD_BYTES = 2**19
"""Most unread bytes of a peer that speaks the first protocol. With more, the socket is not read, and its end would not
be noticed."""
WARNING_SECONDS = 10.0
"""Refusals are logged no more often."""


class FrameServer:
    """A listening socket with its connections: `async with FrameServer(...) as server: server.port`.

    `handle(connection)` runs once a connection has agreed, as one task; its return or exception closes that connection
    and nothing else. `handle_first_protocol(reader, writer, left)` gets the connections that do not begin with the
    magic; `left` is set when the peer has closed its side, or sends too much that was not requested. Without this
    function they are refused. Check the host with `check_listener` before.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        handle: HandleFrames,
        *,
        host: str,
        port: int,
        max_connections: int,
        tls: ssl.SSLContext | None,
        handle_first_protocol: HandleFirstProtocol | None,
    ) -> None:
        self.endpoint = endpoint
        self.handle = handle
        self.handle_first_protocol = handle_first_protocol
        self._host, self._port, self._tls = host, port, tls
        self._max_connections = max_connections
        self._tasks: set[asyncio.Task[None]] = set()
        self.refusals: set[asyncio.BaseTransport] = set()
        """Connections that are being refused."""
        self.refused = 0
        """Number of refused connections."""
        self._next_warning_at = 0.0
        self._server: asyncio.Server

    @property
    def port(self) -> int:
        """The port it listens on: the one the system chose when 0 was asked for."""
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def connections(self) -> int:
        """Number of connections, including those in the handshake."""
        return len(self._tasks)

    async def __aenter__(self) -> Self:
        """Listen. Raises `OSError` when the address is taken."""
        loop = asyncio.get_running_loop()
        limit = self.endpoint.deadlines.handshake_seconds if self._tls else None
        self._server = await loop.create_server(
            lambda: _ProtocolSniffer(self), self._host, self._port, ssl=self._tls, ssl_handshake_timeout=limit
        )
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Stop listening and end every connection."""
        self._server.close()
        for transport in list(self.refusals):
            assert isinstance(transport, asyncio.Transport)
            transport.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def is_full(self) -> bool:
        """Whether another connection would be one too many."""
        return len(self._tasks) >= self._max_connections

    @property
    def fullness(self) -> Error:
        """The refusal for a peer beyond the limit of connections."""
        text = f"has all its {self._max_connections} connections"
        return Error(code=PeerFull.__name__, text=text)

    def note_refusal(self, name: str) -> None:
        """Count a refused connection."""
        self.refused += 1
        now = asyncio.get_running_loop().time()
        if now >= self._next_warning_at:
            self._next_warning_at = now + WARNING_SECONDS
            logger.warning("%s refused: there are %d connections already (%d refused)", name, len(self._tasks),
                           self.refused)  # fmt: skip

    def start(self, work: Awaitable[None], name: str) -> None:
        """Run the work of one connection; its faults end here."""
        task = asyncio.get_running_loop().create_task(_guarded(work, name))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _ProtocolSniffer(asyncio.BufferedProtocol):
    """Reads the first four bytes of a connection, no more, and steps aside for the protocol they announce."""

    def __init__(self, server: FrameServer) -> None:
        self._server = server
        self._first = bytearray(4)
        self._filled = 0
        self._opened: asyncio.Future[Opening] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self._server.is_full:
            self._server.note_refusal(address(transport))
            if len(self._server.refusals) >= MOST_REFUSALS:
                transport.abort()
            else:
                transport.set_protocol(_Refusal(self._server, transport))
            return
        self._server.start(self._open(), address(transport))

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self._first)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        if self._filled == len(self._first) and not self._opened.done():
            self._transport.pause_reading()
            self._opened.set_result(sniff(bytes(self._first)))

    def connection_lost(self, exc: Exception | None) -> None:
        self._opened.cancel()

    async def _open(self) -> None:
        try:
            async with asyncio.timeout(self._server.endpoint.deadlines.handshake_seconds):
                opening = await self._opened
        except (TimeoutError, asyncio.CancelledError):
            self._transport.abort()
            return
        if opening is Opening.frames:
            await self._speak_frames()
        elif self._server.handle_first_protocol is not None:
            await self._speak_first_protocol(self._server.handle_first_protocol)
        else:
            self._transport.abort()
            peer = Peer(role="peer", address=address(self._transport), phase="opening")
            raise BadFrame(peer, f"began with {self._first.hex()}, we take frames only")

    async def _speak_frames(self) -> None:
        connection = FrameConnection(self._server.endpoint, listening=True)
        self._transport.set_protocol(connection)
        connection.connection_made(self._transport)
        connection.get_buffer(-1)[:4] = self._first
        connection.buffer_updated(4)
        self._transport.resume_reading()
        try:
            await connection.shake_hands()
            await self._server.handle(connection)
        except WireError as error:
            connection.refuse(error)
            raise
        finally:
            connection.close()

    async def _speak_first_protocol(self, handle: HandleFirstProtocol) -> None:
        reader = asyncio.StreamReader(limit=MOST_AHEAD_BYTES // 2)  # it stops to read at twice its limit
        protocol = _FirstProtocol(reader)
        self._transport.set_protocol(protocol)
        protocol.connection_made(self._transport)
        writer = asyncio.StreamWriter(self._transport, protocol, reader, asyncio.get_running_loop())
        reader.feed_data(bytes(self._first))
        self._transport.resume_reading()
        try:
            await handle(reader, writer, protocol.left)
        finally:
            writer.close()


class _FirstProtocol(asyncio.StreamReaderProtocol):
    """A stream whose end is noticed without a reader. Half-closing is not supported: a peer that closes its side has
    left."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        super().__init__(reader)
        self.left = asyncio.Event()
        self._socket: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(transport)
        self._socket = transport

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._socket.is_reading():
            self.left.set()

    def eof_received(self) -> bool:
        super().eof_received()
        self.left.set()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.left.set()


class _Refusal(asyncio.BufferedProtocol):
    """A refused connection: it may begin, gets the reason, and has a moment to read it.

    Its bytes are read and dropped: closing a socket with unread bytes would discard what was sent on it. It costs a
    small buffer, and no cryptography except TLS.
    """

    def __init__(self, server: FrameServer, transport: asyncio.Transport) -> None:
        self._server, self._transport = server, transport
        self._memory = bytearray(2**12)
        self._filled = 0
        self._left_bytes = server.endpoint.limits.handshake_bytes
        self._is_told = False
        server.refusals.add(transport)
        self._deadline = asyncio.get_running_loop().call_later(REFUSAL_SECONDS, transport.abort)

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self._memory)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._left_bytes -= nbytes
        if self._left_bytes < 0:
            self._transport.abort()
        elif self._is_told:
            return
        elif (have := self._filled + nbytes) < 4:
            self._filled = have
        elif sniff(bytes(self._memory[:4])) is Opening.frames:
            self._is_told, self._filled = True, 0
            self._transport.write(encode(HANDSHAKE_TABLE, WireType.error, 0, self._server.fullness))
        else:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        self._server.refusals.discard(self._transport)


async def _guarded(work: Awaitable[None], name: str) -> None:
    try:
        await work
    except PeerGone as error:
        logger.info("%s", error)
    except WireError as error:
        logger.warning("%s", error)
    except Exception:
        logger.exception("connection %s ended by a fault of ours", name)
