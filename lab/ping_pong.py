"""Cost of a frame: a round trip between both of our ends, compared with a raw blocking one of the same bytes.

Both servers live in one other process (`python -m lab.ping_pong`), as a verifier would; rounds of the two are
interleaved, so that other load of the machine affects both.
"""

import asyncio
import contextlib
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lab.command.processes import first_line, start
from lab.wire.endpoint import Deadlines, Endpoint
from lab.wire.frame_connection import FrameConnection
from lab.wire.frame_server import FrameServer
from lab.wire.frame_socket import FrameSocket
from lab.wire.frames import FIRST_APPLICATION_TYPE, HEADER, Head, Limits, MessageKind, MessageTable

ECHO = FIRST_APPLICATION_TYPE
START_SECONDS = 30.0  # for the process of the servers to listen


class Echo(Head):
    """A head as small as a real one."""

    number: int


@dataclass(frozen=True, kw_only=True)
class PingPong:
    """Round trips on loopback, medians over the rounds."""

    frame_bytes: int
    rounds: int
    raw_seconds: float
    """Blocking `sendall` and `recv` on both sides."""
    frame_seconds: float
    """`FrameSocket` to `FrameConnection` and back: encoded, checked and decoded on both sides."""

    @property
    def added_seconds(self) -> float:
        """Difference of the two: the cost of our frame."""
        return self.frame_seconds - self.raw_seconds


def measure(*, body_bytes: int, rounds: int, warm_up_rounds: int) -> PingPong:
    """Return the median round trips of frames with a body of `body_bytes`, and of as many raw bytes."""
    body = bytes(body_bytes)
    raw_times, frame_times = [], []
    with _servers() as (raw_port, frame_port), socket.create_connection(("127.0.0.1", raw_port)) as raw:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with FrameSocket.connect("127.0.0.1", frame_port, _endpoint("drafter", "verifier"), tls=None) as frames:
            message = bytes(HEADER.size + 2 + body_bytes)  # a head of one small number is 2 bytes
            for index in range(warm_up_rounds + rounds):
                raw_seconds = _timed(lambda: _ping_raw(raw, message))
                frame_seconds = _timed(lambda: _ping_frame(frames, body))
                if index >= warm_up_rounds:
                    raw_times.append(raw_seconds)
                    frame_times.append(frame_seconds)
    return PingPong(
        frame_bytes=len(message),
        rounds=rounds,
        raw_seconds=statistics.median(raw_times),
        frame_seconds=statistics.median(frame_times),
    )


def _timed(ping: Callable[[], None]) -> float:
    started = time.perf_counter()
    ping()
    return time.perf_counter() - started


def _ping_raw(connection: socket.socket, message: bytes) -> None:
    connection.sendall(message)
    left = len(message)
    while left:
        left -= len(connection.recv(left))


def _ping_frame(connection: FrameSocket, body: bytes) -> None:
    connection.send(ECHO, 1, Echo(number=1), body)
    assert len(connection.recv().body) == len(body)


def _endpoint(role: str, peer_role: str) -> Endpoint:
    table = MessageTable({ECHO: MessageKind(head=Echo, max_bytes=2**24, has_body=True)})
    seconds = Deadlines(connect_seconds=5, handshake_seconds=5, send_seconds=5, ping_seconds=1, dead_seconds=10)
    limits = Limits(handshake_bytes=4096, payload_bytes=2**24, backlog_bytes=2**24, outgoing_bytes=2**26)
    return Endpoint(
        role=role,
        peer_roles=frozenset({peer_role}),
        key=b"",
        table=table,
        protocol=range(1, 2),
        limits=limits,
        deadlines=seconds,
    )


@contextlib.contextmanager
def _servers() -> Iterator[tuple[int, int]]:
    """Yield the ports of the two echo servers; their process ends with its standard input."""
    with start("lab.ping_pong", [], None, follows_stdin=True) as process:
        try:
            ports = first_line(process, START_SECONDS)
            yield ports["raw"], ports["frames"]
        finally:
            process.kill()


def _echo_raw(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection:
        while data := connection.recv(2**16):
            connection.sendall(data)


async def _echo_frames(connection: FrameConnection) -> None:
    while True:
        frame = await connection.recv()
        connection.send(frame.type, frame.session, frame.head, frame.body)


async def serve() -> None:
    """Echo raw bytes and frames until standard input ends; the ports are one JSON line on standard output."""
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_echo_raw, args=(listener,), daemon=True).start()
    server = FrameServer(
        _endpoint("verifier", "drafter"),
        _echo_frames,
        host="127.0.0.1",
        port=0,
        max_connections=1,
        tls=None,
        handle_first_protocol=None,
    )
    async with server:
        print(json.dumps({"raw": listener.getsockname()[1], "frames": server.port}), flush=True)
        await asyncio.get_running_loop().run_in_executor(None, os.read, sys.stdin.fileno(), 1)


if __name__ == "__main__":
    asyncio.run(serve())
