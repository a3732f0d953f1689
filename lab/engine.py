"""An engine speaks token ids: it takes what the text is, and says what the target model puts after it.

Logits stay where they are made. A whole model in this process, a model split over machines and a synthetic engine with
settable speeds are all engines; verifiers, drafters and benchmarks do not know which one they hold. An engine and its
sessions belong to one thread.

Knows nothing about tokenizers, texts or networks.

Shapes: B sessions, T positions in this call, V vocabulary, R rows of logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol, Self

from lab.sampling import Sampling

Want = Literal["last", "all"]
"""`all`: a step for every id given; `last`: only for the last one, so that a long prompt costs the head once."""


@dataclass(frozen=True, slots=True)
class TargetStep:
    """What the target says about the ids of one `extend`. T entries with want=all; with want=last one, and no `nll`."""

    next_ids: list[int]
    """[t] is what the target puts after ids[t]."""
    next_nll: list[float]
    """[t] is the cross-entropy, in nats, of next_ids[t]: plain softmax of the logits, without temperature."""
    margin: list[float]
    """[t] is the lead of next_ids[t] over the second best, in units of the logits, noise included (`Choice.margins`)."""
    nll: list[float]
    """[t] is the cross-entropy, in nats, of ids[t] under the step before it. NaN at t = 0 unless ids[0] is what the
    target had put there itself, in the extend just before: nothing is kept of the other logits."""


class Session:
    """One text in one engine: its sampling, and how many of its tokens the engine holds.

    ``session.position = n`` forgets everything from the n-th token on, in O(1). A context manager: leaving it closes it.
    """

    def __init__(self, engine: Engine, key: int, sampling: Sampling) -> None: ...

    key: int
    """The engine's own handle."""
    sampling: Sampling
    step: TargetStep | None
    """The outcome of the latest extend; right after `open` that of the prompt. None when the prompt was empty."""

    @property
    def position(self) -> int:
        """Tokens held: where the next id will stand."""
        raise NotImplementedError

    @position.setter
    def position(self, position: int) -> None: ...

    def close(self) -> None:
        """Give back what the engine keeps. Twice is once."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Engine(Protocol):
    """What a target is, wherever it runs."""

    vocabulary_size: int
    """Ids are in [0, vocabulary_size)."""
    context: int
    """The most tokens that one session can hold."""

    def open(self, prompt_ids: Sequence[int], sampling: Sampling) -> Session:
        """Start a text and run its prompt; ``session.step.next_ids[-1]`` is the first new token.

        The prompt may be empty: then the caller feeds it by `extend`, in the pieces it likes.

        Raises:
            ValueError: an id outside the vocabulary, or a prompt longer than the context.
            CacheFull: no slot or no memory is left for another session.
        """
        ...

    def extend(self, requests: Sequence[tuple[Session, Sequence[int]]], want: Want) -> list[TargetStep]:
        """Append ids to several sessions, each at its own position, in one batched pass.

        Raises:
            ValueError: no ids, ids outside the vocabulary, a session twice or beyond the context. Nothing has changed then.
            CacheFull: the limit in bytes is reached. Nothing has changed for the sessions that did not fit.
        """
        ...

    def close(self, session: Session) -> None:
        """Forget a session; its slot is free again."""
        ...

    def shutdown(self) -> None:
        """Give back everything: memory here, connections of an engine that has some."""
        ...
