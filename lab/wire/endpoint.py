"""Properties of one side of a wire: its role, its protocol versions, its limits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lab.wire.frames import Limits, MessageTable

Fingerprints = Mapping[str, str]


def common_names_differ(ours: Fingerprints, theirs: Fingerprints) -> str | None:
    """Return the first fingerprint of both sides that differs, for people; None if all are equal."""
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name] != theirs[name]:
            return f"{name} {theirs[name]}, ours is {ours[name]}"
    return None


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """Time limits for a peer, in seconds."""

    connect_seconds: float
    """For one attempt to reach it."""
    handshake_seconds: float
    """From the connection to the last frame of the handshake, TLS included."""
    send_seconds: float
    """For the peer to receive what we send."""
    ping_seconds: float
    """Between two PINGs."""
    dead_seconds: float
    """After this time without a byte the peer counts as dead. At least two PING intervals."""

    def __post_init__(self) -> None:
        for name in ("connect_seconds", "handshake_seconds", "send_seconds", "ping_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.dead_seconds < 2 * self.ping_seconds:
            least = 2 * self.ping_seconds
            raise ValueError(f"dead_seconds must be at least 2 x ping_seconds = {least}, got {self.dead_seconds}")


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One side of the wire, as given by its settings and its model."""

    role: str
    """Our role: "drafter", "verifier", "shard"."""
    peer_roles: frozenset[str]
    """Accepted roles of the peer."""
    key: bytes = field(repr=False)
    """The shared key; empty only on loopback (`check_listener`)."""
    table: MessageTable
    """The frames of the application."""
    protocol: range
    """The versions of the application's protocol that we speak; the newest common one is used."""
    limits: Limits
    deadlines: Deadlines
    fingerprints: Fingerprints = field(default_factory=dict)
    """Digests that must be equal on both sides (tokenizer, tensors). The peer sees them before it shows the key."""
    difference: Callable[[Fingerprints, Fingerprints], str | None] = common_names_differ
    """Compares our fingerprints with the peer's: None to accept, else what differs, for the peer to read."""

    def __post_init__(self) -> None:
        if not self.protocol or self.protocol.step != 1:
            raise ValueError(f"protocol must be a range of versions with step 1, got {self.protocol}")

    @property
    def expected_role(self) -> str:
        """Name for a peer that has not announced its role yet."""
        return next(iter(self.peer_roles)) if len(self.peer_roles) == 1 else "peer"
