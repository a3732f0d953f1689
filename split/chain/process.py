"""The process of a shard, for inference and training: serves a port until it is stopped."""

import asyncio
import logging
import os
import signal
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lab.wire.frame_server import FrameServer
from split.chain.server import ChainServer

log = logging.getLogger(__name__)


async def serve(
    server: ChainServer,
    host: str,
    port: int,
    *,
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
def until_stopped(follow_stdin: bool) -> Iterator[None]:
    """End the block without an error on a signal, or at the end of standard input where that is followed."""
    if follow_stdin:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        yield
    except KeyboardInterrupt:
        log.info("stopped")


def _end_with_stdin() -> None:
    """End with the process that started us: it holds the other end of the pipe, which closes at its end."""
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)
