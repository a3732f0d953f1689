"""What a client and shards say to each other. The transports carry these; over tcp they are frames of `lab.wire`.

    client                     shard 1                  shard 2 (last)
    OPEN(tokens)         ->    OPEN               ->    keeps room                   a text, by its number
                         <---------------------------   OPENED
    PASS(pieces) ids     ->    PASS hidden states ->    computes, samples            chunks follow without waiting
                         <---------------------------   STEPS tokens, or FAULT
    CLOSE                ->    CLOSE              ->    frees the slot

A PASS gets exactly one answer, in order: where one makes no sense, a FAULT takes its place, and the shards behind
hand that on. So does an OPEN; over tcp one for which a shard has no room now waits there in line, is told its place,
and is overtaken by what its client sends later. Shards are asked in the order of their layers, and whoever waits at
one holds room only at those before it: no two texts can wait for each other.

Whatever one text of a PASS does (ids without a row, positions that are not held, NaN, an exception of the model)
stops that text alone: the PASS goes on with the text's name in `stopped`, and so do the STEPS.

The frame's session number is the text's for OPEN and CLOSE, the pass's for PASS, and the same in the answer; no two
messages of a client that await an answer have the same. A PASS says where each of its pieces stands, so that a rewind
costs no message.

Only over tcp: ATTACH, WELCOME, JOIN, ASK and REPORT (`split.transport.tcp`).

Shapes: N positions of all pieces of a pass together, H hidden size.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import Enum, IntEnum
from typing import Annotated

import msgspec

from lab.engine.base import TargetStep, Want
from lab.engine.sampling_head import SAMPLING_BYTES, SamplingHead
from lab.wire import FIRST_APPLICATION_TYPE, Head, MessageKind, MessageTable
from lab.wire.fields import LongText, ShortText, Uint31, Uint32, Uint63

PROTOCOL = range(3, 4)

Count = Annotated[int, msgspec.Meta(ge=1, lt=2**20)]

MAX_PIECES = 512
"""Of a pass; beside each of them a head has room for why it stopped."""
STOPPED_BYTES = 2**15
"""What the reasons of all stopped texts of a pass take together, at most."""
MAX_ADDRESSES = 16


class Open(SamplingHead):
    """A new text, and how its tokens are drawn. Only the last shard draws; the others keep room for it."""

    tokens: Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
    """The most that it will ever hold, prompt included: every shard keeps room for them until CLOSE."""


class Opened(Head):
    """In answer to OPEN: every shard keeps room for the text, or it waits in line at one of them."""

    place: Uint31
    """0: it may begin. 1: it is the first in line; another answer follows each time that this changes."""


class Close(Head):
    """A text is over, or no longer waits."""


class Piece(Head):
    """One text's part of a pass."""

    session: Uint32
    position: Uint31
    """Where its first id stands; what a shard holds from there on is forgotten."""
    count: Count
    is_first: bool
    """Whether its extend begins here."""
    is_last: bool
    """Whether its extend ends here."""


class FaultCode(Enum):
    """Why a text cannot go on, or a message came to nothing."""

    unfit = "unfit"
    """NaN or infinity in its hidden states or logits."""
    full = "full"
    """No slot, or no memory for keys and values."""
    lost = "lost"
    """The shard does not hold the text up to there (it was evicted, or the shard is new): to be rebuilt."""
    refused = "refused"
    """It makes no sense here."""
    link = "link"
    """The shard has lost a neighbour, or cannot reach the next one."""
    failed = "failed"
    """The shard failed."""


class Stopped(Head):
    """A text that cannot go on in this pass. The other texts of the pass do."""

    session: Uint32
    code: FaultCode
    text: ShortText
    """Which layers, and what was wrong."""


AllStopped = Annotated[list[Stopped], msgspec.Meta(max_length=MAX_PIECES)]


class Pass(Head):
    """Several texts advance together. The body holds their ids (4 bytes each) where a shard needs them, then their
    hidden states, both piece by piece."""

    read_all: bool
    """want=all: the last shard gives a step for every id, and needs the ids for that."""
    pieces: Annotated[list[Piece], msgspec.Meta(min_length=1, max_length=MAX_PIECES)]
    stopped: AllStopped = msgspec.field(default_factory=list)
    """The texts that stopped at the shards before: zeros go on in place of their hidden states, and nobody computes
    them."""
    for_words: bool = False
    """Whether one of the texts has words (`lab.text.words`): then the last shard needs the ids for that."""

    @property
    def rows(self) -> int:
        """N."""
        return sum(piece.count for piece in self.pieces)

    @property
    def ids_for_last(self) -> bool:
        """Whether the ids go through to the last shard."""
        return self.read_all or self.for_words

    @property
    def want(self) -> Want:
        """The engine's word for `read_all`."""
        return "all" if self.read_all else "last"


class Steps(Head):
    """What the target says in one pass: the body has the steps of the pieces that are read, in their order."""

    stopped: AllStopped = msgspec.field(default_factory=list)
    """The texts that stopped at any shard; their steps mean nothing."""


class Fault(Head):
    """A message came to nothing: an OPEN, or a PASS that makes no sense as a whole. No text is changed by it."""

    code: FaultCode
    text: LongText


class Attach(Head):
    """The client's first frame to each shard: who it is, and which shard comes next."""

    client: Uint63
    """A random number of this attempt; JOIN names it to the next shard."""
    next: Annotated[list[ShortText], msgspec.Meta(max_length=MAX_ADDRESSES)]
    """Where the next shard may be found, `host:port`; a shard's own `project.next` goes first. Empty: the last one."""
    next_instance: Uint32
    """Which process it must be: the one that the client is attached to."""


class Welcome(Head):
    """A shard's answer to ATTACH and JOIN: what it holds. It comes once the shards behind it have been joined."""

    instance: Uint32
    """A random number of this process."""
    first: Uint31
    last: Uint31
    """Layers first..last - 1."""
    model_layers: Uint31
    context: Uint31
    sessions: Uint31


class Join(Head):
    """A shard's first frame to the next one."""

    client: Uint63


class Ask(Head):
    """A client asks a shard what it needs and how long its passes took."""


class Report(Head):
    """A shard's figures, now. The body holds its last passes: `HOP` each."""

    clock_seconds: float
    """Its monotonic clock when it answered."""
    name: ShortText
    device: ShortText
    weights_bytes: int
    kv_bytes: int
    rss_bytes: int
    peak_rss_bytes: int
    device_memory_used_bytes: int | None
    device_memory_total_bytes: int | None


class MessageType(IntEnum):
    """The frames of the application."""

    open = FIRST_APPLICATION_TYPE
    close = FIRST_APPLICATION_TYPE + 1
    run = FIRST_APPLICATION_TYPE + 2
    steps = FIRST_APPLICATION_TYPE + 3
    fault = FIRST_APPLICATION_TYPE + 4
    attach = FIRST_APPLICATION_TYPE + 5
    welcome = FIRST_APPLICATION_TYPE + 6
    join = FIRST_APPLICATION_TYPE + 7
    ask = FIRST_APPLICATION_TYPE + 8
    report = FIRST_APPLICATION_TYPE + 9
    opened = FIRST_APPLICATION_TYPE + 10


_HEAD_BYTES = 2**16
_TYPE_OF: dict[type[Head], MessageType] = {
    Open: MessageType.open,
    Close: MessageType.close,
    Pass: MessageType.run,
    Steps: MessageType.steps,
    Fault: MessageType.fault,
    Attach: MessageType.attach,
    Welcome: MessageType.welcome,
    Join: MessageType.join,
    Ask: MessageType.ask,
    Report: MessageType.report,
    Opened: MessageType.opened,
}


def message_type(head: Head) -> MessageType:
    """The frame type that carries `head`."""
    return _TYPE_OF[type(head)]


def table(body_bytes: int) -> MessageTable:
    """The frames of both roles; bodies up to `body_bytes`."""
    with_body: dict[type[Head], int] = {
        Pass: _HEAD_BYTES + body_bytes,
        Steps: _HEAD_BYTES + body_bytes,
        Report: 1024 + REPORTED_PASSES * HOP.size,
    }
    small: dict[type[Head], int] = {
        Open: 64 + SAMPLING_BYTES, Opened: 8, Close: 8, Fault: 4096 + 64, Attach: 8192, Welcome: 64, Join: 32, Ask: 8,
    }  # fmt: skip
    kinds: dict[int, MessageKind] = {
        _TYPE_OF[head]: MessageKind(head=head, max_bytes=size) for head, size in small.items()
    }
    kinds |= {_TYPE_OF[head]: MessageKind(head=head, max_bytes=size, has_body=True) for head, size in with_body.items()}
    return MessageTable(kinds)


HOP = struct.Struct("<IdddddI")
"""One pass at one shard: its number; when (monotonic seconds of that machine) it arrived, was begun, was computed, was
handed on; how many of the seconds between the second and the third went into coding; the bytes handed on."""
REPORTED_PASSES = 4096

# Steps as bytes

_STEP = struct.Struct("<idd")


def pack_steps(steps: Sequence[TargetStep]) -> bytes:
    """The body of STEPS: of each step its K next ids with their cross-entropies and margins, then its known `nll`."""
    body = bytearray()
    for step in steps:
        for row in zip(step.next_ids, step.next_nll, step.margin, strict=True):
            body += _STEP.pack(*row)
        body += struct.pack(f"<{len(step.nll)}d", *step.nll)
    return bytes(body)


def unpack_steps(run: Pass, body: bytes | memoryview) -> list[TargetStep]:
    """The steps of the pieces that `run` reads. Raises ValueError unless the body has just these."""
    counts = [piece.count if run.read_all else 1 for piece in run.pieces if run.read_all or piece.is_last]
    expected = sum(counts) * (_STEP.size + (8 if run.read_all else 0))
    if len(body) != expected:
        raise ValueError(f"steps of {sum(counts)} rows must be {expected} bytes, got {len(body)}")
    steps, offset = [], 0
    for count in counts:
        end = offset + count * _STEP.size
        rows = list(_STEP.iter_unpack(body[offset:end]))
        offset = end + (8 * count if run.read_all else 0)
        nll = list(struct.unpack(f"<{count}d", body[end:offset])) if run.read_all else []
        steps.append(TargetStep([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows], nll))
    return steps
