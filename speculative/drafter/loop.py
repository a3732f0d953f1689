"""The drafter's loop: draft, send, extend the text by the verifier's verdicts, repeat.

Knows nothing about sockets, models or tokenizers: draft tokens come from a `Drafts`, verdicts from a `Target`.
"""

import contextlib
import time
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from lab.faults import Fault
from speculative.acceptance import common_length, prefix_hash
from speculative.drafts import Drafts
from speculative.messages import Reason
from speculative.policy import DraftLength
from speculative.request import Ending, GenerationRequest, Outcome, Verdict, Waiting
from speculative.settings import Mode

SYNC_LENGTH = 5
"""Draft tokens per round of mode sync if no length is set."""


class RequestRefused(Fault):
    """The target does not serve the request; the message says why."""

    exit_code = 2


class RequestCrowded(RequestRefused):
    """There is no room now; the same request may be served later."""


class RequestFailed(Fault):
    """The target could not continue the request; the message says why."""


class Desync(RequestFailed):
    """The two sides hold different texts; resuming the request may repair that."""


class TargetLost(Exception):
    """The target cannot be reached; `Target.resume` may reach it again."""


class Target(Protocol):
    """The target as the drafter sees it: a verifier over a wire, or one in this process."""

    @property
    def longest_draft(self) -> int:
        """Most draft tokens in one `draft`."""

    @property
    def window(self) -> int:
        """Most draft tokens beyond the last verdict."""

    @property
    def rtt_seconds(self) -> float | None:
        """Round-trip time; None: unknown yet."""

    def open(self, request: GenerationRequest) -> None:
        """Begin a request, the only one until `leave`."""

    def resume(self, request: GenerationRequest) -> None:
        """Resume it after `TargetLost`, if that is possible, or after `Desync`. A verdict with all later tokens
        follows."""

    def draft(self, epoch: int, position: int, draft_ids: Sequence[int]) -> None:
        """Send draft tokens; does not wait."""

    def has_news(self) -> bool:
        """Whether `next` would return at once."""

    def next(self) -> Outcome:
        """Wait for the next outcome."""

    def leave(self) -> None:
        """Stop following this request."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """One verdict, with figures of the draft tokens that it concerns."""

    draft_ids: list[int]
    """Draft tokens from the verdict's position on that existed when it arrived."""
    accepted: int
    """New tokens that were drafted in time: the draft token had arrived when the target chose the same."""
    right: int
    """New tokens that were drafted: the accepted ones, and those that arrived too late."""
    ids: list[int]
    """New tokens of the target's own, after the accepted ones."""
    draft_nll: list[float]
    """Cross-entropy of each draft token of the pass, in nats; empty unless requested."""
    margins: list[float]
    """`Choice.margins` of each new token; empty unless requested."""
    nll: list[float] = field(default_factory=list)
    """Cross-entropy of each new token; empty unless requested, and behind a resumed connection (`Verdict.nll`)."""
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    """The best tokens at each new token; empty where `nll` is."""
    cached_tokens: int = 0
    """`Verdict.cached_tokens`."""
    place: int
    """Number of consecutive right draft tokens before the first one: its position in the run."""
    made: int
    """Number of draft tokens made since the round before."""
    sent: int
    """Number of them that were sent."""
    draft_seconds: float
    """Time spent on making them."""
    stale: int
    """Draft tokens that were sent and never compared: one before them was wrong."""
    epoch: int
    """Number of epochs that have ended."""

    @property
    def tokens(self) -> list[int]:
        """New tokens of the text."""
        return [*self.draft_ids[: self.accepted], *self.ids]

    @property
    def checked(self) -> int:
        """Draft tokens that were compared with the text: the right ones, and the first wrong one."""
        return min(len(self.draft_ids), self.right + (self.right < len(self.tokens)))


class DraftedSequence:
    """The drafter's copy of a sequence: the verified tokens, then draft tokens."""

    def __init__(self, request: GenerationRequest, drafts: Drafts) -> None:
        self.request = request
        self.draft_seconds = 0.0
        """Time of drafting since the last round."""
        self.new_ids = list(request.new_ids)
        self.epoch = 0
        """Epoch of this connection; a new connection begins at 0."""
        self._drafts = drafts
        self._prefix = prefix_hash(request.ids)
        self._draft_ids: list[int] = []
        """Draft tokens for the positions from `position` on."""
        self._sent = 0
        """Number of them that were sent."""
        self._epochs = self._place = self._made = self._newly_sent = 0
        drafts.begin(request.ids)

    @property
    def position(self) -> int:
        """Position of the next verified token."""
        return len(self.request.prompt_ids) + len(self.new_ids)

    @property
    def room(self) -> int:
        """Number of further draft tokens that are useful: after the last one the target adds its own token."""
        return self.request.max_new_tokens - len(self.new_ids) - 1 - len(self._draft_ids)

    @property
    def ahead(self) -> int:
        """Number of draft tokens."""
        return len(self._draft_ids)

    @property
    def unsent(self) -> int:
        """Number of draft tokens that were not sent."""
        return len(self._draft_ids) - self._sent

    def draft(self, count: int) -> int:
        """Make up to `count` more draft tokens; returns how many were made."""
        began = time.perf_counter()
        found = self._drafts.propose(count)
        self.draft_seconds += time.perf_counter() - began
        self._draft_ids += found
        self._made += len(found)
        return len(found)

    def send(self, target: Target) -> None:
        """Send all unsent draft tokens, in several DRAFT frames if necessary; an empty frame when there are none."""
        is_empty = not self.unsent
        while self.unsent or is_empty:
            draft_ids = self._draft_ids[self._sent :][: target.longest_draft]
            target.draft(self.epoch, self.position + self._sent, draft_ids)
            self._sent += len(draft_ids)
            self._newly_sent += len(draft_ids)
            is_empty = False

    def extend(self, verdict: Verdict) -> Round:
        """Extend the text by a verdict. Draft tokens that agree with it are used up; a wrong one drops all later ones.

        Raises:
            Desync: the verdict is for another text; this one is as it was.
        """
        if verdict.position != self.position or verdict.accepted > self._sent:
            raise Desync(f"the verdict is for position {verdict.position}, the text is at {self.position}")
        tokens = [*self._draft_ids[: verdict.accepted], *verdict.ids]
        prefix = prefix_hash(tokens, self._prefix)
        if verdict.prefix not in (None, prefix):
            raise Desync(f"the two sides hold different texts up to position {self.position + len(tokens)}")
        right = common_length(self._draft_ids, tokens)
        wrong = right < min(len(self._draft_ids), len(tokens))
        ended_epoch = wrong and right < self._sent
        self._epochs += ended_epoch
        done = Round(
            draft_ids=list(self._draft_ids),
            accepted=verdict.accepted,
            right=right,
            ids=verdict.ids,
            draft_nll=verdict.draft_nll,
            margins=verdict.margins,
            nll=verdict.nll,
            top=verdict.top,
            cached_tokens=verdict.cached_tokens,
            place=self._place,
            made=self._made,
            sent=self._newly_sent,
            draft_seconds=self.draft_seconds,
            stale=self._sent - right - 1 if ended_epoch else 0,
            epoch=self._epochs,
        )
        self._made = self._newly_sent = 0
        self.draft_seconds = 0.0
        if right < len(tokens):
            self._drafts.correct(self.position + right, tokens[right:])
            self.epoch += ended_epoch
            self._draft_ids, self._sent, self._place = [], 0, 0
        else:
            del self._draft_ids[:right]
            self._sent = max(0, self._sent - right)
            self._place += right
        self.new_ids += tokens
        self._prefix = prefix
        return done

    def restart(self) -> None:
        """Begin on a new connection: draft tokens that were sent on the old one are sent again."""
        self.epoch, self._sent = 0, 0


def speculate(
    target: Target, drafts: Drafts, request: GenerationRequest, end_ids: Collection[int]
) -> Generator[Round, None, None]:
    """Serve one request: yields each round as it is verified.

    Mode sync is the textbook loop (Leviathan et al., arXiv 2211.17192, with exact matching): draft, send, wait. In mode
    async the drafter drafts ahead while verdicts are in transit. With target_only nothing is drafted. The first draft
    tokens follow the prompt, while the target still reads it.

    Raises:
        RequestRefused: the target does not serve the request.
        RequestFailed: it could not go on, or holds another text even after the request was resumed.
    """
    target.open(request)
    try:
        sequence = DraftedSequence(request, drafts)
        loop = _SyncLoop(sequence) if request.mode is Mode.sync else _AsyncLoop(sequence, target.window)
        mended_at = -1
        while True:
            try:
                if request.mode is not Mode.target_only:
                    loop.advance(target)
                outcome = target.next()
                if isinstance(outcome, Ending):
                    raise _fault(outcome)
                if isinstance(outcome, Waiting):
                    continue
                done = sequence.extend(outcome)
            except (TargetLost, Desync) as error:
                if isinstance(error, Desync):
                    if mended_at == sequence.position:  # resuming has not helped
                        raise
                    mended_at = sequence.position
                target.resume(replace(request, new_ids=sequence.new_ids))
                loop.restart()
                continue
            loop.on_verdict(done)
            if done.tokens:
                yield done
            new_ids = sequence.new_ids
            if len(new_ids) >= request.max_new_tokens or (new_ids and new_ids[-1] in end_ids):
                with contextlib.suppress(TargetLost):  # the text is complete
                    target.next()
                return
    finally:
        target.leave()


class _SyncLoop:
    """Mode sync: one DRAFT for each VERDICT, the empty one included."""

    def __init__(self, sequence: DraftedSequence) -> None:
        self._sequence = sequence
        self._waits = False
        """Whether a VERDICT is awaited."""

    def advance(self, target: Target) -> None:
        """Draft and send."""
        if not self._waits:
            sequence = self._sequence
            sequence.draft(min(sequence.request.draft_length or SYNC_LENGTH, sequence.room) - sequence.ahead)
            sequence.send(target)
            self._waits = True

    def on_verdict(self, done: Round) -> None:
        self._waits = False

    def restart(self) -> None:
        """Begin on a new connection, on which a VERDICT with all later tokens is awaited."""
        self._sequence.restart()
        self._waits = True


class _AsyncLoop:
    """Mode async: draft until a frame arrives or no credit is left; checks for frames between two draft tokens."""

    def __init__(self, sequence: DraftedSequence, window: int) -> None:
        self._sequence = sequence
        self._window = window
        self._length = DraftLength(sequence.request.draft_length or None, window)
        self._is_silent = True
        """Whether nothing was sent since the last verdict."""

    def advance(self, target: Target) -> None:
        """Draft and send until a frame arrives, or there is nothing to draft."""
        sequence = self._sequence
        self._length.rtt_seconds = target.rtt_seconds
        while not target.has_news():
            wanted = min(self._length.next(sequence.ahead - sequence.unsent), target.longest_draft)
            room = min(sequence.room, self._window - sequence.ahead)
            if sequence.unsent < wanted and room > 0 and self._draft():
                continue
            is_full = sequence.unsent >= wanted > 0
            has_none = wanted > 0 and room > 0 and self._is_silent  # an empty DRAFT, so that the verifier does not wait
            if sequence.unsent or has_none:
                sequence.send(target)
                self._is_silent = False
            if not is_full:
                return

    def on_verdict(self, done: Round) -> None:
        self._length.on_verdict(time.perf_counter(), done.right, done.checked - done.right, len(done.tokens))
        self._is_silent = True

    def restart(self) -> None:
        """Begin on a new connection."""
        self._sequence.restart()
        self._is_silent = True

    def _draft(self) -> int:
        before = self._sequence.draft_seconds
        count = self._sequence.draft(1)
        self._length.on_drafted(count, self._sequence.draft_seconds - before)
        return count


def _fault(ended: Ending) -> Exception:
    if ended.reason is Reason.refused:
        return RequestRefused(ended.text)
    if ended.reason is Reason.full:
        return RequestCrowded(ended.text)
    return RequestFailed(f"the request was closed by the verifier ({ended.reason.name}): {ended.text}")
