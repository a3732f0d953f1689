"""Shards behind real sockets, each on an event loop of its own thread, so that tests start in milliseconds."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from lab.wire import Deadlines, Endpoint, Limits
from split.address import Address
from split.boundary import Boundary
from split.messages import PROTOCOL, table
from split.serving import ShardServer
from split.shard import Shard
from split.stage import Stage
from split.transport.tcp import TcpChain

FINGERPRINTS = {"model": "tests:1", "dtype": "float32", "boundary": "float32"}
MAX_BYTES = 2**22


def endpoint(role: str, key: bytes = b"", fingerprints: Mapping[str, str] = FINGERPRINTS) -> Endpoint:
    return Endpoint(
        role=role,
        peer_roles=frozenset({"shard"} if role == "client" else {"client", "shard"}),
        key=key,
        table=table(MAX_BYTES),
        protocol=PROTOCOL,
        limits=Limits(
            handshake_bytes=4096, payload_bytes=MAX_BYTES, backlog_bytes=MAX_BYTES, outgoing_bytes=4 * MAX_BYTES
        ),
        deadlines=Deadlines(connect_seconds=5, handshake_seconds=5, send_seconds=5, ping_seconds=0.2, dead_seconds=1.0),
        fingerprints=fingerprints,
    )


class Process:
    """A shard that serves; `stop` takes it away with all its connections, as a kill does."""

    def __init__(
        self,
        shard: Shard,
        *,
        port: int = 0,
        next_addresses: Sequence[Address] = (),
        boundary: Boundary = Boundary.float32,
        ours: Endpoint | None = None,
        awake_seconds: float = 0.02,
    ) -> None:
        self._server_of = lambda: ShardServer(
            Stage(shard, boundary),
            name=f"layers {shard.layers.start}:{shard.layers.stop}",
            model_layers=4,
            endpoint=ours or endpoint("shard"),
            next_addresses=next_addresses,
            client_tls=None,
            awake_seconds=awake_seconds,
        )
        self._port = port
        self._listening = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self.server: ShardServer
        self.address: Address

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.server = self._server_of()
        self._task = self._loop.create_task(
            self.server.serve(host="127.0.0.1", port=self._port, max_connections=16, tls=None, announce=self._announced)
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


def chain(
    addresses: Sequence[Address], *, spares: Sequence[Address] = (), key: bytes = b"",
    fingerprints: Mapping[str, str] = FINGERPRINTS, start_seconds: float = 5.0,
) -> TcpChain:  # fmt: skip
    return TcpChain(
        addresses,
        spares,
        endpoint("client", key, fingerprints),
        tls=None,
        answer_seconds=20.0,
        start_seconds=start_seconds,
    )
