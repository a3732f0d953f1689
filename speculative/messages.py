"""What a drafter and a verifier say to each other, as frames of `lab.wire`. Token ids travel raw, 4 bytes each.

    drafter                                 verifier
                                     <-     WELCOME                     what the target is
    OPEN(sampling, limits) prompt    ->                                 a text, by its number (the frame's session)
    DRAFT(epoch, position) guesses   ->                                 guesses for the places from `position` on
                                     <-     VERDICT(epoch, position, accepted) more ids
                                     <-     SCORES(position, guesses) numbers     only where OPEN asked for them
                                     <-     CLOSE(reason, text)         the text is finished, or refused
    CLOSE(left)                      ->                                 nobody waits for the rest

The verifier owns the text. A VERDICT says how it goes on: from `position` on come the first `accepted` guesses and then
the ids in its body. A guess that was not accepted begins a new epoch, and guesses of an older one are dropped unread:
no DRAFT waits for an answer of its own, so that any number may be under way.

ASK_VOCABULARY and VOCABULARY are spoken only when the tokenizers' fingerprints differ, to name what differs.
"""

from enum import Enum, IntEnum
from typing import Annotated

import msgspec

from lab.wire import FIRST_APPLICATION_TYPE, Head, MessageKind, MessageTable
from lab.wire.fields import LongText, ShortText, Uint32, Uint63
from lab.wire.tokens import TOKEN_BYTES
from speculative.settings import MAX_DRAFT_LENGTH

PROTOCOL = range(1, 2)
MAX_PROMPT_TOKENS = 2**18
MAX_VOCABULARY_BYTES = 2**24
MAX_END_IDS = 16

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


class Reason(Enum):
    """Why a text is closed."""

    end_token = "end_token"
    """The target ended it."""
    length = "length"
    """It has as many new tokens as were asked for."""
    left = "left"
    """The drafter wants no more of it."""
    refused = "refused"
    """It cannot be served: too long, no room, another tokenizer; the text says which."""
    failed = "failed"
    """The two sides do not agree on what the text is, or the target failed."""


class Welcome(Head):
    """What the target is and takes; the verifier's first frame."""

    model: ShortText
    dtype: ShortText
    vocabulary_size: Uint32
    """Guesses are in [0, vocabulary_size)."""
    context: Uint32
    """Most tokens of a text, prompt included."""
    max_draft_length: Uint32
    end_ids: EndIds
    """A text ends with any of these."""


class Open(Head):
    """A new text; the body is its prompt."""

    seed: Uint63
    temperature: float
    top_k: Uint32
    top_p: float
    max_new_tokens: Uint32
    waits: bool
    """True: the verifier checks a DRAFT for every pass (sync). False: it goes on alone (target_only)."""
    threshold: float | None
    """None: rule exact. Else, in nats, what a guess may cost: rule cross_entropy, which is lossy."""
    report: bool
    """Whether SCORES are wanted."""


class Draft(Head):
    """Guesses in the body, for the places from `position` on; none is a wish for the target's next token."""

    epoch: Uint32
    position: Uint32


class Verdict(Head):
    """How the text goes on from `position`: `accepted` guesses, then the ids in the body."""

    epoch: Uint32
    """The epoch from now on."""
    position: Uint32
    accepted: Uint32


class Scores(Head):
    """float32 numbers in the body, little-endian: the cross-entropy of each guess that was looked at (nats), then the
    margin of each new token (`Choice.margins`)."""

    position: Uint32
    guesses: Uint32
    """How many of the numbers are cross-entropies."""


class Close(Head):
    """The last frame of a text."""

    reason: Reason
    text: LongText


class AskVocabulary(Head):
    """Asks for all token texts."""


class Vocabulary(Head):
    """The body is a msgpack list: the text of each id, in order."""


def _ids(count: int) -> int:
    return TOKEN_BYTES * count


TABLE = MessageTable(
    {
        MessageType.open: MessageKind(head=Open, max_bytes=128 + _ids(MAX_PROMPT_TOKENS), has_body=True),
        MessageType.draft: MessageKind(head=Draft, max_bytes=16 + _ids(MAX_DRAFT_LENGTH), has_body=True),
        MessageType.verdict: MessageKind(head=Verdict, max_bytes=32 + _ids(MAX_DRAFT_LENGTH), has_body=True),
        MessageType.scores: MessageKind(head=Scores, max_bytes=32 + 4 * (2 * MAX_DRAFT_LENGTH + 1), has_body=True),
        MessageType.close: MessageKind(head=Close, max_bytes=4 * 1024 + 64),
        MessageType.welcome: MessageKind(head=Welcome, max_bytes=4096),
        MessageType.ask_vocabulary: MessageKind(head=AskVocabulary, max_bytes=16),
        MessageType.vocabulary: MessageKind(head=Vocabulary, max_bytes=MAX_VOCABULARY_BYTES, has_body=True),
    }
)
