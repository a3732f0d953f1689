"""One frame format for everything that crosses machines, with its limits, its handshake and both kinds of sockets.

`Endpoint` says what a side brings; `FrameSocket` (threads) and `FrameServer`, `FrameConnection`, `connect` (asyncio)
speak it. Tensors are in `lab.wire.tensors`, which loads torch.
"""

from lab.wire.endpoint import Deadlines, Endpoint, Fingerprints, common_names_differ
from lab.wire.faults import (
    BadFrame,
    Peer,
    PeerFull,
    PeerGone,
    PeerMismatch,
    PeerRefused,
    PeerSilent,
    TlsRefused,
    Unreachable,
    VersionMismatch,
    WireError,
    WrongKey,
)
from lab.wire.frame_connection import FrameConnection, connect
from lab.wire.frame_server import FrameServer
from lab.wire.frame_socket import FrameSocket
from lab.wire.frames import (
    FIRST_APPLICATION_TYPE,
    MAGIC,
    Frame,
    FrameReader,
    Head,
    Limits,
    MessageKind,
    MessageTable,
    Opening,
    encode,
    sniff,
)
from lab.wire.handshake import Agreement
from lab.wire.listener import check_listener, client_tls, is_loopback, read_key, server_tls
from lab.wire.tokens import TOKEN_BYTES, pack_tokens, unpack_tokens

__all__ = [
    "FIRST_APPLICATION_TYPE",
    "MAGIC",
    "TOKEN_BYTES",
    "Agreement",
    "BadFrame",
    "Deadlines",
    "Endpoint",
    "Fingerprints",
    "Frame",
    "FrameConnection",
    "FrameReader",
    "FrameServer",
    "FrameSocket",
    "Head",
    "Limits",
    "MessageKind",
    "MessageTable",
    "Opening",
    "Peer",
    "PeerFull",
    "PeerGone",
    "PeerMismatch",
    "PeerRefused",
    "PeerSilent",
    "TlsRefused",
    "Unreachable",
    "VersionMismatch",
    "WireError",
    "WrongKey",
    "check_listener",
    "client_tls",
    "common_names_differ",
    "connect",
    "encode",
    "is_loopback",
    "pack_tokens",
    "read_key",
    "server_tls",
    "sniff",
    "unpack_tokens",
]
