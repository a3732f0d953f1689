"""A request to a target, and its outcomes: verdicts, places in line, the end."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from lab.engine.sampling import Sampling
from speculative.messages import Reason
from speculative.settings import Mode


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A prompt, and the settings with which the target continues it."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    max_new_tokens: int
    """Includes `new_ids`."""
    mode: Mode
    threshold: float | None
    """None: rule exact. Else rule cross_entropy (lossy): most nats of cross-entropy of an accepted draft token."""
    draft_length: int = 0
    """Most draft tokens of a pass; 0: as many as pay off."""
    new_ids: Sequence[int] = ()
    """New tokens that are already known: the request began at an earlier connection."""
    logprobs: bool = False
    """Whether verdicts give the cross-entropy of each new token, and its `sampling.top_tokens` alternatives."""
    scores_prompt: bool = False
    """Whether the first verdict has `PromptScores`. The prompt is then computed in one pass, and no kept one is
    used. Does not travel: only for a scheduler in the same process."""

    @property
    def ids(self) -> list[int]:
        """The prompt and the new tokens that are known."""
        return [*self.prompt_ids, *self.new_ids]


@dataclass(frozen=True)
class PromptScores:
    """A prompt under the target."""

    nll: list[float]
    """Cross-entropy in nats of each token of the prompt but the first, as in `Verdict.nll`."""
    top: list[list[tuple[int, float]]]
    """Alternatives to each of these tokens, as in `Verdict.top`."""


@dataclass(frozen=True)
class Verdict:
    """New tokens: the accepted draft tokens, then tokens of the target's own."""

    key: Hashable
    """Key of the request, in every outcome."""
    epoch: int
    """The epoch that draft tokens belong to from now on."""
    position: int
    """Position of the first new token."""
    accepted: int
    """Number of draft tokens among the new tokens: the first ones."""
    ids: list[int]
    """New tokens after the accepted ones."""
    prefix: int | None
    """`prefix_hash` of the text including the new tokens; None in mode sync."""
    draft_nll: list[float]
    """Cross-entropy under the target, in nats, of each draft token of the pass, up to the first rejected one."""
    margins: list[float]
    """`Choice.margins` of each new token; empty in the answer to a RESUME."""
    nll: list[float] = field(default_factory=list)
    """Cross-entropy in nats of each new token, accepted ones included, under the plain softmax of the target's logits.
    Empty unless `GenerationRequest.logprobs` asks for it, and in the answer to a RESUME: those are not kept."""
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    """`Choice.top` at each new token; empty where `nll` is, and if the sampling asks for none."""
    cached_tokens: int = 0
    """Tokens of the prompt that were not computed again, because an earlier request began with them; the same in every
    verdict."""
    prompt: PromptScores | None = None
    """In the first verdict, if the request asks for it."""


@dataclass(frozen=True)
class Ending:
    """The last outcome of a request."""

    key: Hashable
    reason: Reason
    text: str
    """Explanation for the user, when the request was refused or failed."""
    step_seconds: float = 0.0
    """Seconds of a forward pass over one row, as measured; 0: unknown."""
    row_seconds: float = 0.0
    """Seconds of each further row."""


@dataclass(frozen=True)
class Waiting:
    """The request waits in line for room in the engine."""

    key: Hashable
    place: int
    """Place in line; 1: next."""


Outcome = Verdict | Ending | Waiting
