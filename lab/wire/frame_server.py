"""A listener: shakes hands with whoever connects and hands each connection to one coroutine."""

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

from lab.wire.endpoint import Endpoint
from lab.wire.faults import BadFrame, Peer, PeerGone, WireError
from lab.wire.frame_connection import FrameConnection, address
from lab.wire.frames import Opening, sniff

logger = logging.getLogger(__name__)

HandleFrames = Callable[[FrameConnection], Awaitable[None]]
HandleFirstProtocol = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class FrameServer:
    """A listening socket with its connections: `async with FrameServer(...) as server: server.port`.

    `handle(connection)` runs once a connection has agreed, as one task; its return or exception closes that connection
    and nothing else. `handle_first_protocol(reader, writer)` gets the connections that do not begin with the magic;
    without it they are refused. Check the host with `check_listener` before.
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
        self._server: asyncio.Server

    @property
    def port(self) -> int:
        """The port it listens on: the one the system chose when 0 was asked for."""
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def connections(self) -> int:
        """How many connections there are, those that shake hands included."""
        return len(self._tasks)

    async def __aenter__(self) -> Self:
        """Listen. Raises `OSError` when the address is taken."""
        loop = asyncio.get_running_loop()
        limit = self.endpoint.deadlines.handshake_seconds if self._tls else None
        self._server = await loop.create_server(
            lambda: _Doorman(self), self._host, self._port, ssl=self._tls, ssl_handshake_timeout=limit
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop listening and end every connection."""
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def is_full(self) -> bool:
        """Whether another connection would be one too many."""
        return len(self._tasks) >= self._max_connections

    def start(self, work: Awaitable[None], name: str) -> None:
        """Run the work of one connection; its faults end here."""
        task = asyncio.get_running_loop().create_task(_guarded(work, name))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Doorman(asyncio.BufferedProtocol):
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
            logger.warning("%s refused: there are %d connections already", address(transport), self._server.connections)
            transport.abort()
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
        finally:
            connection.close()

    async def _speak_first_protocol(self, handle: HandleFirstProtocol) -> None:
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        self._transport.set_protocol(protocol)
        protocol.connection_made(self._transport)
        writer = asyncio.StreamWriter(self._transport, protocol, reader, asyncio.get_running_loop())
        reader.feed_data(bytes(self._first))
        self._transport.resume_reading()
        try:
            await handle(reader, writer)
        finally:
            writer.close()


async def _guarded(work: Awaitable[None], name: str) -> None:
    try:
        await work
    except PeerGone as error:
        logger.info("%s", error)
    except WireError as error:
        logger.warning("%s", error)
    except Exception:
        logger.exception("connection %s ended by a fault of ours", name)
