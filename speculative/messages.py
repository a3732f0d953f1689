"""What a drafter and a verifier say to each other, as frames of `lab.wire`. Token ids travel raw, 4 bytes each.

    drafter                                  verifier
                                      <-     WELCOME                     what the target is, and what it takes
    OPEN(name, owner, sampling) prompt ->                                a text, by its number (the frame's session)
    RESUME(the same, new tokens) ids  ->                                 the same text again, on another connection
    DRAFT(epoch, position) guesses    ->                                 guesses for the places from `position` on
                                      <-     VERDICT(epoch, position, accepted, prefix) ids
                                      <-     SCORES(position, guesses) numbers     only where OPEN asked for them
                                      <-     WAITING(place)              it stands in line for room
                                      <-     CLOSE(reason, text)         the text is finished, or refused
    CLOSE(left)                       ->                                 nobody waits for the rest, or it has arrived

A text has room for its prompt and all of its new tokens before the first of them is made. Where there is none just now,
WAITING tells its place in line, again when that changes, at most once a second; a text for which there never will be
any is closed at once.

The verifier owns the text. A VERDICT says how it goes on: from `position` on come the first `accepted` guesses and then
the ids in its body, whether the target put them there in a pass that checked guesses or in one that it made alone.
VERDICTs follow each other without a gap, each from where the one before ended. No DRAFT waits for an answer of its own.

Guesses belong to places. Those of one epoch are one run: each DRAFT goes on where the one before ended, or, where the
target has gone further meanwhile, behind the last token that the drafter was told. Guesses for places that have been
decided since they left are compared with what stands there: where they agree they have merely come too late, and what
follows them is as good as ever. The first guess that differs from the text, in a pass or late, ends the epoch.

Both sides see that without being told. The verifier compares guesses with the text when it has both, the drafter when a
VERDICT comes; they compare the same numbers, so that both count the same epochs. Behind a wrong guess the drafter goes
back and begins the next epoch at once; the verifier drops what still comes of the old one by its number alone. (A guess
that was made but not yet sent is simply made anew: only one that was sent can end an epoch.)

At most `window` guesses (WELCOME) may be sent beyond the last place that a VERDICT has told: that is all the credit a
drafter has, and VERDICTs renew it.

`prefix` is a hash of 64 bits over all ids of the text up to the end of the VERDICT (`prefix_hash`). A drafter that has
another one holds another text: it asks for it again by RESUME, on the same connection, and gives up if that does not
help. Everything is rebuilt from ids and seed: after a connection ended, by whatever, RESUME carries all ids that the
drafter was told. A verifier that still has the text (it rests meanwhile: nobody reads what it would become) answers
with a VERDICT of all that came since; one that does not (it was started anew) reads the ids like a prompt; both go on
with it. RESUME also says at which target the text was begun: other weights under the same name would make a text of two
halves, so that a verifier whose fingerprints (WELCOME) are others refuses it. Both begin at epoch 0. A text is named by
64 random bits, and belongs to who knows the 128 that were sent with them in OPEN: RESUME of another's text is refused,
and one that comes while the old connection still seems to live takes the text over.

In mode sync a pass waits for a DRAFT, also an empty one, which is a wish for the target's next token; `prefix` is left
out, since a DRAFT that answers each VERDICT says by its position whether both hold as much.

ASK_VOCABULARY and VOCABULARY are spoken only when the tokenizers' fingerprints differ, to name what differs.
"""

from enum import Enum, IntEnum
from typing import Annotated

import msgspec

from lab.engine.sampling_head import SAMPLING_BYTES, SamplingHead
from lab.wire import FIRST_APPLICATION_TYPE, Head, MessageKind, MessageTable
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
"""What the target's text depends on, by name: weights, adapter, dtype, quantisation (`lab.models.fingerprints`)."""
EndIds = Annotated[list[Uint32], msgspec.Meta(max_length=MAX_END_IDS)]


class MessageType(IntEnum):
    """The frames of the application."""

    open = FIRST_APPLICATION_TYPE
    draft = FIRST_APPLICATION_TYPE + 1
    verdict = FIRST_APPLICATION_TYPE + 2
    scores = FIRST_APPLICATION_TYPE + 3
    close = FIRST_APPLICATION_TYPE + 4
    welcome = FIRST_APPLICATION_TYPE + 5
    ask_vocabulary = FIRST_APPLICATION_TYPE + 6
    vocabulary = FIRST_APPLICATION_TYPE + 7
    resume = FIRST_APPLICATION_TYPE + 8
    waiting = FIRST_APPLICATION_TYPE + 9


class Reason(Enum):
    """Why a text is closed."""

    end_token = "end_token"
    """The target ended it."""
    length = "length"
    """It has as many new tokens as were asked for."""
    left = "left"
    """The drafter wants no more of it."""
    evicted = "evicted"
    """Nobody has sent a DRAFT for it for too long (mode sync)."""
    refused = "refused"
    """It cannot be served: too long, no room, another tokenizer; the text says which."""
    failed = "failed"
    """The two sides do not agree on what the text is, or the target failed."""


class WelcomeFrame(Head):
    """What the target is and takes; the verifier's first frame."""

    model: ShortText
    dtype: ShortText
    vocabulary_size: Uint32
    """Guesses are in [0, vocabulary_size)."""
    context: Uint32
    """Most tokens of a text, prompt included."""
    max_draft_length: Uint32
    """Most guesses in one DRAFT, and in one pass."""
    window: Uint32
    """Most guesses beyond what the drafter knows of the text."""
    end_ids: EndIds
    """A text ends with any of these."""
    target: Target
    """A text that was begun at one target is not resumed at another, whatever its name."""


class OpenFrame(SamplingHead):
    """A new text, and how its tokens are drawn; the body is its prompt."""

    name: Uint64
    """Random; how RESUME finds the text."""
    owner: Owner
    """Random, and secret: who knows it owns the text."""
    max_new_tokens: Uint32
    mode: Mode
    draft_length: Uint32
    """Guesses a round, or as many as pay: 0."""
    threshold: float | None
    """None: rule exact. Else, in nats, what a guess may cost: rule cross_entropy, which is lossy."""
    report: bool
    """Whether SCORES are wanted."""


class ResumeFrame(OpenFrame):
    """A text that was opened before; the body is its prompt and its new tokens as far as the drafter knows them."""

    new_tokens: Uint32
    """How many of the ids in the body are new ones, at its end."""
    target: Target
    """At which the text was begun: WELCOME's word then."""


class DraftFrame(Head):
    """Guesses in the body, for the places from `position` on."""

    epoch: Uint32
    position: Uint32


class VerdictFrame(Head):
    """How the text goes on from `position`: `accepted` guesses, then the ids in the body."""

    epoch: Uint32
    """The epoch from now on, as far as the verifier has seen guesses."""
    position: Uint32
    accepted: Uint32
    prefix: Uint64 | None
    """`prefix_hash` of the text, these tokens included; None in mode sync."""


class ScoresFrame(Head):
    """float32 numbers in the body, little-endian: the cross-entropy of each guess that was looked at (nats), then the
    margin of each new token (`Choice.margins`)."""

    position: Uint32
    guesses: Uint32
    """How many of the numbers are cross-entropies."""


class WaitingFrame(Head):
    """A text stands in line for room in the target."""

    place: Uint32
    """1: it is the next."""


class CloseFrame(Head):
    """The last frame of a text."""

    reason: Reason
    text: LongText
    step_seconds: float = 0.0
    """What a pass of the target over one row takes, as measured; 0: not known."""
    row_seconds: float = 0.0
    """And each further row."""


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
        # Of one pass these are few; the answer to a RESUME holds whatever came since.
        MessageType.verdict: MessageKind(head=VerdictFrame, max_bytes=64 + _ids(MAX_PROMPT_TOKENS), has_body=True),
        MessageType.scores: MessageKind(head=ScoresFrame, max_bytes=32 + 4 * (2 * MAX_DRAFT_LENGTH + 1), has_body=True),
        MessageType.waiting: MessageKind(head=WaitingFrame, max_bytes=16),
        MessageType.close: MessageKind(head=CloseFrame, max_bytes=4 * 1024 + 64),
        MessageType.welcome: MessageKind(head=WelcomeFrame, max_bytes=8192),
        MessageType.ask_vocabulary: MessageKind(head=AskVocabularyFrame, max_bytes=16),
        MessageType.vocabulary: MessageKind(head=VocabularyFrame, max_bytes=MAX_VOCABULARY_BYTES, has_body=True),
    }
)
