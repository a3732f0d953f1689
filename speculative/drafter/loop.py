"""The drafter's core: guess, hand in, take what the verifier says of it, go on.

Knows nothing about sockets, models or tokenizers: guesses come from a `Drafts`, verdicts from a `Target`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from lab.faults import Fault
from speculative.acceptance import common_length, prefix_hash
from speculative.drafts import Drafts
from speculative.messages import Reason
from speculative.policy import DraftLength
from speculative.request import Ended, Outcome, GenerationRequest, Verdict, Waiting
from speculative.settings import Mode

SYNC_LENGTH = 5
"""Guesses of a round of mode sync where no length was asked for."""


class RequestRefused(Fault):
    """The target does not serve this text; says why."""

    exit_code = 2


class RequestFailed(Fault):
    """The target could not go on with the text; says why."""


class Desync(RequestFailed):
    """The two sides do not hold the same text; a target that is asked for it again may mend that."""


class TargetLost(Exception):
    """Whoever owns the text is out of reach; it may be taken up again with `Target.resume`."""


class Target(Protocol):
    """Who owns the text: a verifier over a wire, or one in this process."""

    @property
    def longest_draft(self) -> int:
        """Most guesses in one `draft`."""
        ...

    @property
    def window(self) -> int:
        """Most guesses beyond what `next` has told."""
        ...

    @property
    def rtt_seconds(self) -> float | None:
        """How long word takes there and back; None: not known yet."""
        ...

    def open(self, request: GenerationRequest) -> None:
        """Begin a text, the only one until `leave`."""
        ...

    def resume(self, request: GenerationRequest) -> None:
        """Take it up again after `TargetLost`, if that is possible, or after `Desync`. A verdict of what came since
        follows."""
        ...

    def draft(self, epoch: int, position: int, guesses: Sequence[int]) -> None:
        """Hand in guesses; does not wait."""
        ...

    def has_news(self) -> bool:
        """Whether `next` would not have to wait."""
        ...

    def next(self) -> Outcome:
        """Wait for what comes of the text next."""
        ...

    def leave(self) -> None:
        """Want no more of the text, or have all of it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Round:
    """One verdict and what it was about."""

    guesses: list[int]
    """What was guessed from the verdict's position on when it came."""
    accepted: int
    """New tokens that were guessed in time: the guess was there when the target said the same."""
    right: int
    """New tokens that were guessed: the accepted ones, and those that came too late."""
    ids: list[int]
    """What the target put behind the accepted ones."""
    guess_nll: list[float]
    """Cross-entropy of each guess that a pass looked at, in nats; empty unless it was asked for."""
    margins: list[float]
    """Of each new token: `Choice.margins`; empty unless they were asked for."""
    place: int
    """How many guesses before the first one were right in a row: where it stands in its run."""
    made: int
    """Guesses made since the round before."""
    sent: int
    """Those that were sent."""
    draft_seconds: float
    """Time that making them took."""
    stale: int
    """Guesses that were sent and never compared with anything: one before them was wrong."""
    epoch: int
    """How many epochs have ended so far."""

    @property
    def tokens(self) -> list[int]:
        """The new tokens of the text."""
        return [*self.guesses[: self.accepted], *self.ids]

    @property
    def checked(self) -> int:
        """Guesses that were compared with the text: the right ones, and the first that was not."""
        return min(len(self.guesses), self.right + (self.right < len(self.tokens)))


class DraftedSequence:
    """The drafter's copy of a text: what is verified, and what is guessed beyond."""

    def __init__(self, request: GenerationRequest, drafts: Drafts, clock: Callable[[], float] = time.perf_counter) -> None:
        self.request = request
        self.draft_seconds = 0.0
        """Time that guesses took since the last round."""
        self._clock = clock
        self.new_ids = list(request.new_ids)
        self.epoch = 0
        """Of this connection."""
        self._drafts = drafts
        self._prefix = prefix_hash([*request.prompt_ids, *request.new_ids])
        self._guesses: list[int] = []
        """For the places from `position` on."""
        self._sent = 0
        """How many of them were sent."""
        self._epochs = self._place = self._made = self._newly_sent = 0
        drafts.begin([*request.prompt_ids, *request.new_ids])

    @property
    def position(self) -> int:
        """Where the next verified token will stand."""
        return len(self.request.prompt_ids) + len(self.new_ids)

    @property
    def room(self) -> int:
        """Guesses that still make sense: behind the last one the target puts a token of its own."""
        return self.request.max_new_tokens - len(self.new_ids) - 1 - len(self._guesses)

    @property
    def ahead(self) -> int:
        """Guesses beyond what is verified."""
        return len(self._guesses)

    @property
    def unsent(self) -> int:
        """How many of them were not sent."""
        return len(self._guesses) - self._sent

    def guess(self, count: int) -> int:
        """Guess up to `count` tokens more; returns how many there were."""
        began = self._clock()
        found = self._drafts.propose(count)
        self.draft_seconds += self._clock() - began
        self._guesses += found
        self._made += len(found)
        return len(found)

    def send(self, target: Target) -> None:
        """Hand in what was not sent, be it nothing; behind a new connection it may be more than a DRAFT takes."""
        is_empty = not self.unsent
        while self.unsent or is_empty:
            guesses = self._guesses[self._sent :][: target.longest_draft]
            target.draft(self.epoch, self.position + self._sent, guesses)
            self._sent += len(guesses)
            self._newly_sent += len(guesses)
            is_empty = False

    def take(self, verdict: Verdict) -> Round:
        """Go on by a verdict. Guesses that agree with it are used up; behind one that does not, all are given up.

        Raises:
            Desync: the verdict is for another text; this one is as it was.
        """
        if verdict.position != self.position or verdict.accepted > self._sent:
            raise Desync(f"the verdict is for position {verdict.position}, the text is at {self.position}")
        tokens = [*self._guesses[: verdict.accepted], *verdict.ids]
        prefix = prefix_hash(tokens, self._prefix)
        if verdict.prefix not in (None, prefix):
            raise Desync(f"the two sides hold different texts up to position {self.position + len(tokens)}")
        right = common_length(self._guesses, tokens)
        wrong = right < min(len(self._guesses), len(tokens))
        ended_epoch = wrong and right < self._sent
        stale = self._sent - right - 1 if ended_epoch else 0
        self._epochs += ended_epoch
        done = Round(
            guesses=list(self._guesses),
            accepted=verdict.accepted,
            right=right,
            ids=verdict.ids,
            guess_nll=verdict.guess_nll,
            margins=verdict.margins,
            place=self._place,
            made=self._made,
            sent=self._newly_sent,
            draft_seconds=self.draft_seconds,
            stale=stale,
            epoch=self._epochs,
        )
        self._made = self._newly_sent = 0
        self.draft_seconds = 0.0
        if right < len(tokens):
            self._drafts.correct(self.position + right, tokens[right:])
            self.epoch += ended_epoch
            self._guesses, self._sent, self._place = [], 0, 0
        else:
            del self._guesses[:right]
            self._sent = max(0, self._sent - right)
            self._place += right
        self.new_ids += tokens
        self._prefix = prefix
        return done

    def begin_again(self) -> None:
        """A new connection: what was sent on the old one is lost, and worth sending again."""
        self.epoch, self._sent = 0, 0


def speculate(
    target: Target, drafts: Drafts, request: GenerationRequest, end_ids: Collection[int]
) -> Generator[Round, None, None]:
    """One text: yields each round as it is verified.

    Mode sync is the textbook loop (Leviathan et al., arXiv 2211.17192, with exact matching): guess, send, wait. In mode
    async the drafter guesses ahead while verdicts are under way. With target_only nobody guesses. The first guesses
    follow the prompt, while the target still reads it.

    Raises:
        RequestRefused: the target does not take the request.
        RequestFailed: it could not go on, or holds another text although it was asked for it again.
    """
    target.open(request)
    try:
        text = DraftedSequence(request, drafts)
        draft = _DraftRound(text) if request.mode is Mode.sync else _DraftAhead(text, target.window)
        mended_at = -1
        while True:
            try:
                if request.mode is not Mode.target_only:
                    draft.go_on(target)
                outcome = target.next()
                if isinstance(outcome, Ended):
                    raise _fault(outcome)
                if isinstance(outcome, Waiting):
                    continue
                done = text.take(outcome)
            except (TargetLost, Desync) as error:
                if isinstance(error, Desync):
                    if mended_at == text.position:  # asking again has not helped
                        raise
                    mended_at = text.position
                target.resume(replace(request, new_ids=text.new_ids))
                draft.begin_again()
                continue
            draft.took(done)
            if done.tokens:
                yield done
            if len(text.new_ids) >= request.max_new_tokens or (text.new_ids and text.new_ids[-1] in end_ids):
                with contextlib.suppress(TargetLost):  # all there is to know is here
                    target.next()
                return
    finally:
        target.leave()


class _DraftRound:
    """Mode sync: one DRAFT for each VERDICT, the empty one included."""

    def __init__(self, text: DraftedSequence) -> None:
        self._text = text
        self._waits = False
        """Whether a VERDICT is due."""

    def go_on(self, target: Target) -> None:
        """Guess, and hand in."""
        if not self._waits:
            text = self._text
            text.guess(min(text.request.draft_length or SYNC_LENGTH, text.room) - text.ahead)
            text.send(target)
            self._waits = True

    def took(self, done: Round) -> None:
        """A verdict has come."""
        self._waits = False

    def begin_again(self) -> None:
        """A new connection, which tells at once what came since."""
        self._text.begin_again()
        self._waits = True


class _DraftAhead:
    """Mode async: guess until there is news, or no credit left. News are looked for between two guesses."""

    def __init__(self, text: DraftedSequence, window: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._text = text
        self._window = window
        self._clock = clock
        self._length = DraftLength(text.request.draft_length or None, window)
        self._is_silent = True
        """Whether nothing was sent since the last verdict."""

    def go_on(self, target: Target) -> None:
        """Guess and hand in until there is news, or nothing to guess."""
        text = self._text
        self._length.rtt_seconds = target.rtt_seconds
        while not target.has_news():
            wanted = min(self._length.next(text.ahead - text.unsent), target.longest_draft)
            room = min(text.room, self._window - text.ahead)
            if text.unsent < wanted and room > 0 and self._guess():
                continue
            is_full = text.unsent >= wanted > 0
            has_none = wanted > 0 and room > 0 and self._is_silent  # which it says, so that nobody waits for it
            if text.unsent or has_none:
                text.send(target)
                self._is_silent = False
            if not is_full:
                return

    def took(self, done: Round) -> None:
        """A verdict has come."""
        self._length.verdict(self._clock(), done.right, done.checked - done.right, len(done.tokens))
        self._is_silent = True

    def begin_again(self) -> None:
        """A new connection."""
        self._text.begin_again()
        self._is_silent = True

    def _guess(self) -> int:
        before = self._text.draft_seconds
        count = self._text.guess(1)
        self._length.drafted(count, self._text.draft_seconds - before)
        return count


def _fault(ended: Ended) -> Exception:
    if ended.reason is Reason.refused:
        return RequestRefused(ended.text)
    return RequestFailed(f"the text was closed by the verifier ({ended.reason.name}): {ended.text}")
