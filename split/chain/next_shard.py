"""The way from one shard to the next: found by address, known by the number of its process."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lab.wire import BadFrame, Endpoint, FrameConnection, PeerSilent, WireError, connect
from split.chain.address import Address
from split.inference.messages import Attach, Fault, FaultCode, Join, Welcome


@dataclass(frozen=True)
class Behind:
    """How a shard finds the one behind it."""

    layers: range
    """Of this shard."""
    model_layers: int
    """Of the whole model."""
    next_addresses: Sequence[Address]
    """Where the next shard may be found from here; they go before what who attached says."""
    ours: Endpoint
    """Our side of the wire, talking to shards."""
    tls: ssl.SSLContext | None
    """For the connection to the next one."""


async def join_next(behind: Behind, front: FrameConnection, attach: Attach) -> FrameConnection:
    """Connect to the process that who attached at `front` means. It is told when that cannot be; when it leaves
    meanwhile, nobody goes on trying.

    Args:
        behind: How this shard finds the next one.
        front: The connection of who attached.
        attach: What it said.

    Raises:
        WireError: it left, or the next shard is not there.
    """
    joining = asyncio.ensure_future(_join(behind, front, attach))
    leaving = asyncio.ensure_future(front.wait_ended())
    try:
        await asyncio.wait((joining, leaving), return_when=asyncio.FIRST_COMPLETED)
        if joining.done():
            return joining.result()
        raise front.fault or BadFrame(front.peer, "left")
    finally:
        for task in (joining, leaving):
            task.cancel()


async def _join(behind: Behind, front: FrameConnection, attach: Attach) -> FrameConnection:
    reasons = []
    for address in [*behind.next_addresses, *_addresses(front, attach)]:
        try:
            link = await connect(address.host, address.port, behind.ours, tls=behind.tls)
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
    nobody = f"layers must end at the model's {behind.model_layers}, got {behind.layers.stop}; project.next is not set"
    text = "the next shard is not there: " + ("; ".join(reasons) or nobody)
    say(front, link_fault(text))
    raise BadFrame(front.peer, text)


def _addresses(front: FrameConnection, attach: Attach) -> list[Address]:
    try:
        return [Address.parse(text) for text in attach.next]
    except ValueError as error:
        raise BadFrame(front.peer, f"sent ATTACH with an address that {error}") from None


async def _is_meant(link: FrameConnection, attach: Attach) -> bool:
    say(link, Join(client=attach.client))
    async with asyncio.timeout(link.endpoint.deadlines.handshake_seconds):
        welcome = (await link.recv()).head
    if not isinstance(welcome, Welcome) or welcome.instance != attach.next_instance:
        return False
    link.peer.phase = f"layers {welcome.first}:{welcome.last}"
    return True


async def first_head(connection: FrameConnection) -> Any:
    """What a peer begins with. Raises `PeerSilent` for one that takes a connection and says nothing."""
    seconds = connection.endpoint.deadlines.handshake_seconds
    try:
        async with asyncio.timeout(seconds):
            return (await connection.recv()).head
    except TimeoutError:
        raise PeerSilent(connection.peer, f"did not say what it wants within {seconds:g} s") from None


def say(connection: FrameConnection, head: Fault | Join | Welcome) -> None:
    """Send a frame without a body that belongs to no text."""
    connection.send(connection.endpoint.table.number(head), 0, head)


def link_fault(text: str) -> Fault:
    """A neighbour is lost, for who attached."""
    return Fault(code=FaultCode.link, text=text[:1024])
