"""A request to a target, and what comes back: verdicts on how the text goes on, its place in line, its end."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from lab.engine.sampling import Sampling
from speculative.messages import Reason
from speculative.settings import Mode


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What is asked of the target."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    max_new_tokens: int
    """Of the whole text, `new_ids` included."""
    mode: Mode
    threshold: float | None
    """None: only exact guesses are accepted. Else also those that cost at most so many nats: lossy."""
    draft_length: int = 0
    """Guesses a round; 0: as many as pay."""
    new_ids: Sequence[int] = ()
    """New tokens that the text has already: it was begun elsewhere."""


@dataclass(frozen=True)
class Verdict:
    """How a text goes on."""

    key: Hashable
    """The text's."""
    epoch: int
    """From now on."""
    position: int
    """Where the first new token stands."""
    accepted: int
    """Guesses that are in the text now: its first new tokens."""
    ids: list[int]
    """The new tokens behind them."""
    prefix: int | None
    """`prefix_hash` of the text, the new tokens included; None in mode sync."""
    guess_nll: list[float]
    """Cross-entropy under the target, in nats, of each guess a pass looked at, up to the first it did not accept."""
    margins: list[float]
    """Of each new token: `Choice.margins`. None of a VERDICT that answers RESUME."""


@dataclass(frozen=True)
class Ended:
    """A text is closed: nothing follows."""

    key: Hashable
    reason: Reason
    text: str
    """For people, when it was refused or failed."""
    step_seconds: float = 0.0
    """What a pass over one row takes, as measured; 0: not known."""
    row_seconds: float = 0.0
    """And each further row."""


@dataclass(frozen=True)
class Waiting:
    """A text waits in line for room in the engine."""

    key: Hashable
    place: int
    """1: it is the next."""


Outcome = Verdict | Ended | Waiting
