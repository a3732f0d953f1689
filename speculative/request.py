"""A request to a target, and its outcomes: verdicts, places in line, the end."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from lab.engine.sampling import Sampling
from speculative.messages import Reason
from speculative.settings import Mode


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A prompt, and how the target is to continue it."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    max_new_tokens: int
    """Counts `new_ids`, too."""
    mode: Mode
    threshold: float | None
    """None: rule exact. Else, in nats, what a draft token may cost: rule cross_entropy, which is lossy."""
    draft_length: int = 0
    """Draft tokens of a pass at most; 0: as many as pay."""
    new_ids: Sequence[int] = ()
    """New tokens that are known already: the request was begun before, elsewhere."""

    @property
    def ids(self) -> list[int]:
        """The prompt and the new tokens that are known."""
        return [*self.prompt_ids, *self.new_ids]


@dataclass(frozen=True)
class Verdict:
    """New tokens: the accepted draft tokens, and those that the target put behind them."""

    key: Hashable
    """Names the request, in every outcome."""
    epoch: int
    """The epoch that draft tokens belong to from now on."""
    position: int
    """Position of the first new token."""
    accepted: int
    """Number of draft tokens that are the first of the new tokens."""
    ids: list[int]
    """New tokens behind the accepted ones."""
    prefix: int | None
    """`prefix_hash` of the text, the new tokens included; None in mode sync."""
    draft_nll: list[float]
    """Cross-entropy under the target, in nats, of each draft token of the pass, up to the first that was rejected."""
    margins: list[float]
    """`Choice.margins` of each new token; empty in the answer to a RESUME."""


@dataclass(frozen=True)
class Ended:
    """The last outcome of a request."""

    key: Hashable
    reason: Reason
    text: str
    """For people, when the request was refused or failed."""
    step_seconds: float = 0.0
    """Seconds of a forward pass over one row, as measured; 0: not known."""
    row_seconds: float = 0.0
    """Seconds of each further row."""


@dataclass(frozen=True)
class Waiting:
    """The request waits in line for room in the engine."""

    key: Hashable
    place: int
    """1: it is the next."""


Outcome = Verdict | Ended | Waiting
