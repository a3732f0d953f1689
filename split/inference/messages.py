"""Messages of split inference. The transports carry them; over tcp they are frames of `lab.wire`.

    client                     shard 1                  shard 2 (last)
    OPEN(tokens)         ->    OPEN               ->    keeps room                   a request, by its number
                         <---------------------------   OPENED
    PASS(pieces) ids     ->    PASS hidden states ->    computes, samples            chunks follow without waiting
                         <---------------------------   STEPS tokens, or FAULT
    SETASIDE             ->    SETASIDE           ->    gives its room to any request that needs it
    REOPEN(position) ids ->    REOPEN             ->    another request, from its first tokens on
                         <---------------------------   OPENED, or FAULT: the tokens are not held, or there is no room
    CLOSE                ->    CLOSE              ->    frees the slot

A PASS gets exactly one answer, in order: if it is invalid, a FAULT takes its place, and later shards pass that on. So
does an OPEN. Over tcp, an OPEN for which a shard has no room waits there in line and is told its place; later messages
of its client overtake it. Shards are asked in the order of their layers, and a request that waits at one holds room
only at earlier ones: no two requests can wait for each other.

A fault of one request in a PASS (ids outside the embedding, positions that are not held, NaN, an exception of the
model) stops only that request: the PASS continues with its number in `stopped`, and so do the STEPS.

The frame's session number is the pass's for PASS and the request's for all others, and the same in the answer;
messages of a client that await an answer have distinct numbers. A PASS gives the position of each of its pieces, so a
rewind needs no message.

ATTACH, WELCOME, JOIN, ASK and FAULT are those of every chain (`split.chain.messages`).

Shapes: N positions of all pieces of a pass together, H hidden size.
"""

import struct
from collections.abc import Sequence
from typing import Annotated

import msgspec

from lab.engine.base import TargetStep, Want
from lab.engine.sampling_head import SAMPLING_BYTES, SamplingHead
from lab.wire.fields import ShortText, Uint31, Uint32
from lab.wire.frames import Head, MessageTable
from split.chain.messages import (
    Answer,
    Ask,
    Attach,
    Count,
    Fault,
    FaultCode,
    Join,
    ShardFigures,
    Welcome,
    frame_table,
)
from split.transport.base import HOP_BYTES, REPORTED_PASSES

PROTOCOL = range(6, 7)

MAX_PIECES = 512
"""Most pieces of a pass; the head has room for the reason of each that stopped."""
STOPPED_BYTES = 2**15
"""Most bytes of the reasons of all stopped requests of a pass together."""


class Open(SamplingHead):
    """A new request, and its sampling. Only the last shard samples; the others keep room for it."""

    tokens: Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
    """Most tokens that it will ever hold, prompt included: every shard reserves room for them until CLOSE."""


class Opened(Answer):
    """In answer to OPEN: every shard has room for the request, or it waits in line at one of them."""

    place: Uint31
    """0: it may begin. Else its place in line, 1 being the next; another answer follows each time this changes."""


class Close(Head):
    """A request has ended, or waits no longer."""


class SetAside(Head):
    """A request has ended and may be reopened: until then its slot belongs to any request that needs room."""

    tokens: Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
    """The tokens that it holds, the first ones: room for more is not kept."""


class Reopen(SamplingHead):
    """A new request under the number of one that ended, with its first tokens; it does not wait in line. The body holds
    their ids (4 bytes each) if its sampling has logit rules: the last shard counts them."""

    tokens: Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
    """As in OPEN."""
    position: Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
    """Number of these tokens."""


class Piece(Head):
    """The part of a pass that belongs to one request."""

    session: Uint32
    position: Uint31
    """Position of its first id; a shard forgets everything from there on."""
    count: Count
    is_first: bool
    """Whether an extend of the request begins with this piece."""
    is_last: bool
    """Whether an extend of the request ends with this piece."""


class Stopped(Head):
    """A request that stopped in this pass; the others continue."""

    session: Uint32
    code: FaultCode
    text: ShortText
    """The layers of the shard, and the reason."""


AllStopped = Annotated[list[Stopped], msgspec.Meta(max_length=MAX_PIECES)]


class Pass(Head):
    """Several requests advance together. The body holds their ids (4 bytes each) where a shard needs them, then their
    hidden states, both piece by piece."""

    read_all: bool
    """want=all: the last shard gives a step for every id, and needs the ids for that."""
    pieces: Annotated[list[Piece], msgspec.Meta(min_length=1, max_length=MAX_PIECES)]
    stopped: AllStopped = msgspec.field(default_factory=list)
    """Requests that stopped at earlier shards: zeros take the place of their hidden states, and they are not
    computed."""
    for_logit_rules: bool = False
    """Whether a request has penalties, biases, bad words or a schema (`LogitRules`): then the last shard needs its
    ids."""

    @property
    def rows(self) -> int:
        """N."""
        return sum(piece.count for piece in self.pieces)

    @property
    def ids_for_last(self) -> bool:
        """Whether the ids travel on to the last shard."""
        return self.read_all or self.for_logit_rules

    @property
    def want(self) -> Want:
        """`read_all` in the engine's terms."""
        return "all" if self.read_all else "last"


class Steps(Answer):
    """Results of one pass: the body has the steps of the pieces that are read, in their order."""

    stopped: AllStopped = msgspec.field(default_factory=list)
    """Requests that stopped at any shard; their steps are meaningless."""


class Report(ShardFigures):
    """A shard's present figures. The body holds its last passes, a packed `split.transport.base.Hop` each."""

    name: ShortText
    kv_bytes: int


_PASS_HEAD_BYTES = 2**16


def table(body_bytes: int) -> MessageTable:
    """The frames of both roles; bodies up to `body_bytes`."""
    heads: dict[type[Head], int] = {
        Open: 64 + SAMPLING_BYTES, Close: 8, Pass: _PASS_HEAD_BYTES, Steps: _PASS_HEAD_BYTES, Fault: 4096 + 64,
        Attach: 8192, Welcome: 64, Join: 32, Ask: 8, Report: 1024, Opened: 8, SetAside: 8, Reopen: 72 + SAMPLING_BYTES,
    }  # fmt: skip
    bodies: dict[type[Head], int] = dict.fromkeys((Pass, Steps, Reopen), body_bytes)
    return frame_table(heads, bodies | {Report: REPORTED_PASSES * HOP_BYTES})


# Steps as bytes

_STEP = struct.Struct("<idd")
_TOP = struct.Struct("<id")


def pack_steps(steps: Sequence[TargetStep]) -> bytes:
    """The body of STEPS: of each step its K next ids with their cross-entropies and margins, then its known `nll`, then
    the top tokens of its K rows with their cross-entropies."""
    body = bytearray()
    for step in steps:
        for row in zip(step.next_ids, step.next_nll, step.margin, strict=True):
            body += _STEP.pack(*row)
        body += struct.pack(f"<{len(step.nll)}d", *step.nll)
        for top in step.top:
            for one in top:
                body += _TOP.pack(*one)
    return bytes(body)


def unpack_steps(head: Pass, body: bytes | memoryview, tops: Sequence[int]) -> list[TargetStep]:
    """The steps of the pieces that `head` reads, with `tops[i]` top tokens in each row of piece i.

    Raises ValueError unless the body has just these.
    """
    sizes = [
        (piece.count if head.read_all else 1, top)
        for piece, top in zip(head.pieces, tops, strict=True)
        if head.read_all or piece.is_last
    ]
    nll_size = 8 if head.read_all else 0
    expected = sum(rows * (_STEP.size + nll_size + top * _TOP.size) for rows, top in sizes)
    if len(body) != expected:
        raise ValueError(f"steps of {sum(rows for rows, _ in sizes)} rows must be {expected} bytes, got {len(body)}")
    steps, rest = [], memoryview(body)
    for rows, top in sizes:
        own, rest = rest[: rows * _STEP.size], rest[rows * _STEP.size :]
        next_ids, next_nll, margins = (list(column) for column in zip(*_STEP.iter_unpack(own), strict=True))
        known, rest = rest[: rows * nll_size], rest[rows * nll_size :]
        best, rest = rest[: rows * top * _TOP.size], rest[rows * top * _TOP.size :]
        flat = list(_TOP.iter_unpack(best))
        by_row = [flat[first : first + top] for first in range(0, len(flat), top)] if top else []
        nll = list(struct.unpack(f"<{len(known) // 8}d", known))
        steps.append(TargetStep(next_ids, next_nll, margins, nll, top=by_row))
    return steps
