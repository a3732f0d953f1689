"""The lab's one frame: 16 bytes of header, a head, a body. Bytes in, frames out; knows no socket.

    magic(4) version(1) type(1) head_bytes(2) session(4) payload_bytes(4), network byte order: `!4sBBHII`
    payload = head (a msgspec struct as a msgpack array) + body (raw: token ids, tensors; empty for most types)

`head_bytes` sits in the header so that a reader can place a large body on a boundary that torch likes before it has
read a byte of it. A closed table lists the messages of each role with their largest sizes; it is checked before
anything is allocated.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np

from lab.wire.faults import BadFrame, Peer
from lab.wire.fields import Uint32

MAGIC = b"\xd1LLM"  # as a length it is 3.5 GB: far over the cap of the first protocol, which starts with a length
FORMAT_VERSION = 1
HEADER = struct.Struct("!4sBBHII")
FIRST_APPLICATION_TYPE = 16

BUFFER_BYTES = 64 * 1024  # frames up to here are read through one buffer that is used again and again
ALIGNMENT_BYTES = 64  # what torch gives its own CPU tensors; the rounding of some kernels depends on it


class Head(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """Base of every head: travels as an array of its fields, in order; anything more is refused."""


class WireType(IntEnum):
    """The types of the wire itself; an application's own start at `FIRST_APPLICATION_TYPE`."""

    hello = 1
    challenge = 2
    proof = 3
    ping = 4
    pong = 5
    error = 6


class Ping(Head):
    """A heartbeat; the answer is a `pong` with the same number."""

    number: Uint32


class Error(Head):
    """The reason why the sender ends the connection: `code` for programs, `text` for people."""

    code: Annotated[str, msgspec.Meta(max_length=64)]
    text: Annotated[str, msgspec.Meta(max_length=4096)]


class Frame(NamedTuple):
    """One frame as received: `head` is decoded and checked, `body` is raw and belongs to the receiver."""

    type: int
    session: int
    head: Any
    """The struct that the table names for `type`."""
    body: memoryview


@dataclass(frozen=True, kw_only=True)
class MessageKind:
    """Limits of one type of frame."""

    head: type[Head]
    max_bytes: int
    """Head and body together."""
    has_body: bool = False
    decoder: "msgspec.msgpack.Decoder[Any]" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "decoder", msgspec.msgpack.Decoder(self.head))


class MessageTable:
    """The closed set of frames an application speaks: type -> `MessageKind`. Heartbeats and errors are always in it."""

    def __init__(self, messages: Mapping[int, MessageKind]) -> None:
        for number in messages:
            if not FIRST_APPLICATION_TYPE <= number <= 255:
                raise ValueError(f"message type must be in [{FIRST_APPLICATION_TYPE}, 255], got {int(number)}")
        self.kinds: dict[int, MessageKind] = {int(number): kind for number, kind in messages.items()} | _ALWAYS
        self.names = {int(number): number.name for number in messages if isinstance(number, IntEnum)}
        self.names |= {int(number): number.name for number in WireType}
        self._numbers = {kind.head: number for number, kind in self.kinds.items()}

    def number(self, head: Head) -> int:
        """Return the type whose frames have such a head."""
        return self._numbers[type(head)]

    def name(self, number: int) -> str:
        """Return the name of a type for people, upper case; its number when it has none."""
        return self.names.get(number, f"type {number}").upper()


_ALWAYS = {
    int(WireType.ping): MessageKind(head=Ping, max_bytes=16),
    int(WireType.pong): MessageKind(head=Ping, max_bytes=16),
    int(WireType.error): MessageKind(head=Error, max_bytes=8192 * 4),
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of the memory that a peer can occupy. Each frame type has its own cap as well."""

    handshake_bytes: int
    """Largest payload from a peer that has not yet shown that it holds the key."""
    payload_bytes: int
    """Largest payload of any frame afterwards."""
    backlog_bytes: int
    """Received frames that wait for the application; beyond it the socket is not read (back-pressure)."""
    outgoing_bytes: int
    """Bytes that wait for a peer to read them; beyond it the peer counts as silent."""

    def __post_init__(self) -> None:
        for name in ("handshake_bytes", "payload_bytes", "backlog_bytes", "outgoing_bytes"):
            if not 0 < getattr(self, name) < 2**31:
                raise ValueError(f"{name} must be in [1, 2147483647], got {getattr(self, name)}")


class Opening(Enum):
    """The protocol that the first four bytes of a connection announce."""

    frames = "frames"
    first_protocol = "first_protocol"


def sniff(first_4_bytes: bytes) -> Opening:
    """Tell frames from the first protocol, so that one port serves both.

    Anything but the magic is read as a length of the first protocol, whose own cap refuses wrong ones.
    """
    return Opening.frames if bytes(first_4_bytes) == MAGIC else Opening.first_protocol


_encoder = msgspec.msgpack.Encoder()

Buffer = bytes | bytearray | memoryview


def encode_start(table: MessageTable, number: int, session: int, head: Head, body_bytes: int) -> bytearray:
    """Return header and head of a frame whose body of `body_bytes` follows.

    Raises `ValueError` when the frame is over the cap of its type: the peer would refuse it.
    """
    kind = table.kinds[number]
    assert type(head) is kind.head, f"{table.name(number)} carries {kind.head.__name__}, got {type(head).__name__}"
    assert kind.has_body or not body_bytes, f"{table.name(number)} carries no body"
    start = bytearray(HEADER.size)
    _encoder.encode_into(head, start, HEADER.size)
    head_bytes = len(start) - HEADER.size
    payload_bytes = head_bytes + body_bytes
    if payload_bytes > kind.max_bytes or head_bytes > 0xFFFF:
        raise ValueError(f"{table.name(number)} frame must be at most {kind.max_bytes} bytes, got {payload_bytes}")
    HEADER.pack_into(start, 0, MAGIC, FORMAT_VERSION, number, head_bytes, session, payload_bytes)
    return start


def encode(table: MessageTable, number: int, session: int, head: Head, *body: Buffer) -> bytearray:
    """Return a whole frame as one buffer: one write."""
    frame = encode_start(table, number, session, head, sum(len(part) for part in body))
    for part in body:
        frame += part
    return frame


class FrameReader:
    """Turns the bytes of a socket into frames.

    Loop: let the socket write into `buffer()`, tell `received(count)`, then take `next_frame()` until it is None. A
    frame that fits the shared buffer is copied out of it; a larger one gets memory of its own, after its header passed
    every check.
    """

    def __init__(self, table: MessageTable, *, payload_bytes: int, peer: Peer) -> None:
        self.table = table
        self.payload_bytes = payload_bytes
        self.peer = peer
        self._memory = memoryview(bytearray(BUFFER_BYTES))
        self._start = self._end = 0
        self._header: _Header | None = None
        self._large: memoryview | None = None
        self._large_filled = 0

    @property
    def in_frame(self) -> bool:
        """Whether a frame has begun and not ended: a peer that leaves now leaves in the middle of it."""
        return self._header is not None or self._end > self._start

    def buffer(self) -> memoryview:
        """Return where the next bytes of the connection go; never empty. Take all frames before asking again."""
        if self._large is not None:
            return self._large[self._large_filled :]
        if self._start:
            left = self._end - self._start
            self._memory[:left] = self._memory[self._start : self._end]
            self._start, self._end = 0, left
        return self._memory[self._end :]

    def received(self, count: int) -> None:
        """Note that the first `count` bytes of the last `buffer()` are filled."""
        if self._large is not None:
            self._large_filled += count
        else:
            self._end += count

    def forget(self) -> None:
        """Drop all bytes: the connection is over."""
        self._header = self._large = None
        self._start = self._end = 0

    def next_frame(self) -> Frame | None:
        """Return the next whole frame, or None when more bytes are needed. Raises `BadFrame`."""
        if self._header is None:
            if self._end - self._start < HEADER.size:
                return None
            self._header = self._read_header()
        payload = self._read_payload(self._header)
        if payload is None:
            return None
        header, self._header = self._header, None
        return self._decode(header, payload)

    def _read_header(self) -> "_Header":
        magic, version, number, head_bytes, session, payload_bytes = HEADER.unpack_from(self._memory, self._start)
        if magic != MAGIC:
            raise BadFrame(self.peer, f"sent {magic.hex()} where a frame should begin ({MAGIC.hex()})")
        if version != FORMAT_VERSION:
            raise BadFrame(self.peer, f"sent a frame of format {version}, we read {FORMAT_VERSION}")
        kind = self.table.kinds.get(number)
        if kind is None:
            raise BadFrame(self.peer, f"sent a frame of {self.table.name(number)}, which has no place here")
        cap = min(kind.max_bytes, self.payload_bytes)
        if payload_bytes > cap:
            raise BadFrame(self.peer, f"announced {payload_bytes} bytes of {self.table.name(number)}, cap is {cap}")
        if head_bytes > payload_bytes or (head_bytes < payload_bytes and not kind.has_body):
            raise BadFrame(self.peer, f"sent {self.table.name(number)} with head {head_bytes} of {payload_bytes} bytes")
        self._start += HEADER.size
        return _Header(number, kind, session, head_bytes, payload_bytes)

    def _read_payload(self, header: "_Header") -> Buffer | None:
        if self._large is None:
            if self._end - self._start >= header.payload_bytes:
                payload = bytes(self._memory[self._start : self._start + header.payload_bytes])
                self._start += header.payload_bytes
                return payload
            if HEADER.size + header.payload_bytes <= BUFFER_BYTES:
                return None
            self._begin_large(header)
        assert self._large is not None
        if self._large_filled < header.payload_bytes:
            return None
        large, self._large = self._large, None
        return large

    def _begin_large(self, header: "_Header") -> None:
        arrived = self._end - self._start
        self._large = aligned_memory(header.payload_bytes, header.head_bytes)
        self._large[:arrived] = self._memory[self._start : self._end]
        self._large_filled = arrived
        self._start = self._end = 0

    def _decode(self, header: "_Header", payload: Buffer) -> Frame:
        view = memoryview(payload)
        try:
            head = header.kind.decoder.decode(view[: header.head_bytes])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadFrame(self.peer, f"sent a bad {self.table.name(header.number)} head: {error}") from None
        return Frame(header.number, header.session, head, view[header.head_bytes :])


class _Header(NamedTuple):
    number: int
    kind: MessageKind
    session: int
    head_bytes: int
    payload_bytes: int


def aligned_memory(size_bytes: int, aligned_at: int) -> memoryview:
    """Return fresh memory, pages untouched, whose byte `aligned_at` lies on an `ALIGNMENT_BYTES` boundary."""
    memory = np.empty(size_bytes + ALIGNMENT_BYTES, dtype=np.uint8)
    offset = -(memory.ctypes.data + aligned_at) % ALIGNMENT_BYTES
    return memory.data[offset : offset + size_bytes]
