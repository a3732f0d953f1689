"""Both sides show that they hold the key, agree on a version and compare fingerprints. Knows no socket.

    client                                server
    HELLO(statement)               ->
                                   <-     CHALLENGE(statement, HMAC(key, "server" + transcript))
    PROOF(HMAC(key, "client" + transcript)) ->              and frames of the application may follow at once

A statement holds a fresh nonce, the versions, the role and the fingerprints of a side; the transcript is both
statements, byte for byte, each after its length. So neither an old recording nor the peer's own proof sent back is of
any use. What follows is not authenticated: that is TLS's work.
"""

import hashlib
import hmac
import secrets
import struct
from typing import Annotated

import msgspec

from lab.wire.endpoint import Endpoint
from lab.wire.faults import BadFrame, Peer, PeerMismatch, VersionMismatch, WrongKey, printable
from lab.wire.frames import Frame, Head, MessageKind, MessageTable, WireType

NONCE_BYTES = 32
MAC_BYTES = hashlib.sha256().digest_size

Version = Annotated[int, msgspec.Meta(ge=0, lt=2**16)]
Mac = Annotated[bytes, msgspec.Meta(min_length=MAC_BYTES, max_length=MAC_BYTES)]
Name = Annotated[str, msgspec.Meta(max_length=64)]
Value = Annotated[str, msgspec.Meta(max_length=2**16)]


class Statement(Head):
    """The announcement of one side."""

    nonce: Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
    oldest: Version
    newest: Version
    role: Name
    fingerprints: Annotated[dict[Name, Value], msgspec.Meta(max_length=32)]


class Hello(Head):
    """The client's statement, encoded: its very bytes are what both sides sign."""

    statement: bytes


class Challenge(Head):
    """The server's statement and its proof."""

    statement: bytes
    mac: Mac


class Proof(Head):
    """The client's proof."""

    mac: Mac


class _HandshakeTable(MessageTable):
    def __init__(self) -> None:
        super().__init__({})
        error = self.kinds[WireType.error]
        any_size = 2**31  # the cap before the end of the handshake is `Limits.handshake_bytes`
        self.kinds = {
            int(WireType.hello): MessageKind(head=Hello, max_bytes=any_size),
            int(WireType.challenge): MessageKind(head=Challenge, max_bytes=any_size),
            int(WireType.proof): MessageKind(head=Proof, max_bytes=any_size),
            int(WireType.error): error,
        }


HANDSHAKE_TABLE = _HandshakeTable()

_decoder = msgspec.msgpack.Decoder(Statement)


class Handshake:
    """The common part of both sides of a handshake. `agreed` is None until it is over."""

    def __init__(self, endpoint: Endpoint, peer: Peer) -> None:
        self.endpoint = endpoint
        self.peer = peer
        self.agreed: Agreement | None = None
        protocol = endpoint.protocol
        self._ours = msgspec.msgpack.encode(
            Statement(
                nonce=secrets.token_bytes(NONCE_BYTES),
                oldest=protocol[0],
                newest=protocol[-1],
                role=endpoint.role,
                fingerprints=dict(endpoint.fingerprints),
            )
        )

    def opening(self) -> tuple[WireType, Head] | None:
        """Return the frame that begins the handshake, if this side sends it."""
        return None

    def receive(self, frame: Frame) -> tuple[WireType, Head] | None:
        """Take a frame of the peer, return the answer, if any. Raises a `WireError` when the peer is refused."""
        raise NotImplementedError

    def _read_statement(self, encoded: bytes) -> Statement:
        try:
            return _decoder.decode(encoded)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadFrame(self.peer, f"sent a bad statement: {error}") from None

    def _mac(self, side: bytes, client: bytes, server: bytes) -> bytes:
        transcript = struct.pack("!I", len(client)) + client + struct.pack("!I", len(server)) + server
        return hmac.digest(self.endpoint.key, side + transcript, "sha256")

    def _check_mac(self, side: bytes, mac: bytes, client: bytes, server: bytes) -> None:
        if not hmac.compare_digest(mac, self._mac(side, client, server)):
            raise WrongKey(self.peer, "does not hold the same key as we do")

    def _check_versions(self, theirs: Statement) -> int:
        ours = self.endpoint.protocol
        newest = min(ours[-1], theirs.newest)
        if newest < max(ours[0], theirs.oldest):
            spoken = f"speaks protocol {theirs.oldest} to {theirs.newest}, we speak {ours[0]} to {ours[-1]}"
            raise VersionMismatch(self.peer, spoken)
        return newest

    def _agree(self, theirs: Statement) -> None:
        version = self._check_versions(theirs)
        if theirs.role not in self.endpoint.peer_roles:
            talk_to = ", ".join(sorted(self.endpoint.peer_roles))
            raise PeerMismatch(self.peer, f"is a {printable(theirs.role)}, we talk to {talk_to}")
        self.peer.role = theirs.role
        difference = self.endpoint.difference(self.endpoint.fingerprints, theirs.fingerprints)
        if difference is not None:
            raise PeerMismatch(self.peer, f"has {printable(difference)}")
        self.agreed = Agreement(version=version, fingerprints=theirs.fingerprints)


class Agreement(msgspec.Struct, frozen=True):
    """The outcome of a finished handshake."""

    version: int
    """The newest version of the application's protocol that both sides speak."""
    fingerprints: dict[str, str]
    """The peer's."""


class ClientHandshake(Handshake):
    """The side that connected."""

    def opening(self) -> tuple[WireType, Head]:
        """Return HELLO."""
        return WireType.hello, Hello(statement=self._ours)

    def receive(self, frame: Frame) -> tuple[WireType, Head]:
        """Take CHALLENGE, return PROOF. Raises `WrongKey`, `VersionMismatch`, `PeerMismatch`, `BadFrame`."""
        if not isinstance(frame.head, Challenge):
            raise BadFrame(self.peer, f"sent {HANDSHAKE_TABLE.name(frame.type)} where CHALLENGE was due")
        server = frame.head.statement
        self._check_mac(b"server", frame.head.mac, self._ours, server)
        self._agree(self._read_statement(server))
        return WireType.proof, Proof(mac=self._mac(b"client", self._ours, server))


class ServerHandshake(Handshake):
    """The side that listens."""

    _hello: bytes | None = None

    def receive(self, frame: Frame) -> tuple[WireType, Head] | None:
        """Take HELLO, return CHALLENGE; take PROOF, return None. Raises as the client's side does."""
        if self._hello is None and isinstance(frame.head, Hello):
            self._hello = frame.head.statement
            self._check_versions(self._read_statement(self._hello))
            return WireType.challenge, Challenge(self._ours, self._mac(b"server", self._hello, self._ours))
        if self._hello is not None and isinstance(frame.head, Proof):
            self._check_mac(b"client", frame.head.mac, self._hello, self._ours)
            self._agree(self._read_statement(self._hello))
            return None
        due = "HELLO" if self._hello is None else "PROOF"
        raise BadFrame(self.peer, f"sent {HANDSHAKE_TABLE.name(frame.type)} where {due} was due")
