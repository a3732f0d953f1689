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

from lab.command.ending import run_async
from lab.network import address_for_peers, cannot_listen
from lab.settings import NetworkSettings
from lab.wire import FrameServer
from split.chain.server import ChainServer
from split.settings import ChainSettings

log = logging.getLogger(__name__)


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
        say_ready("listening", role, project, network, port)
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
    try:
        run_async(serving)
    except OSError as error:
        raise cannot_listen(network, error) from None


def say_ready(status: str, role: str, project: ChainSettings, network: NetworkSettings, port: int) -> None:
    """One JSON line on stdout for the process that started us: the shard is loaded."""
    ready = {"status": status, "role": role, "host": network.host, "port": port, "layers": project.layers}
    print(json.dumps(ready), flush=True)


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


@contextmanager
def until_told(follow_stdin: bool) -> Iterator[None]:
    """End the block without an error on a signal, or at the end of standard input where that is followed."""
    if follow_stdin:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        yield
    except KeyboardInterrupt:
        log.info("stopped")


def _end_with_stdin() -> None:
    """The process that started us holds the other end of the pipe: when it is gone, however, so are we."""
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)
