"""The process of a shard, whatever it does: it says where it listens, and serves until it is told to end."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lab.command.ending import run_async
from lab.network import address_for_peers, cannot_listen
from lab.settings import NetworkSettings, UserError
from lab.wire import FrameServer
from split.chain.server import ChainServer
from split.settings import ChainSettings

if TYPE_CHECKING:
    from split.transport.rpc import Seat  # some systems lack it

log = logging.getLogger(__name__)


def layers_to_serve(project: ChainSettings) -> str:
    """`project.layers`. UserError where it is not set."""
    if project.layers is None:
        raise UserError("project.layers must be set for a shard, as first:last, got null")
    return project.layers


def serve_port(
    server: ChainServer,
    project: ChainSettings,
    network: NetworkSettings,
    tls: ssl.SSLContext | None,
    *,
    role: str,
    peer_role: str,
) -> None:
    """Serve over tcp until Ctrl+C; the settings of `peer_role` name this shard. UserError for a taken address."""

    def announce(port: int) -> None:
        ready = {"status": "listening", "role": role, "host": network.host, "port": port, "layers": project.layers}
        print(json.dumps(ready), flush=True)
        address = f"{address_for_peers(network.host)}:{port}"
        print(f"this shard's address in the {peer_role}'s project.shards=[...]: {address}", file=sys.stderr, flush=True)

    serving = serve(
        server,
        host=network.host,
        port=network.port,
        max_connections=project.max_connections,
        tls=tls,
        announce=announce,
    )
    with _until_told(project):
        try:
            run_async(serving)
        except OSError as error:
            raise cannot_listen(network, error) from None


async def serve(
    server: ChainServer,
    *,
    host: str,
    port: int,
    max_connections: int,
    tls: ssl.SSLContext | None,
    announce: Callable[[int], None],
) -> None:
    """Serve until cancelled; `announce(port)` is called when it listens. Raises `OSError` for a taken address."""
    frames = FrameServer(
        server.endpoint,
        server.handle,
        host=host,
        port=port,
        max_connections=max_connections,
        tls=tls,
        handle_first_protocol=None,
    )
    with server.working():
        async with frames:
            announce(frames.port)
            await asyncio.get_running_loop().create_future()


def check_rank(project: ChainSettings) -> None:
    """UserError for a place that the group does not have."""
    if not 1 <= project.rank < project.world_size:
        raise UserError(f"project.rank must be in [1, world_size={project.world_size}), got {project.rank}")


def serve_rank(seat: Seat, project: ChainSettings, network: NetworkSettings) -> None:
    """Be a member of a group of torch's RPC until rank 0 leaves, or Ctrl+C."""
    from split.transport.rpc import serve_seat

    with _until_told(project):
        serve_seat(seat, project.rank, project.world_size, network)


@contextmanager
def _until_told(project: ChainSettings) -> Iterator[None]:
    """A signal, or the end of standard input where that is followed, ends what is inside, and well."""
    if project.follow_stdin:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        yield
    except KeyboardInterrupt:
        log.info("stopped")


def _end_with_stdin() -> None:
    """The process that started us holds the other end of the pipe: when it is gone, however, so are we."""
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)
