"""A server behind a real socket, on an event loop of its own thread, so that tests start in milliseconds."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Generic, Self, TypeVar

from lab.wire.endpoint import Deadlines, Endpoint
from lab.wire.frames import Limits, MessageTable
from split.chain.address import Address
from split.chain.process import serve
from split.chain.server import ChainServer

MAX_BYTES = 2**22
"""Of a frame."""
Served = TypeVar("Served", bound=ChainServer)


class Listening(Generic[Served]):
    """A shard that serves; `stop` takes it away with all its connections, as a kill does."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listening = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self.server: Served
        self.address: Address

    def make_server(self) -> Served:
        """Called on the thread of its event loop."""
        raise NotImplementedError

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.server = self.make_server()
        self._task = self._loop.create_task(
            serve(
                self.server, host="127.0.0.1", port=self._port, max_connections=16, tls=None, announce=self._announced
            )
        )
        await asyncio.wait([self._task])

    def _announced(self, port: int) -> None:
        self.address = Address("127.0.0.1", port)
        self._listening.set()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._listening.wait(10), "the shard does not listen"
        return self

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._task.cancel)
            self._thread.join(10)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def endpoint_for_tests(
    role: str,
    peer_roles: set[str],
    table: MessageTable,
    protocol: range,
    *,
    key: bytes,
    fingerprints: Mapping[str, str],
    ping_seconds: float,
    dead_seconds: float,
) -> Endpoint:
    """Our side of a wire with short deadlines."""
    return Endpoint(
        role=role,
        peer_roles=frozenset(peer_roles),
        key=key,
        table=table,
        protocol=protocol,
        limits=Limits(
            handshake_bytes=4096, payload_bytes=MAX_BYTES, backlog_bytes=MAX_BYTES, outgoing_bytes=4 * MAX_BYTES
        ),
        deadlines=Deadlines(
            connect_seconds=5,
            handshake_seconds=5,
            send_seconds=5,
            ping_seconds=ping_seconds,
            dead_seconds=dead_seconds,
        ),
        fingerprints=fingerprints,
    )
