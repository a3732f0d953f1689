"""The drafter's core: guess, hand in, take the verdict, go on.

Knows nothing about sockets, models or tokenizers: guesses come from a `Drafts`, verdicts from a `Target`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from speculative.drafts import Drafts, NoDrafts
from speculative.messages import Reason
from speculative.verifying import Ended, Outcome, TextRequest


class TextRefused(ValueError):
    """The target does not serve this text; says why."""


class TextFailed(RuntimeError):
    """The target could not go on with the text; says why."""


class Target(Protocol):
    """Who owns the text: a verifier over a wire, or one in this process."""

    def open(self, request: TextRequest) -> None:
        """Begin a text, the only one until `leave`."""
        ...

    def draft(self, epoch: int, position: int, guesses: Sequence[int]) -> None:
        """Hand in guesses; does not wait."""
        ...

    def next(self) -> Outcome:
        """Wait for what comes of the text next."""
        ...

    def leave(self) -> None:
        """Want no more of the text; nothing happens when it has ended."""
        ...


@dataclass(frozen=True)
class Round:
    """One verdict and what it was about."""

    guesses: list[int]
    accepted: int
    """How many of the guesses are in the text."""
    ids: list[int]
    """What the target put behind them: a correction, or one token more."""
    guess_nll: list[float]
    """Cross-entropy of each guess that was looked at, in nats; empty unless it was asked for."""
    margins: list[float]
    """Of each new token: `Choice.margins`; empty unless they were asked for."""

    @property
    def tokens(self) -> list[int]:
        """The new tokens of the text."""
        return [*self.guesses[: self.accepted], *self.ids]


def speculate(
    target: Target, drafts: Drafts, request: TextRequest, length: int, end_ids: Collection[int]
) -> Iterator[Round]:
    """The textbook loop (Leviathan et al., arXiv 2211.17192, with exact matching): yields each round of one text.

    The first guesses follow the prompt, while the target still reads it. A request that does not wait is the same loop
    with nobody guessing.

    Raises:
        TextRefused: the target does not take the request.
        TextFailed: it could not go on.
    """
    target.open(request)
    try:
        drafts.begin(request.prompt_ids)
        position, epoch, remaining = len(request.prompt_ids), 0, request.max_new_tokens
        while True:
            guesses: list[int] = []
            if request.waits:
                guesses = drafts.propose(min(length, remaining - 1))
                target.draft(epoch, position, guesses)
            verdict = target.next()
            if isinstance(verdict, Ended):
                raise _fault(verdict)
            drafts.correct(position + verdict.accepted, verdict.ids)
            done = Round(guesses, verdict.accepted, verdict.ids, verdict.guess_nll, verdict.margins)
            epoch, position = verdict.epoch, position + len(done.tokens)
            remaining -= len(done.tokens)
            yield done
            if remaining <= 0 or done.tokens[-1] in end_ids:
                return
    finally:
        target.leave()


def _fault(ended: Ended) -> Exception:
    if ended.reason is Reason.refused:
        return TextRefused(ended.text)
    return TextFailed(f"the text was closed by the verifier ({ended.reason.name}): {ended.text}")


@dataclass(frozen=True)
class Flip:
    """A token of the text where the target alone, given the same tokens before it, says another one."""

    index: int
    """Of the new token, from 0."""
    token: int
    alone: int
    """What the target alone says."""
    margin: float
    """The lead of that over the second best; a batch of another shape moves logits by about 1e-6 in float32."""


def find_flips(target: Target, request: TextRequest, new_ids: Sequence[int], end_ids: Collection[int]) -> list[Flip]:
    """Let the target decode the text token by token, alone, and note where it differs; then go on behind that place.

    None found: the text is the target's own, token by token. Margins need a target that reports them.
    """
    flips: list[Flip] = []
    start = 0
    while start < len(new_ids):
        alone = replace(
            request,
            prompt_ids=[*request.prompt_ids, *new_ids[:start]],
            max_new_tokens=len(new_ids) - start,
            waits=False,
            threshold=None,
        )
        for done in speculate(target, NoDrafts(), alone, 0, end_ids):
            start += 1
            if done.ids[0] != new_ids[start - 1]:
                margin = done.margins[0] if done.margins else float("nan")
                flips.append(Flip(start - 1, new_ids[start - 1], done.ids[0], margin))
                break
    return flips
