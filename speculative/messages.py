"""Messages between a drafter and a verifier, as frames of `lab.wire`. Token ids travel raw, 4 bytes each.

    drafter                                  verifier
                                      <-     WELCOME                     what the target is, and its limits
    OPEN(name, owner, sampling) prompt ->                                a request; the frame's session is its number
    RESUME(the same, new tokens) ids  ->                                 the same request again, on another connection
    DRAFT(epoch, position) ids        ->                                 draft tokens from `position` on
                                      <-     VERDICT(epoch, position, accepted, prefix) ids
                                      <-     SCORES(position, draft_tokens) numbers     only where OPEN asked for them
                                      <-     WAITING(place)              the request stands in line for room
                                      <-     CLOSE(reason, text)         the request is finished, or refused
    CLOSE(left)                       ->                                 the drafter has all it wants

A request has room for its prompt and all of its new tokens before the first of them is made. Where there is none just
now, WAITING tells its place in line, again when that changes, at most once a second; a request for which there never
will be any is closed at once.

The verifier owns the text. A VERDICT says how it goes on: from `position` on come the first `accepted` draft tokens and
then the ids in its body, whether the target put them there in a pass that checked draft tokens or in one without any.
VERDICTs follow each other without a gap, each from where the one before ended. No DRAFT waits for an answer of its own.

Draft tokens belong to positions. Those of one epoch are one run: each DRAFT goes on where the one before ended, or,
where the target has gone further meanwhile, behind the last token of the last VERDICT. Draft tokens for positions that
have been decided since they were sent are compared with the text: where they agree they have merely come too late, and
those behind them are as good as ever. The first draft token that differs from the text, in a pass or late, ends the
epoch.

Both sides see that without being told. The verifier compares draft tokens with the text when it has both, the drafter
when a VERDICT comes; they compare the same numbers, so that both count the same epochs. Behind a wrong draft token the
drafter goes back and begins the next epoch at once; the verifier drops what still comes of the old one by its number
alone. (A draft token that was made but not yet sent is simply made anew: only one that was sent can end an epoch.)

At most `window` draft tokens (WELCOME) may be sent beyond the end of the last VERDICT: that is all the credit a drafter
has, and VERDICTs renew it.

`prefix` is a hash of 64 bits over all ids of the text up to the end of the VERDICT (`prefix_hash`). A drafter that has
another one holds another text: it sends RESUME on the same connection, and gives up if that does not help. Everything
is rebuilt from ids and seed: after a connection ended, for whatever reason, RESUME carries all ids that the drafter
has. A verifier that still has the sequence (it rests meanwhile: nothing is computed for it) answers with a VERDICT of
all that came since; one that does not (it was started anew) reads the ids like a prompt; both go on with it. RESUME
also says at which target the request was begun: other weights under the same name would make a text of two halves, so
that a verifier whose fingerprints (WELCOME) are others refuses it. Both begin at epoch 0. A request is named by 64
random bits, and belongs to the client that knows the 128 which were sent with them in OPEN: RESUME by another client is
refused, and one that comes while the old connection still seems to live takes the request over.

In mode sync a pass waits for a DRAFT, also an empty one, which asks for the target's next token; `prefix` is left out,
since a DRAFT that answers each VERDICT says by its position whether both hold as much.

ASK_VOCABULARY and VOCABULARY are sent only when the tokenizers' fingerprints differ, to name what differs.
"""

from enum import Enum, IntEnum
from typing import Annotated

import msgspec

from lab.engine.sampling_head import SAMPLING_BYTES, SamplingHead
from lab.network import make_endpoint
from lab.settings import NetworkSettings
from lab.wire import FIRST_APPLICATION_TYPE, Endpoint, Head, MessageKind, MessageTable
from lab.wire.fields import LongText, ShortText, Uint32
from lab.wire.tokens import TOKEN_BYTES
from speculative.settings import MAX_DRAFT_LENGTH, Mode

PROTOCOL = range(4, 5)
TOKENIZER = "tokenizer"
"""Name of the fingerprint that both roles show in the handshake."""
MAX_PROMPT_TOKENS = 2**18
MAX_VOCABULARY_BYTES = 2**24
MAX_END_IDS = 16

OWNER_BYTES = 16

Uint64 = Annotated[int, msgspec.Meta(ge=0)]  # msgpack knows no longer one
Owner = Annotated[bytes, msgspec.Meta(min_length=OWNER_BYTES, max_length=OWNER_BYTES)]
Target = Annotated[dict[ShortText, ShortText], msgspec.Meta(max_length=16)]
"""Weights, adapter, dtype, quantisation: all that a text depends on, by name (`lab.models.fingerprints`)."""
EndIds = Annotated[list[Uint32], msgspec.Meta(max_length=MAX_END_IDS)]


MessageType = IntEnum(
    "MessageType",
    "open draft verdict scores close welcome ask_vocabulary vocabulary resume waiting",
    start=FIRST_APPLICATION_TYPE,
)
"""Types of the frames."""


class Reason(Enum):
    """Reasons for CLOSE."""

    end_token = "end_token"
    """The target ended it."""
    length = "length"
    """It has as many new tokens as were asked for."""
    left = "left"
    """The drafter left, or has all it wants."""
    evicted = "evicted"
    """No DRAFT has come for too long (mode sync)."""
    refused = "refused"
    """It cannot be served: too long, no room, another tokenizer; CLOSE says why."""
    failed = "failed"
    """The two sides hold different texts, or the target failed."""


class WelcomeFrame(Head):
    """The verifier's first frame: what the target is, and its limits."""

    model: ShortText
    dtype: ShortText
    vocabulary_size: Uint32
    """Draft tokens are in [0, vocabulary_size)."""
    context: Uint32
    """Most tokens of a text, prompt included."""
    max_draft_length: Uint32
    """Most draft tokens in one DRAFT, and in one pass."""
    window: Uint32
    """Most draft tokens beyond the end of the last VERDICT."""
    end_ids: EndIds
    """A text ends with any of these."""
    target: Target
    """A request that was begun at one target is not resumed at another, whatever its name."""


class OpenFrame(SamplingHead):
    """A new request; the body is its prompt."""

    name: Uint64
    """Random; how RESUME finds the request."""
    owner: Owner
    """Random, and secret: proves that RESUME comes from the owner."""
    max_new_tokens: Uint32
    mode: Mode
    draft_length: Uint32
    """Most draft tokens of a pass; 0: as many as pay."""
    threshold: float | None
    """None: rule exact. Else, in nats, what a draft token may cost: rule cross_entropy, which is lossy."""
    report: bool
    """Whether SCORES are wanted."""


class ResumeFrame(OpenFrame):
    """A request that was opened before; the body is its prompt and the new tokens that the drafter has."""

    new_tokens: Uint32
    """Number of new tokens at the end of the body."""
    target: Target
    """Fingerprints of the target at which the request was begun, as WELCOME showed them."""


class DraftFrame(Head):
    """Draft tokens, in the body, for the positions from `position` on."""

    epoch: Uint32
    position: Uint32


class VerdictFrame(Head):
    """How the text goes on from `position`: `accepted` draft tokens, then the ids in the body."""

    epoch: Uint32
    """The epoch from now on, as far as the verifier has compared draft tokens."""
    position: Uint32
    accepted: Uint32
    prefix: Uint64 | None
    """`prefix_hash` of the text, these tokens included; None in mode sync."""


class ScoresFrame(Head):
    """float32 numbers in the body, little-endian: the cross-entropy of each draft token of the pass (nats), up to the
    first that was rejected, then the margin of each new token (`Choice.margins`)."""

    position: Uint32
    draft_tokens: Uint32
    """Number of cross-entropies."""


class WaitingFrame(Head):
    """The request stands in line for room in the target."""

    place: Uint32
    """1: it is the next."""


class CloseFrame(Head):
    """The last frame of a request."""

    reason: Reason
    text: LongText
    step_seconds: float = 0.0
    """Seconds of a forward pass over one row, as measured; 0: not known."""
    row_seconds: float = 0.0
    """Seconds of each further row."""


class AskVocabularyFrame(Head):
    """Asks for all token texts."""


class VocabularyFrame(Head):
    """The body is a msgpack list: the text of each id, in order."""


def _ids(count: int) -> int:
    return TOKEN_BYTES * count


TABLE = MessageTable(
    {
        MessageType.open: MessageKind(
            head=OpenFrame, max_bytes=128 + SAMPLING_BYTES + _ids(MAX_PROMPT_TOKENS), has_body=True
        ),
        MessageType.draft: MessageKind(head=DraftFrame, max_bytes=16 + _ids(MAX_DRAFT_LENGTH), has_body=True),
        MessageType.resume: MessageKind(
            head=ResumeFrame, max_bytes=4096 + SAMPLING_BYTES + _ids(MAX_PROMPT_TOKENS), has_body=True
        ),
        # A pass gives few ids; the answer to a RESUME holds all that came since.
        MessageType.verdict: MessageKind(head=VerdictFrame, max_bytes=64 + _ids(MAX_PROMPT_TOKENS), has_body=True),
        MessageType.scores: MessageKind(head=ScoresFrame, max_bytes=32 + 4 * (2 * MAX_DRAFT_LENGTH + 1), has_body=True),
        MessageType.waiting: MessageKind(head=WaitingFrame, max_bytes=16),
        MessageType.close: MessageKind(head=CloseFrame, max_bytes=4 * 1024 + 64),
        MessageType.welcome: MessageKind(head=WelcomeFrame, max_bytes=8192),
        MessageType.ask_vocabulary: MessageKind(head=AskVocabularyFrame, max_bytes=16),
        MessageType.vocabulary: MessageKind(head=VocabularyFrame, max_bytes=MAX_VOCABULARY_BYTES, has_body=True),
    }
)


def make_side(network: NetworkSettings, role: str, tokenizer: str) -> Endpoint:
    """One side of the wire, the `drafter` or the `verifier`; `tokenizer` is the fingerprint of its tokenizer.

    Tokenizers that differ do not end the handshake: the drafter asks for the vocabulary, and names the id that differs.
    """
    return make_endpoint(
        network,
        role=role,
        peer_roles=frozenset({"drafter", "verifier"} - {role}),
        table=TABLE,
        protocol=PROTOCOL,
        fingerprints={TOKENIZER: tokenizer},
        difference=lambda ours, theirs: None,
    )
