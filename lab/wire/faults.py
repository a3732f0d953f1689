"""Faults of a connection. Every message names the peer, the event and the phase."""

import socket
from dataclasses import dataclass

from lab.faults import Lost


@dataclass
class Peer:
    """The other end of a connection and the current phase, for the messages of all faults."""

    role: str
    """Role of the peer: "verifier", "drafter", "shard"; "peer" until it is known."""
    address: str
    """`host:port` of the other end."""
    phase: str
    """The current phase: "connect", "handshake", "DRAFT"; the owner of the connection keeps it up to date."""
    state: str = ""
    """More about the phase for the reader of an error: "epoch 3, position 118"; empty when there is nothing to add."""

    def __str__(self) -> str:
        return f"{self.role} {self.address}"


class WireError(Lost):
    """A fault between us and one peer; ends that connection and nothing else."""

    def __init__(self, peer: Peer, what: str) -> None:
        self.role, self.address, self.phase, self.state = peer.role, peer.address, peer.phase, peer.state
        self.what = what
        state = f" ({peer.state})" if peer.state else ""
        super().__init__(f"{peer} {what} during {peer.phase}{state}")


class _SettingsFault(WireError):
    """A fault of the settings, not of the network: another address, key, certificate, version or model."""

    exit_code = 2


class Unreachable(_SettingsFault):
    """Nobody answered at that address in time."""


def unreachable(peer: Peer, error: OSError, seconds: float) -> Unreachable:
    """The fault of an attempt to connect. Its text names `seconds` only where they ran out."""
    if isinstance(error, socket.gaierror):
        return Unreachable(peer, f"has a name that does not resolve ({error.strerror})")
    if isinstance(error, TimeoutError) and not error.errno:
        return Unreachable(peer, f"did not answer within {seconds:g} s")
    return Unreachable(peer, f"could not be reached ({error})")


class PeerGone(WireError):
    """The peer closed or reset the connection."""


class PeerSilent(WireError):
    """The peer is connected but missed a deadline: a handshake, a heartbeat, room for what we send."""


class PeerRefused(WireError):
    """The peer gave its reason in an ERROR frame and ends the connection; `code` is the reason for programs."""

    def __init__(self, peer: Peer, code: str, text: str) -> None:
        self.code = code
        self.exit_code = 2 if code in {kind.__name__ for kind in _SettingsFault.__subclasses__()} else 1
        super().__init__(peer, f"refused ({printable(code)}): {printable(text)}")


class PeerFull(WireError):
    """The peer has reached its limit of connections; a later attempt may succeed."""


class BadFrame(WireError):
    """The peer sent bytes that are not a frame we accept; nothing was allocated for them."""


class WrongKey(_SettingsFault):
    """The peer does not hold our key."""


class VersionMismatch(_SettingsFault):
    """The two ends have no protocol version in common."""


class TlsRefused(_SettingsFault):
    """TLS could not be agreed on: another certificate, another name, no TLS at the other end."""


class PeerMismatch(_SettingsFault):
    """The peer has a role we do not talk to, or another model, tokenizer or revision."""


def printable(text: str) -> str:
    """Return `text` fit for a terminal and a log line: what a peer sent may hold control characters."""
    return "".join(c if c.isprintable() else "?" for c in text)
