"""Messages between a drafter and a verifier, as frames of `lab.wire`. Token ids travel raw, 4 bytes each.

    drafter                                  verifier
                                      <-     WELCOME                     the target, and its limits
    OPEN(name, owner, sampling) prompt ->                                a request; the frame's session is its number
    RESUME(the same, new tokens) ids  ->                                 the same request again, on another connection
    DRAFT(epoch, position) ids        ->                                 draft tokens from `position` on
                                      <-     VERDICT(epoch, position, accepted, prefix) ids
                                      <-     SCORES(position, ...) numbers              only if OPEN asked for them
                                      <-     WAITING(place)              the request waits in line for room
                                      <-     CACHED(tokens)              of the prompt, that need not be computed again
                                      <-     CLOSE(reason, text)         the request is finished, or refused
    CLOSE(left)                       ->                                 the drafter needs no more

A request gets room for its prompt and all of its new tokens before it starts. If there is none at the moment, WAITING
reports its place in line, and again when that changes, at most once a second. A request that can never get room is
closed at once.

The verifier owns the text. A VERDICT extends it from `position` on: by the first `accepted` draft tokens, then by the
ids in its body. These are the target's own, from a pass that checked draft tokens or from one without any. Each
VERDICT begins where the one before ended. No DRAFT waits for an answer.

Draft tokens belong to positions. Those of one epoch are consecutive: each DRAFT begins where the one before ended or,
if the text has grown beyond that, at the end of the last VERDICT. Draft tokens for positions that were decided in the
meantime are compared with the text: if they agree they are merely late, and those after them are still good. The
first draft token that differs from the text, in a pass or late, ends the epoch.

Both sides detect that independently. The verifier compares draft tokens with the text as soon as it has both, the
drafter when a VERDICT arrives; they compare the same numbers, so both count the same epochs. After a wrong draft
token the drafter goes back and begins the next epoch at once; the verifier drops later frames of the old epoch by its
number. (A draft token that was made but not sent is made again: only sent ones can end an epoch.)

At most `window` draft tokens (WELCOME) may be sent beyond the end of the last VERDICT: this is a drafter's credit,
which VERDICTs renew.

`prefix` is a 64-bit hash over all ids of the text up to the end of the VERDICT (`prefix_hash`). A drafter with a
different hash holds a different text: it sends RESUME on the same connection, and gives up if that does not help.
Everything can be rebuilt from ids and seed: after a connection has ended, RESUME carries all ids that the drafter
has. A verifier that still has the sequence (which it keeps without computing for it) replies with a VERDICT of all
later tokens; one that does not, because it was restarted, reads the ids like a prompt; then both continue. RESUME
also names the target at which the request began: with other weights, the text would consist of two unequal halves, so
a verifier with other fingerprints (WELCOME) refuses it. Both begin at epoch 0. A random 64-bit name identifies a
request, and it belongs to the client that knows the 128 bits which were sent with the name in OPEN: RESUME by another
client is refused. RESUME may come while the old connection still seems alive: it takes the request over.

In mode sync a pass waits for a DRAFT, possibly an empty one, which asks for the target's next token. `prefix` is left
out: a DRAFT answers each VERDICT, and its position shows whether both sides hold the same number of tokens.

ASK_VOCABULARY and VOCABULARY are sent only if the tokenizers' fingerprints differ, to name the difference.
"""

from enum import Enum, IntEnum
from typing import Annotated

import msgspec

from lab.engine.sampling import MOST_TOP_TOKENS
from lab.engine.sampling_head import SAMPLING_BYTES, SamplingHead
from lab.network import make_endpoint
from lab.settings import NetworkSettings
from lab.wire.endpoint import Endpoint
from lab.wire.fields import LongText, ShortText, Uint32
from lab.wire.frames import FIRST_APPLICATION_TYPE, Head, MessageKind, MessageTable
from lab.wire.tokens import TOKEN_BYTES
from speculative.settings import MAX_DRAFT_LENGTH, Mode

PROTOCOL = range(6, 7)
TOKENIZER = "tokenizer"
"""Name of the fingerprint that both roles send in the handshake."""
MAX_PROMPT_TOKENS = 2**18
MAX_VOCABULARY_BYTES = 2**24
MAX_END_IDS = 16

OWNER_BYTES = 16

Uint64 = Annotated[int, msgspec.Meta(ge=0)]  # the longest integer of msgpack
Owner = Annotated[bytes, msgspec.Meta(min_length=OWNER_BYTES, max_length=OWNER_BYTES)]
Target = Annotated[dict[ShortText, ShortText], msgspec.Meta(max_length=16)]
"""Weights, adapter, dtype, quantisation: everything that a text depends on, by name (`lab.models.fingerprints`)."""
EndIds = Annotated[list[Uint32], msgspec.Meta(max_length=MAX_END_IDS)]


MessageType = IntEnum(
    "MessageType",
    "open draft verdict scores close welcome ask_vocabulary vocabulary resume waiting cached",
    start=FIRST_APPLICATION_TYPE,
)
"""Types of the frames."""


class Reason(Enum):
    """Reasons for CLOSE."""

    end_token = "end_token"
    """The target generated an end token."""
    length = "length"
    """It has as many new tokens as were requested."""
    left = "left"
    """The drafter left, or needs no more."""
    evicted = "evicted"
    """No DRAFT came in time (mode sync)."""
    refused = "refused"
    """It cannot be served: too long, no room, another tokenizer; CLOSE gives the reason."""
    full = "full"
    """There is no room now, and the line is full: it may be asked for again."""
    failed = "failed"
    """The two sides hold different texts, or the target failed."""


TOP_BYTES = 12
"""Bytes of one of the best tokens in SCORES: its id, and its cross-entropy."""
MAX_SCORES_BYTES = 4 * (2 * MAX_DRAFT_LENGTH + 1) + (MAX_DRAFT_LENGTH + 1) * (8 + MOST_TOP_TOKENS * TOP_BYTES)
"""Most bytes of the numbers of one VERDICT."""


class WelcomeFrame(Head):
    """The verifier's first frame: the target, and its limits."""

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
    """Any of these ids ends a text."""
    target: Target
    """A request that began at one target is not resumed at another, even under the same name."""


class OpenFrame(SamplingHead):
    """A new request; the body is its prompt."""

    name: Uint64
    """Random; RESUME finds the request by it."""
    owner: Owner
    """Random, and secret: proves that RESUME comes from the owner."""
    max_new_tokens: Uint32
    mode: Mode
    draft_length: Uint32
    """Most draft tokens of a pass; 0: as many as pay off."""
    threshold: float | None
    """None: rule exact. Else rule cross_entropy (lossy): most nats of cross-entropy of an accepted draft token."""
    report: bool
    """Whether SCORES are requested, with cross-entropies of draft tokens and margins."""
    logprobs: bool
    """Whether SCORES are requested, with cross-entropies of the new tokens and of `top_tokens` alternatives."""


class ResumeFrame(OpenFrame):
    """A request that was opened before; the body is its prompt and the new tokens that the drafter has."""

    new_tokens: Uint32
    """Number of new tokens at the end of the body."""
    target: Target
    """Fingerprints of the target at which the request began, from its WELCOME."""


class DraftFrame(Head):
    """Draft tokens (the body) for the positions from `position` on."""

    epoch: Uint32
    position: Uint32


class VerdictFrame(Head):
    """Extends the text from `position` on: by `accepted` draft tokens, then by the ids in the body."""

    epoch: Uint32
    """The current epoch, as far as the verifier has compared draft tokens."""
    position: Uint32
    accepted: Uint32
    prefix: Uint64 | None
    """`prefix_hash` of the text including these tokens; None in mode sync."""


class ScoresFrame(Head):
    """Numbers in the body, little-endian, for the VERDICT before it (`speculative.scores`). float32: the cross-entropy
    (nats) of each draft token of the pass, up to the first rejected one, then the margin of each new token
    (`Choice.margins`). If OPEN asked for logprobs, float64: the cross-entropy of each new token, then at each new token
    the best ones (`Choice.top`), an int32 id and a number each. The answer to a RESUME has none of these."""

    position: Uint32
    draft_tokens: Uint32
    """Number of cross-entropies of draft tokens."""
    margins: Uint32
    logprobs: Uint32
    """Number of cross-entropies of new tokens."""
    top_tokens: Annotated[int, msgspec.Meta(ge=0, le=MOST_TOP_TOKENS)]
    """Number of best tokens at each of these."""


class WaitingFrame(Head):
    """The request waits in line for room in the target."""

    place: Uint32
    """Place in line; 1: next."""


class CachedFrame(Head):
    """The verifier held the first tokens of the prompt. Comes before the VERDICT from which on it is true; none: 0."""

    tokens: Uint32


class CloseFrame(Head):
    """The last frame of a request."""

    reason: Reason
    text: LongText
    step_seconds: float = 0.0
    """Seconds of a forward pass over one row, as measured; 0: unknown."""
    row_seconds: float = 0.0
    """Seconds of each further row."""


class AskVocabularyFrame(Head):
    """Asks for the texts of all tokens."""


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
        # A pass gives few ids; the answer to a RESUME holds all later tokens.
        MessageType.verdict: MessageKind(head=VerdictFrame, max_bytes=64 + _ids(MAX_PROMPT_TOKENS), has_body=True),
        MessageType.scores: MessageKind(head=ScoresFrame, max_bytes=32 + MAX_SCORES_BYTES, has_body=True),
        MessageType.waiting: MessageKind(head=WaitingFrame, max_bytes=16),
        MessageType.cached: MessageKind(head=CachedFrame, max_bytes=16),
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
