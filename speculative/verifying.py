"""The verifier's core: it owns the texts, and one forward pass checks every guess of every text that is ready.

A text always holds one token that the target has not seen yet, its last. A pass feeds that token and the guesses behind
it, and the target says what it puts after each of them: the longest prefix of the guesses that equals what the target
says is accepted, and what it says next comes behind it. So the text is the target's own, whoever guesses; a wrong guess
costs a rewind, which is an assignment.

Knows nothing about tokenizers, networks or threads: whoever holds a `Verifier` calls it from one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from lab.engine import Engine, Request, Session, TargetStep
from lab.kv import CacheFull
from lab.sampling import Sampling
from speculative.messages import Reason


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """What is asked of the target."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    max_new_tokens: int
    waits: bool
    """Whether passes wait for guesses; else the target goes on alone."""
    threshold: float | None
    """None: only exact guesses are accepted. Else also those that cost at most so many nats: lossy."""


@dataclass(frozen=True)
class Verdict:
    """How a text goes on after one pass."""

    key: Hashable
    """The text's."""
    epoch: int
    """From now on."""
    position: int
    """Where the first new token stands."""
    accepted: int
    """Guesses that are in the text now: its first new tokens."""
    ids: list[int]
    """What the target put behind them; at most one."""
    guess_nll: list[float]
    """Cross-entropy under the target, in nats, of each guess up to the first that was not accepted."""
    margins: list[float]
    """Of each new token: `Choice.margins`."""


@dataclass(frozen=True)
class Ended:
    """A text is closed: nothing follows."""

    key: Hashable
    reason: Reason
    text: str
    """For people, when it was refused or failed."""


Outcome = Verdict | Ended


@dataclass
class TextFigures:
    """What happened to one text so far."""

    new_tokens: int = 0
    passes: int = 0
    checked: int = 0
    """Guesses that were looked at: the accepted ones, and the first of each draft that was not."""
    accepted: int = 0
    stale_drafts: int = 0
    guess_nll: list[float] = field(default_factory=list)
    least_margin: float = float("inf")


class Text:
    """One text: its ids, what the engine has seen of them, and the guesses that wait to be checked."""

    def __init__(self, key: Hashable, request: TextRequest, session: Session) -> None:
        self.key = key
        self.request = request
        self.session = session
        self.ids = list(request.prompt_ids)
        self.epoch = 0
        self.figures = TextFigures()
        self._draft: list[int] | None = None

    @property
    def position(self) -> int:
        """Where the next new token will stand."""
        return len(self.ids)

    @property
    def remaining(self) -> int:
        """New tokens that may still come."""
        return self.request.max_new_tokens - self.figures.new_tokens

    def offer(self, epoch: int, position: int, guesses: Sequence[int]) -> None:
        """Take guesses for the next pass. Those of an older epoch are dropped.

        Raises:
            ValueError: guesses that the text as it stands has no place for; the two sides differ on what it is.
        """
        if epoch < self.epoch:
            self.figures.stale_drafts += 1
            return
        if epoch > self.epoch or position != self.position or self._draft is not None:
            raise ValueError(
                f"draft must be for epoch {self.epoch}, position {self.position}, once; got epoch {epoch}, "
                f"position {position}"
            )
        self._draft = list(guesses)

    @property
    def unseen(self) -> list[int]:
        """The tokens that the engine has not been fed."""
        return self.ids[self.session.position :]

    def prompt_piece(self, longest: int) -> list[int]:
        """What to feed of a prompt that is not through yet; empty when only guesses and their verdict are due.

        A text that waits for guesses keeps its last token for the pass that checks them.
        """
        unseen = self.unseen
        if len(unseen) == 1:
            return []
        return unseen[: min(longest, len(unseen) - 1)] if self.request.waits else unseen[:longest]

    def guesses(self) -> list[int] | None:
        """The guesses to check in the next pass; None: there is nothing to do yet."""
        if not self.request.waits:
            return []
        return None if self._draft is None else self._draft[: self.remaining - 1]

    def judge(self, guesses: Sequence[int], step: TargetStep, end_ids: frozenset[int]) -> Verdict:
        """Take what the target says about the last token and the guesses behind it; go on by what is accepted."""
        rows = len(guesses) + 1
        chosen, margins, nll = step.next_ids[-rows:], step.margin[-rows:], step.nll[-len(guesses) :] if guesses else []
        accepted = accepted_length(guesses, chosen, nll, self.request.threshold)
        new = until_end([*guesses[:accepted], chosen[accepted]], end_ids)
        if accepted < len(guesses):
            self.epoch += 1
        kept, ids = new[:accepted], new[accepted:]
        verdict = Verdict(
            key=self.key,
            epoch=self.epoch,
            position=self.position,
            accepted=len(kept),
            ids=ids,
            guess_nll=nll[: len(kept) + len(ids)],
            margins=margins[: len(new)],
        )
        self.session.position = min(self.session.position, self.position + accepted)
        self.ids += new
        self._draft = None
        self._count(verdict, new)
        return verdict

    def ended(self, end_ids: frozenset[int]) -> Ended | None:
        """Why the text ends here, if it does."""
        if self.figures.new_tokens and self.ids[-1] in end_ids:
            return Ended(self.key, Reason.end_token, "")
        return Ended(self.key, Reason.length, "") if self.remaining <= 0 else None

    def _count(self, verdict: Verdict, new: Sequence[int]) -> None:
        figures = self.figures
        figures.new_tokens += len(new)
        figures.passes += 1
        figures.checked += len(verdict.guess_nll)
        figures.accepted += verdict.accepted
        figures.guess_nll += verdict.guess_nll
        figures.least_margin = min([figures.least_margin, *verdict.margins])


def accepted_length(
    guesses: Sequence[int], chosen: Sequence[int], nll: Sequence[float], threshold: float | None
) -> int:
    """How many of the guesses are accepted: the longest prefix that equals what the target chose.

    With a threshold also guesses that cost at most so much under the target are let through: then the text is no longer
    the target's.
    """
    for count, (guess, choice, cost) in enumerate(zip(guesses, chosen, nll)):
        if guess != choice and (threshold is None or not cost <= threshold):
            return count
    return len(guesses)


def until_end(ids: Sequence[int], end_ids: frozenset[int]) -> list[int]:
    """The ids up to the first that ends a text, that one included."""
    for index, token in enumerate(ids):
        if token in end_ids:
            return list(ids[: index + 1])
    return list(ids)


class Verifier:
    """All texts on one engine.

    Args:
        engine: The target.
        end_ids: A text ends with any of these.
        prefill_chunk: Most tokens of a prompt in one pass.
        closed: Is told of each text that ends, with its figures.
    """

    def __init__(
        self, engine: Engine, *, end_ids: Sequence[int], prefill_chunk: int, closed: Callable[[Text, Ended], None]
    ) -> None:
        self.engine = engine
        self._end_ids = frozenset(end_ids)
        self._prefill_chunk = prefill_chunk
        self._closed = closed
        self._texts: dict[Hashable, Text] = {}

    def open(self, key: Hashable, request: TextRequest) -> Ended | None:
        """Begin a text; returns why not when it cannot be served. `key` names it in every outcome."""
        if refusal := self._refusal(key, request):
            return Ended(key, Reason.refused, refusal)
        try:
            session = self.engine.open([], request.sampling)
        except CacheFull as full:
            return Ended(key, Reason.refused, str(full))
        self._texts[key] = Text(key, request, session)
        return None

    def offer(self, key: Hashable, epoch: int, position: int, guesses: Sequence[int]) -> Ended | None:
        """Take guesses for a text. One that has ended meanwhile wants none; one they do not fit is closed."""
        text = self._texts.get(key)
        if text is None:
            return None
        try:
            text.offer(epoch, position, guesses)
        except ValueError as error:
            return self._end(text, Ended(key, Reason.failed, str(error)))
        return None

    def close(self, key: Hashable) -> None:
        """Forget a text, if it is still there."""
        if key in self._texts:
            self._end(self._texts[key], Ended(key, Reason.left, ""))

    def tick(self) -> list[Outcome]:
        """One pass over every text that has something to check, and one over prompts that are not through yet.

        Returns what came of it; nothing when no text was ready.
        """
        prompts = [(text, piece) for text in self._texts.values() if (piece := text.prompt_piece(self._prefill_chunk))]
        fed = {text.key for text, _ in prompts}
        ready = [
            (text, guesses)
            for text in self._texts.values()
            if text.key not in fed and (guesses := text.guesses()) is not None
        ]
        outcomes = self._check(ready) if ready else []
        return outcomes + (self._feed(prompts) if prompts else [])

    @property
    def is_idle(self) -> bool:
        """Whether a tick would do nothing."""
        chunk = self._prefill_chunk
        return not any(text.prompt_piece(chunk) or text.guesses() is not None for text in self._texts.values())

    def shutdown(self) -> None:
        """Close every text and the engine."""
        for key in list(self._texts):
            self.close(key)
        self.engine.shutdown()

    def _check(self, ready: Sequence[tuple[Text, list[int]]]) -> list[Outcome]:
        """One forward pass over the last token of each text and its guesses."""
        requests = [(text.session, [text.ids[-1], *guesses]) for text, guesses in ready]
        outcomes: list[Outcome] = []
        for (text, guesses), step in zip(ready, self._extend(requests, want_all=True)):
            outcomes += [self._fail(text, step)] if isinstance(step, CacheFull) else self._judge(text, guesses, step)
        return outcomes

    def _feed(self, prompts: Sequence[tuple[Text, list[int]]]) -> list[Outcome]:
        """One forward pass over a piece of each prompt; the last piece gives the first new token."""
        requests = [(text.session, piece) for text, piece in prompts]
        outcomes: list[Outcome] = []
        for (text, _), step in zip(prompts, self._extend(requests, want_all=False)):
            if isinstance(step, CacheFull):
                outcomes.append(self._fail(text, step))
            elif not text.unseen:
                outcomes += self._judge(text, [], step)
        return outcomes

    def _extend(self, requests: Sequence[Request], *, want_all: bool) -> list[TargetStep | CacheFull]:
        """All texts in one pass; without room for all of them each alone, so that only who is too long fails."""
        try:
            return list(self.engine.extend(requests, "all" if want_all else "last"))
        except CacheFull as full:
            if len(requests) == 1:
                return [full]
            return [step for request in requests for step in self._extend([request], want_all=want_all)]

    def _judge(self, text: Text, guesses: Sequence[int], step: TargetStep) -> list[Outcome]:
        verdict = text.judge(guesses, step, self._end_ids)
        ended = text.ended(self._end_ids)
        return [verdict] if ended is None else [verdict, self._end(text, ended)]

    def _fail(self, text: Text, full: CacheFull) -> Ended:
        return self._end(text, Ended(text.key, Reason.failed, str(full)))

    def _end(self, text: Text, ended: Ended) -> Ended:
        del self._texts[text.key]
        text.session.close()
        self._closed(text, ended)
        return ended

    def _refusal(self, key: Hashable, request: TextRequest) -> str | None:
        length = len(request.prompt_ids)
        if key in self._texts:
            return "text must have a number of its own, got one that is open"
        if not length:
            return "prompt must hold at least one token, got none"
        if request.max_new_tokens < 1:
            return f"max_new_tokens must be at least 1, got {request.max_new_tokens}"
        if length + request.max_new_tokens > self.engine.context:
            return (
                f"prompt and max_new_tokens together must fit the context of {self.engine.context} tokens, "
                f"got {length} + {request.max_new_tokens}"
            )
        return None
