"""Properties shared by both kinds of connection, blocking and asyncio."""

from lab.wire.conversation import Conversation
from lab.wire.endpoint import Endpoint
from lab.wire.faults import Peer, WireError
from lab.wire.handshake import Agreement


class PeerConnection:
    """A connection to one peer; the subclass sets `_conversation` before any bytes flow."""

    _conversation: Conversation

    def __init__(self, endpoint: Endpoint, peer: Peer) -> None:
        self.endpoint = endpoint
        self.peer = peer
        self.bytes_sent = 0
        """Bytes handed to the socket so far, headers, handshake and heartbeats included."""
        self._fault: WireError | None = None

    @property
    def agreed(self) -> Agreement:
        """Protocol version and the peer's fingerprints, after the handshake."""
        assert self._conversation.agreed is not None
        return self._conversation.agreed

    @property
    def rtt_seconds(self) -> float | None:
        """Smoothed round-trip time; None before the first PONG was received."""
        return self._conversation.heartbeat.rtt_seconds

    @property
    def bytes_received(self) -> int:
        """Bytes read from the socket so far, headers, handshake and heartbeats included."""
        return self._conversation.bytes_received

    @property
    def fault(self) -> WireError | None:
        """The fault that ended the connection; None while it lives."""
        return self._fault
