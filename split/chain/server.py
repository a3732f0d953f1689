"""A shard's process at its place in the chain: who comes, and the way to the next shard."""

from __future__ import annotations

import asyncio
import secrets
import ssl
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from lab.wire import BadFrame, Endpoint, FrameConnection, PeerSilent, WireError, connect
from split.chain.address import Address
from split.chain.messages import Attach, Fault, FaultCode, Join, Welcome, send


class ChainServer(ABC):
    """Serves one shard over tcp. Belongs to its event loop.

    A client has a connection to every shard; for each client there is one between every two neighbours.

    Args:
        layers: Layers of this shard.
        model_layers: Layers of the whole model.
        endpoint: Our side of the wire, talking to clients and shards.
        next_addresses: Where the next shard may be found from here; tried before those that a client sends.
        client_tls: For the connection to the next shard.
    """

    def __init__(
        self,
        *,
        layers: range,
        model_layers: int,
        endpoint: Endpoint,
        next_addresses: Sequence[Address],
        client_tls: ssl.SSLContext | None,
    ) -> None:
        self.layers, self.endpoint = layers, endpoint
        self._model_layers = model_layers
        self._to_next = replace(endpoint, peer_roles=frozenset({endpoint.role}))
        self._next_addresses, self._client_tls = list(next_addresses), client_tls
        self._instance = secrets.randbits(32)

    @abstractmethod
    def working(self) -> AbstractContextManager[None]:
        """The thread of the shard works as long as the block lasts, within a running event loop."""

    @abstractmethod
    async def serve_client(self, connection: FrameConnection, attach: Attach) -> None:
        """A client's own connection, until it ends."""

    @abstractmethod
    async def serve_previous(self, connection: FrameConnection, join: Join) -> None:
        """The connection of the shard before this one for a client, until it ends."""

    async def handle(self, connection: FrameConnection) -> None:
        """One connection, until it ends."""
        head = await self._first_head(connection)
        if isinstance(head, Attach):
            connection.peer.phase = "ATTACH"
            await self.serve_client(connection, head)
        elif isinstance(head, Join):
            await self.serve_previous(connection, head)
        else:
            raise BadFrame(connection.peer, f"began with {type(head).__name__.upper()}, not with ATTACH or JOIN")

    def welcome(self, connection: FrameConnection, phase: str, *, context: int, sessions: int) -> None:
        """Answer ATTACH or JOIN."""
        head = Welcome(
            instance=self._instance,
            first=self.layers.start,
            last=self.layers.stop,
            model_layers=self._model_layers,
            context=context,
            sessions=sessions,
        )
        send(connection, 0, head)
        connection.peer.phase = phase

    async def join_next(self, client: FrameConnection, attach: Attach) -> FrameConnection:
        """Connect to the process that a client means. The client is told when that cannot be; when it leaves meanwhile,
        nobody goes on trying.

        Raises:
            WireError: the client left, or the next shard is not there.
        """
        joining = asyncio.ensure_future(self._join_next(client, attach))
        leaving = asyncio.ensure_future(client.wait_ended())
        try:
            await asyncio.wait((joining, leaving), return_when=asyncio.FIRST_COMPLETED)
            if joining.done():
                return joining.result()
            raise client.fault or BadFrame(client.peer, "left")
        finally:
            for task in (joining, leaving):
                task.cancel()

    async def _join_next(self, client: FrameConnection, attach: Attach) -> FrameConnection:
        reasons = []
        for address in [*self._next_addresses, *_addresses(client, attach)]:
            try:
                link = await connect(address.host, address.port, self._to_next, tls=self._client_tls)
            except WireError as error:
                reasons.append(str(error))
                continue
            try:
                if await self._is_meant(link, attach):
                    return link
                reasons.append(f"{address} is another shard than the next one that is meant")
            except (WireError, TimeoutError) as error:
                reasons.append(str(error) or f"{address} did not answer JOIN")
            except asyncio.CancelledError:
                link.close()
                raise
            link.close()
        last = f"layers must end at the model's {self._model_layers}, got {self.layers.stop}; project.next is not set"
        text = "the next shard is not there: " + ("; ".join(reasons) or last)
        tell_lost(client, text)
        raise BadFrame(client.peer, text)

    @staticmethod
    async def _is_meant(link: FrameConnection, attach: Attach) -> bool:
        send(link, 0, Join(client=attach.client))
        async with asyncio.timeout(link.endpoint.deadlines.handshake_seconds):
            welcome = (await link.recv()).head
        if not isinstance(welcome, Welcome) or welcome.instance != attach.next_instance:
            return False
        link.peer.phase = f"layers {welcome.first}:{welcome.last}"
        return True

    @staticmethod
    async def _first_head(connection: FrameConnection) -> Any:
        """Raises `PeerSilent` for a peer that connects and sends nothing."""
        seconds = connection.endpoint.deadlines.handshake_seconds
        try:
            async with asyncio.timeout(seconds):
                return (await connection.recv()).head
        except TimeoutError:
            raise PeerSilent(connection.peer, f"did not say what it wants within {seconds:g} s") from None


def _addresses(client: FrameConnection, attach: Attach) -> list[Address]:
    try:
        return [Address.parse(text) for text in attach.next]
    except ValueError as error:
        raise BadFrame(client.peer, f"sent ATTACH with an address that {error}") from None


def tell_lost(client: FrameConnection, text: str) -> None:
    """Tell a client that its chain is broken here."""
    send(client, 0, Fault(code=FaultCode.link, text=text[:1024]))
