"""What continues texts behind the server, wherever its model runs, and the events of a text on its way."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from speculative.request import GenerationRequest

Top = Sequence[tuple[int, float]]
"""The most probable tokens of one position with their cross-entropies, in nats, best first."""


@dataclass(frozen=True)
class NewTokens:
    """Tokens that continue a text."""

    ids: Sequence[int]
    guesses: int
    """The first so many were draft tokens that the target accepted."""
    nll: Sequence[float] = ()
    """Cross-entropy of each token, in nats; empty unless asked for."""
    top: Sequence[Top] = ()
    """Alternatives of each token; empty unless asked for."""
    cached_tokens: int = 0
    """Tokens of the prompt that were not computed again; the same in every event."""


@dataclass(frozen=True)
class PromptTokens:
    """The prompt under the model, before its text: cross-entropies and alternatives of all its tokens but the first."""

    nll: Sequence[float]
    top: Sequence[Top]


@dataclass(frozen=True)
class InLine:
    """The text waits for room."""

    place: int
    """1: next."""


@dataclass(frozen=True)
class Ended:
    """The last event of a text."""

    fault: str = ""
    """Why it could not be continued; empty: it is complete."""
    is_refused: bool = False
    """Whether the request is to blame."""
    is_full: bool = False
    """Whether there was no room for it, and there may be later."""


Event = NewTokens | PromptTokens | InLine | Ended
Receive = Callable[[Event], None]


@dataclass
class Counts:
    """Counts of a writer, for /metrics and the page."""

    running: int = 0
    waiting: int = 0
    passes: int = 0
    drafts_checked: int = 0
    drafts_accepted: int = 0
    prefix_asked: int = 0
    """Prompt tokens that the prefix cache was asked for."""
    prefix_found: int = 0
    new_tokens: int = 0
    """Tokens that continued texts."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """One process that works on texts, for the page. None: not known, or nothing of the kind."""

    role: str
    """model (a whole one, in the server), shard, drafter or verifier."""
    name: str
    """Name or address."""
    device: str | None = None
    layers: tuple[int, int] | None = None
    """First layer, and the one after the last."""
    weights_bytes: int | None = None
    cache_bytes: int | None = None
    """Size of its keys and values."""
    rss_bytes: int | None = None
    device_memory_used_bytes: int | None = None
    compute_seconds: float | None = None
    """Median of its own part of the last passes."""
    hop_seconds: float | None = None
    """Median time from the place before it to this one; from and to it, for a verifier."""


class Writer(Protocol):
    """A model that continues texts. Its methods are called in the event loop's thread, and so are receivers."""

    vocabulary_size: int
    context: int
    """Most tokens of a text, prompt included."""
    end_ids: Sequence[int]
    fingerprints: dict[str, str]
    """All that a text depends on, by name."""
    scores_prompts: bool
    """Whether it gives the log probabilities of a prompt's own tokens."""
    finished: Future[None]
    """Done when it can continue no more texts; holds the exception that ended it, if one did."""

    def check_schema(self, schema: str) -> None:
        """ValueError for a JSON schema that texts here cannot follow; an empty one is none."""

    def begin(self, key: Hashable, request: GenerationRequest, client: str, user: str, receive: Receive) -> None:
        """Continue a text under a new key; `receive` gets its events in order, the last one is `Ended`.

        Room is shared by clients, and that of a client by its users (`speculative.verifier.line`)."""

    def leave(self, key: Hashable) -> None:
        """Stop a text: no row is computed for it any more, and nothing more is received. Unknown keys do nothing."""

    def counts(self) -> Counts:
        """Its counts now."""

    def places(self) -> Sequence[Place]:
        """The processes that work on its texts, as last seen. Asking is what has them looked at again."""

    def start(self) -> None:
        """Begin to work."""

    def close(self) -> None:
        """End all texts."""
