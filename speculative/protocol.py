"""The lab's first protocol (v0): send text, receive token ids. Any client can implement it, in any language.

    request    [4 bytes length][UTF-8 text]
    response   [4 bytes count][count x int32]

All integers in network byte order; any number of requests on a connection, one after the other; an error closes it. A
client that closes the connection, or its sending side, has left: nothing more is computed for it. The answer is the
target's own greedy continuation of the plain text. The protocol has no key, no version and no session: the frames of
`lab.wire` on the same port have them; the first four bytes tell the two protocols apart (`lab.wire.sniff`).

A client:

    with socket.create_connection((host, port)) as server:
        send_msg(server, "def fibonacci(n):")
        print(recv_tokens(server))
"""

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import Iterator, Sequence

from lab.wire.faults import BadFrame, Peer, PeerGone, PeerSilent

MAX_TEXT_BYTES = 2**20
"""Longest request, part of the protocol: `lab.wire.MAGIC`, read as a length, is 3,000 times larger."""
MAX_TOKENS = 2**16
"""Longest response, part of the protocol."""
TIMEOUT_SECONDS = 300.0
"""Time limit of one whole message if neither the caller nor the socket has one; an answer must be computed."""

_LENGTH = struct.Struct("!I")


def send_msg(connection: socket.socket, text: str, *, timeout_seconds: float | None = None) -> None:
    """Send a request. Raises `ValueError` for text over the cap, `PeerGone`, `PeerSilent`.

    Works on blocking and non-blocking sockets, with and without TLS; one thread at a time. `timeout_seconds` None is
    the socket's own time-out, or `TIMEOUT_SECONDS` if it has none.
    """
    _Turn(connection, "request", timeout_seconds).write(encode_msg(text))


def recv_msg(
    connection: socket.socket, *, max_bytes: int = MAX_TEXT_BYTES, timeout_seconds: float | None = None
) -> str:
    """Return the next request. Sockets and time as in `send_msg`.

    Raises `BadFrame` for a length over `max_bytes` (nothing is allocated for it) or bytes that are not UTF-8,
    `PeerGone` when the peer left (`LeftBetweenMessages` between messages), `PeerSilent` when it took too long.
    """
    turn = _Turn(connection, "request", timeout_seconds)
    length = _checked_length(turn.read(_LENGTH.size), max_bytes, turn.peer)
    return _decode_text(turn.read(length), turn.peer)


def send_tokens(connection: socket.socket, ids: Sequence[int], *, timeout_seconds: float | None = None) -> None:
    """Send a response. Raises `ValueError` for too many ids or one that is not an int32, `PeerGone`, `PeerSilent`."""
    _Turn(connection, "response", timeout_seconds).write(encode_tokens(ids))


def recv_tokens(
    connection: socket.socket, *, max_tokens: int = MAX_TOKENS, timeout_seconds: float | None = None
) -> list[int]:
    """Return the next response. Sockets and time as in `send_msg`, errors as in `recv_msg`."""
    turn = _Turn(connection, "response", timeout_seconds)
    count = _checked_length(turn.read(_LENGTH.size), max_tokens, turn.peer)
    return list(struct.unpack(f"!{count}i", turn.read(4 * count)))


def encode_msg(text: str) -> bytes:
    """Return an encoded request. Raises `ValueError` if it is over the cap."""
    encoded = text.encode()
    if len(encoded) > MAX_TEXT_BYTES:
        raise ValueError(f"prompt must be at most {MAX_TEXT_BYTES} bytes of UTF-8, got {len(encoded)}")
    return _LENGTH.pack(len(encoded)) + encoded


def encode_tokens(ids: Sequence[int]) -> bytes:
    """Return an encoded response. Raises `ValueError` for too many ids or one that is not an int32."""
    if len(ids) > MAX_TOKENS:
        raise ValueError(f"a response must be at most {MAX_TOKENS} tokens, got {len(ids)}")
    try:
        return struct.pack(f"!I{len(ids)}i", len(ids), *ids)
    except struct.error as error:
        raise ValueError(f"token ids must be in [-2147483648, 2147483647]: {error}") from None


async def read_msg(reader: asyncio.StreamReader, *, peer: Peer, max_bytes: int, timeout_seconds: float) -> str:
    """Return the next request from an asyncio stream; for servers. Errors as in `recv_msg`."""
    try:
        async with asyncio.timeout(timeout_seconds):
            length = _checked_length(await _exactly(reader, _LENGTH.size, peer), max_bytes, peer)
            return _decode_text(await _exactly(reader, length, peer, within=True), peer)
    except TimeoutError:
        raise PeerSilent(peer, f"sent no whole request in {timeout_seconds:g} s") from None


async def write_tokens(writer: asyncio.StreamWriter, ids: Sequence[int], *, peer: Peer, timeout_seconds: float) -> None:
    """Send a response over an asyncio stream; for servers. Errors as in `send_tokens`."""
    writer.write(encode_tokens(ids))
    try:
        async with asyncio.timeout(timeout_seconds):
            await writer.drain()
    except TimeoutError:
        raise PeerSilent(peer, f"took no response in {timeout_seconds:g} s") from None
    except OSError as error:
        raise PeerGone(peer, f"broke the connection ({error.strerror or error})") from None


class LeftBetweenMessages(PeerGone):
    """The peer closed the connection at a permitted point: after a whole message."""


async def _exactly(reader: asyncio.StreamReader, count: int, peer: Peer, *, within: bool = False) -> bytes:
    try:
        return await reader.readexactly(count)
    except asyncio.IncompleteReadError as error:
        raise _left(peer, clean=not error.partial and not within) from None
    except OSError as error:
        raise PeerGone(peer, f"broke the connection ({error.strerror or error})") from None


def _left(peer: Peer, *, clean: bool) -> PeerGone:
    if clean:
        return LeftBetweenMessages(peer, "closed the connection")
    return PeerGone(peer, "closed the connection in the middle of a message")


def _checked_length(encoded: bytes | bytearray, cap: int, peer: Peer) -> int:
    length = int(_LENGTH.unpack(encoded)[0])
    if length > cap:
        raise BadFrame(peer, f"announced {length}, cap is {cap}")
    return length


def _decode_text(encoded: bytes | bytearray, peer: Peer) -> str:
    try:
        return encoded.decode()
    except UnicodeDecodeError as error:
        raise BadFrame(peer, f"sent text that is not UTF-8 ({error.reason} at byte {error.start})") from None


class _Turn:
    """One message on one socket, blocking or not, within one deadline."""

    def __init__(self, connection: socket.socket, phase: str, timeout_seconds: float | None) -> None:
        self.connection = connection
        own = connection.gettimeout() or TIMEOUT_SECONDS  # None: blocking, 0: non-blocking
        self.seconds = own if timeout_seconds is None else timeout_seconds
        self.deadline = time.monotonic() + self.seconds
        self.peer = Peer(role="peer", address=_address(connection), phase=phase)
        self.begun = False

    def write(self, message: bytes) -> None:
        """Write all of `message`."""
        if self.connection.family in (socket.AF_INET, socket.AF_INET6):
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        left = memoryview(message)
        with self._until_deadline("took"):
            while left:
                self._limit_wait()
                left = left[self.connection.send(left) :]

    def read(self, count: int) -> bytearray:
        """Return exactly `count` bytes."""
        memory = bytearray(count)
        left = memoryview(memory)
        with self._until_deadline("sent"):
            while left:
                self._limit_wait()
                arrived = self.connection.recv_into(left)
                if not arrived:
                    raise _left(self.peer, clean=not self.begun)
                self.begun = True
                left = left[arrived:]
        return memory

    def _limit_wait(self) -> None:
        """Let the next call on the socket wait until the deadline at most."""
        self.connection.settimeout(max(1e-6, self.deadline - time.monotonic()))  # 0 would not wait for TLS

    @contextlib.contextmanager
    def _until_deadline(self, did: str) -> Iterator[None]:
        """Report the faults of the block, and restore the socket's own time-out."""
        own = self.connection.gettimeout()
        try:
            yield
        except TimeoutError:
            raise PeerSilent(self.peer, f"{did} no whole message in {self.seconds:g} s") from None
        except OSError as error:
            raise PeerGone(self.peer, f"broke the connection ({error.strerror or error})") from None
        finally:
            with contextlib.suppress(OSError):  # closed meanwhile
                self.connection.settimeout(own)


def _address(connection: socket.socket) -> str:
    try:
        name = connection.getpeername()
    except OSError:
        return "?"
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else str(name or "?")
