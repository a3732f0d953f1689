"""The protocol of one connection, without its socket: handshake, heartbeats and errors.

Both classes that do IO (`FrameSocket`, `FrameConnection`) only move bytes: received ones in, `outbox` out.
"""

from lab.wire.endpoint import Endpoint
from lab.wire.faults import Peer, PeerFull, PeerGone, PeerRefused, PeerSilent, WireError, printable
from lab.wire.frames import Error, Frame, FrameReader, Head, WireType, encode
from lab.wire.handshake import HANDSHAKE_TABLE, Agreement, ClientHandshake, Handshake, ServerHandshake
from lab.wire.heartbeat import Heartbeat


class Conversation:
    """State of the protocol on one connection. Times are seconds of one monotonic clock."""

    def __init__(self, endpoint: Endpoint, peer: Peer, *, listening: bool, now: float) -> None:
        self.endpoint = endpoint
        self.peer = peer
        self.heartbeat = Heartbeat(endpoint.deadlines, now)
        self.reader = FrameReader(HANDSHAKE_TABLE, payload_bytes=endpoint.limits.handshake_bytes, peer=peer)
        self.outbox: list[bytearray] = []
        """Whole frames to send, oldest first. Those queued once `agreed` is set are heartbeats and may be dropped."""
        self.bytes_received = 0
        self._handshake: Handshake = (ServerHandshake if listening else ClientHandshake)(endpoint, peer)
        peer.phase = "handshake"
        self._answer(self._handshake.opening())

    @property
    def agreed(self) -> Agreement | None:
        """The outcome of the handshake; None before its end."""
        return self._handshake.agreed

    def received(self, count: int, now: float) -> None:
        """Note that `count` bytes were put into `reader.buffer()`."""
        self.bytes_received += count
        self.heartbeat.heard(now)
        self.reader.received(count)

    def next_frame(self, now: float) -> Frame | None:
        """Return the next frame for the application; None when more bytes are needed. Raises a `WireError`."""
        while (frame := self.reader.next_frame()) is not None:
            if frame.type > WireType.error:
                return frame
            self._take(frame, now)
        return None

    def shake_hands(self, now: float) -> bool:
        """Take the handshake's frames and no more; return whether it is over. Raises a `WireError`."""
        while self.agreed is None and (frame := self.reader.next_frame()) is not None:
            self._take(frame, now)
        return self.agreed is not None

    def beat(self, now: float) -> None:
        """Queue a PING when one is due. Raises `PeerSilent` when the peer is dead."""
        if self.agreed is None:
            return
        if self.heartbeat.is_dead(now):
            raise PeerSilent(self.peer, f"has been silent for {self.heartbeat.silent_seconds(now):.1f} s")
        ping = self.heartbeat.due(now)
        if ping is not None:
            self._queue(WireType.ping, ping)

    def farewell(self, error: WireError) -> bytearray | None:
        """Return the ERROR frame with our reason for ending the connection; None if the peer cannot read it."""
        if isinstance(error, (PeerFull, PeerGone, PeerSilent, PeerRefused)):
            return None
        return encode(HANDSHAKE_TABLE, WireType.error, 0, Error(code=type(error).__name__, text=error.what[:1024]))

    def _take(self, frame: Frame, now: float) -> None:
        if isinstance(frame.head, Error):
            if frame.head.code == PeerFull.__name__:
                raise PeerFull(self.peer, printable(frame.head.text))
            raise PeerRefused(self.peer, frame.head.code, frame.head.text)
        if frame.type == WireType.ping:
            self._queue(WireType.pong, frame.head)
        elif frame.type == WireType.pong:
            self.heartbeat.pong(frame.head, now)
        else:
            self._answer(self._handshake.receive(frame))
            if self.agreed is not None:
                self._open()

    def _open(self) -> None:
        self.reader.table = self.endpoint.table
        self.reader.payload_bytes = self.endpoint.limits.payload_bytes
        self.peer.phase = "session"

    def _answer(self, answer: tuple[WireType, Head] | None) -> None:
        if answer is not None:
            self.outbox.append(encode(HANDSHAKE_TABLE, answer[0], 0, answer[1]))

    def _queue(self, number: WireType, head: Head) -> None:
        self.outbox.append(encode(self.endpoint.table, number, 0, head))
