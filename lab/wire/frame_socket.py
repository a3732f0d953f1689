"""The blocking end of a wire: a thread waits in `recv`, any thread may `send`. For drafters, clients, benchmarks."""

import contextlib
import math
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from typing import Self

from lab.wire.conversation import Conversation
from lab.wire.endpoint import Endpoint
from lab.wire.faults import Peer, PeerGone, PeerSilent, WireError, unreachable
from lab.wire.frames import Buffer, Frame, Head, encode_start
from lab.wire.listener import explain_hangup, tls_refused
from lab.wire.peer_connection import PeerConnection
from lab.wire.waiting import ReadWaiter, can_write

JOIN_BYTES = 64 * 1024  # below it one copy is cheaper than a gathering write
_WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class FrameSocket(PeerConnection):
    """A connection that has agreed on key, version and fingerprints. A context manager: it closes its socket.

    `recv` and `poll` send and check heartbeats: a client that must notice a dead peer, and not look dead itself, keeps
    one thread in them. The socket never blocks; every wait has a deadline.
    """

    def __init__(self, connected: socket.socket, endpoint: Endpoint, peer: Peer, *, listening: bool) -> None:
        """Take over `connected` and shake hands. Raises a `WireError` after closing the socket."""
        super().__init__(endpoint, peer)
        self._socket = connected
        self._gathers = hasattr(connected, "sendmsg") and not isinstance(connected, ssl.SSLSocket)
        self._sending = threading.Lock()
        self._io = threading.Lock()  # OpenSSL wants one call at a time; no call under it waits
        connected.setblocking(False)
        self._arrival = ReadWaiter(connected)
        if connected.family in (socket.AF_INET, socket.AF_INET6):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._conversation = Conversation(endpoint, peer, listening=listening, now=time.monotonic())
        try:
            self._shake_hands()
        except WireError as error:
            raise self._end(error) from None

    @classmethod
    def connect(cls, host: str, port: int, endpoint: Endpoint, *, tls: ssl.SSLContext | None) -> Self:
        """Connect and shake hands. Raises `Unreachable`, `TlsRefused` or what the handshake found; one attempt."""
        peer = Peer(role=endpoint.expected_role, address=f"{host}:{port}", phase="connect")
        seconds = endpoint.deadlines.connect_seconds
        try:
            connected = socket.create_connection((host, port), timeout=seconds)
        except OSError as error:
            raise unreachable(peer, error, seconds) from None
        if tls is not None:
            connected = _wrap(connected, tls, host, peer, endpoint.deadlines.handshake_seconds)
        try:
            return cls(connected, endpoint, peer, listening=False)
        except PeerGone as gone:
            raise (explain_hangup(gone, host, port, seconds) if tls is None else gone) from None

    def send(self, number: int, session: int, head: Head, *body: Buffer) -> None:
        """Send one frame in one write. Any thread; whole frames of several threads never mix.

        Raises `PeerSilent` when the peer does not take it in time, `PeerGone`, or what ended the connection before.
        """
        start = encode_start(self.endpoint.table, number, session, head, sum(map(len, body)))
        try:
            with self._sending:
                self._write([start, *body])
        except WireError as error:
            raise self._end(error) from None

    def recv(self) -> Frame:
        """Return the next frame of the application. Waits as long as the peer lives. One thread at a time.

        Raises `PeerSilent`, `PeerGone`, `PeerRefused`, `BadFrame`.
        """
        frame = self.poll(math.inf)
        assert frame is not None
        return frame

    def poll(self, timeout_seconds: float) -> Frame | None:
        """Return the next frame, None when none came in time. Raises as `recv`; one thread at a time."""
        deadline = time.monotonic() + timeout_seconds
        try:
            while True:
                frame = self._conversation.next_frame(time.monotonic())
                self._flush()
                if frame is not None or not self._await_bytes(deadline):
                    return frame
                self._read()
        except WireError as error:
            raise self._end(error) from None

    def close(self) -> None:
        """Close the connection; a thread in `recv` gets `PeerGone`. Closing twice does nothing."""
        if self._fault is None:
            self._fault = PeerGone(self.peer, "was left by us")
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the threads that wait for it
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _shake_hands(self) -> None:
        deadline = time.monotonic() + self.endpoint.deadlines.handshake_seconds
        while not self._conversation.shake_hands(time.monotonic()):
            self._flush()
            if not self._await_bytes(deadline):
                seconds = self.endpoint.deadlines.handshake_seconds
                raise PeerSilent(self.peer, f"did not finish the handshake in {seconds:g} s")
            self._read()
        self._flush()

    def _read(self) -> None:
        """Take what has arrived."""
        try:
            with self._io:
                count = self._socket.recv_into(self._conversation.reader.buffer())
        except _WOULD_BLOCK:
            return
        except OSError as error:
            raise PeerGone(self.peer, f"broke the connection ({error.strerror or error})") from None
        if not count:
            where = " in the middle of a frame" if self._conversation.reader.in_frame else ""
            raise PeerGone(self.peer, f"closed the connection{where}")
        self._conversation.received(count, time.monotonic())

    def _await_bytes(self, deadline: float) -> bool:
        """Wait for bytes, sending heartbeats; return False at the deadline."""
        while True:
            until = min(deadline, self._conversation.heartbeat.next_event())
            if self._can_read(max(0.0, until - time.monotonic())):
                return True
            now = time.monotonic()
            self._conversation.beat(now)  # after reading: unread bytes are no silence
            self._flush()
            if now >= deadline:
                return False

    def _can_read(self, timeout_seconds: float) -> bool:
        if isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():  # read already, below us
            return True
        return self._arrival.wait(timeout_seconds)

    def _flush(self) -> None:
        """Send the conversation's frames, unless that would wait: bytes in transit also prove that we are alive."""
        outbox = self._conversation.outbox
        if not outbox:
            return
        if self._sending.acquire(blocking=False):
            try:
                if can_write(self._socket, 0):
                    self._write([b"".join(outbox)])
            finally:
                self._sending.release()
        outbox.clear()

    def _write(self, parts: Sequence[Buffer]) -> None:
        """Write `parts` as one; the caller holds `_sending`."""
        if self._fault is not None:
            raise self._fault
        if not self._gathers or sum(map(len, parts)) <= JOIN_BYTES:
            parts = [b"".join(parts)]
        deadline = time.monotonic() + self.endpoint.deadlines.send_seconds
        left = [memoryview(part) for part in parts]
        while left:
            count = self._write_some(left)
            if count is None:
                self._await_room(deadline)
            else:
                self.bytes_sent += count
                left = _without(left, count)

    def _write_some(self, parts: list[memoryview]) -> int | None:
        """Write as much as the socket takes without waiting; return the number of bytes, None if it takes none."""
        try:
            with self._io:
                return self._socket.send(parts[0]) if len(parts) == 1 else self._socket.sendmsg(parts)
        except _WOULD_BLOCK:
            return None
        except OSError as error:
            raise PeerGone(self.peer, f"broke the connection ({error.strerror or error})") from None

    def _await_room(self, deadline: float) -> None:
        if not can_write(self._socket, max(0.0, deadline - time.monotonic())):
            seconds = self.endpoint.deadlines.send_seconds
            raise PeerSilent(self.peer, f"took nothing of what we sent for {seconds:g} s")

    def _end(self, error: WireError) -> WireError:
        """End the connection; return the reason. Every thread sees the first one."""
        if self._fault is None:
            self._fault = error
            self._send_farewell(error)
            self.close()
        return self._fault

    def _send_farewell(self, error: WireError) -> None:
        farewell = self._conversation.farewell(error)
        if farewell is not None and self._sending.acquire(blocking=False):
            with contextlib.suppress(OSError), self._io:
                self._socket.send(farewell)
            self._sending.release()


def _without(parts: list[memoryview], count: int) -> list[memoryview]:
    """Return `parts` less their first `count` bytes."""
    for index, part in enumerate(parts):
        if count < len(part):
            return [part[count:], *parts[index + 1 :]]
        count -= len(part)
    return []


def _wrap(connected: socket.socket, tls: ssl.SSLContext, host: str, peer: Peer, seconds: float) -> ssl.SSLSocket:
    peer.phase = "TLS handshake"
    connected.settimeout(seconds)
    try:
        return tls.wrap_socket(connected, server_hostname=host)
    except OSError as error:  # ssl.SSLError and time-outs are
        connected.close()
        raise tls_refused(peer, error) from None
