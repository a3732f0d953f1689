"""The verifier's core: all texts on one engine, and one forward pass checks every guess of every text that is ready.

Texts that have room in the engine are *running*; others wait in line for it. Room is promised: a text that runs has
place for its prompt and its most new tokens, and no other can take it away. A text that was left by its connection
*rests*: it is kept for a while for whoever takes it up again (`resume`), nothing is computed for it, and its room goes
to the first that waits for some.

A fault has one owner. What goes wrong in a pass over several texts is tried again with each of them alone, and ends
those that it belongs to; the engine itself is at fault when it fails on a text of its own (`prove`).

Knows nothing about tokenizers, networks or threads: a `Scheduler` is called from one thread, which sleeps for
`patience()` between two ticks unless there is something to tell it.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

from lab.engine.base import Engine, TargetStep, check_ids, check_words
from lab.engine.kv import CacheFull
from lab.engine.not_finite import NotFinite
from lab.engine.sampling import Sampling
from lab.faults import Fault
from speculative.messages import Reason
from speculative.policy import Pacing, PassCosts
from speculative.request import Ended, GenerationRequest, Outcome, Waiting
from speculative.verifier.lookup import Lookup
from speculative.verifier.sequence import VerifiedSequence

log = logging.getLogger(__name__)

MOST_KEPT = 256
"""Texts that nobody is connected to; the oldest is forgotten for one more. What is kept of most is their ids."""
PLACE_SECONDS = 1.0
"""Texts in line are told their places no more often."""


class EngineFailed(Fault):
    """The engine does not do what any request needs: no text can be served."""


@dataclass(frozen=True, kw_only=True)
class SchedulerLimits:
    """How much a verifier gives."""

    prefill_chunk: int
    """Most tokens of a prompt in one pass."""
    longest_check: int
    """Most guesses of one text in one pass."""
    window: int
    """Most guesses of one text that may wait."""
    lookup: tuple[int, int] | None
    """Longest and shortest n-gram of the verifier's own guesses; None: it makes none."""
    most_waiting: int
    """Texts in line."""
    client_texts: int
    """Texts of one client at once."""
    client_cache_bytes: int
    """Keys and values that the texts of one client may need, at their full length."""
    bytes_per_token: int
    """Of keys and values; 0 where the engine does not say."""
    keep_seconds: float
    """How long a text is kept for a connection that ended."""
    idle_seconds: float
    """How long a text of mode sync may go without a DRAFT."""


@dataclass
class _Owned:
    """A text and whose it is."""

    text: VerifiedSequence
    client: Hashable
    name: int | None
    owner: bytes
    since: float
    """When its client was last heard of, or was told something."""
    is_left: bool = False
    ended: Ended | None = None
    queued_at: float = 0.0
    """When it began to wait for room."""
    place: int = 0
    """In line, as its client was told; 0: it was told none."""

    @property
    def is_kept(self) -> bool:
        """Whether it is here only in case that somebody asks for it again."""
        return self.is_left or self.ended is not None


class Scheduler:
    """All texts on one engine.

    Args:
        engine: The target.
        end_ids: A text ends with any of these.
        terms: How much it gives.
        closed: Is told of each text that ends, with its figures.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        end_ids: Sequence[int],
        terms: SchedulerLimits,
        closed: Callable[[VerifiedSequence, Ended], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self._end_ids = frozenset(end_ids)
        self._terms = terms
        self._closed = closed
        self._clock = clock
        self.costs = PassCosts()
        """What a pass takes, as measured."""
        self._texts: dict[Hashable, _Owned] = {}
        """By key: those that somebody is connected to, and the others that are not kept in vain."""
        self._keys: dict[int, Hashable] = {}
        """By name."""
        self._running: dict[Hashable, VerifiedSequence] = {}
        self._resting: dict[Hashable, VerifiedSequence] = {}
        """Those that were left and have room as long as nobody else wants it, in the order in which they were left."""
        self._line: dict[Hashable, VerifiedSequence] = {}
        """Those that wait for room, in the order in which they came."""
        self._next_places_at = -math.inf
        """When those in line may be told their places again."""
        self._is_in_doubt = False
        """Whether something went wrong in a pass that may be the engine's own fault."""

    def prove(self) -> None:
        """Run two tokens of nobody's text. Raises `EngineFailed` when the engine cannot."""
        ids = [0] * min(2, self.engine.longest)
        try:
            self.engine.open(ids, Sampling.greedy(), len(ids)).close()
        except (CacheFull, NotFinite):  # it computes
            return
        except Exception as error:  # of torch, of a device: whatever it is, no request can be served
            raise EngineFailed(f"the target cannot run a text of two tokens: {_one_line(error)}") from error

    def open(
        self,
        key: Hashable,
        request: GenerationRequest,
        *,
        client: Hashable,
        name: int | None = None,
        owner: bytes = b"",
    ) -> list[Outcome]:
        """Begin a text; returns why not when it cannot be served. `key` names it in every outcome.

        Args:
            key: Of this text on this connection.
            request: What is asked for.
            client: Whose limits it counts against.
            name: How `resume` finds it; None: it ends with its connection.
            owner: Who knows it may resume the text.
        """
        refusal = self._refusal(key, request, client)
        if refusal is None and name in self._keys:
            refusal = "text must have a name of its own, got one that is taken"
        if refusal is not None:
            return [Ended(key, Reason.refused, refusal)]
        text = self._new_text(key, request)
        self._texts[key] = _Owned(text, client, name, owner, self._clock())
        if name is not None:
            self._keys[name] = key
        outcomes = self._queue(text)
        if len(self._line) > self._terms.most_waiting and key in self._line:
            del self._line[key]
            self._forget(self._texts[key])
            refusal = (
                f"the verifier has no room now, and {self._terms.most_waiting} texts wait in line already "
                "(its project.max_waiting)"
            )
            return [*outcomes, Ended(key, Reason.refused, refusal)]
        return [*outcomes, *self._tell_place(key)]

    def resume(
        self, key: Hashable, request: GenerationRequest, *, client: Hashable, name: int, owner: bytes
    ) -> list[Outcome]:
        """Take up a text again: whoever was connected to it is told that it left. One that is not here is begun where
        it stood."""
        before = self._keys.get(name)
        if before is None:
            outcomes = self.open(key, request, client=client, name=name, owner=owner)
            if key not in self._texts:
                return outcomes
            return [self._texts[key].text.told(len(request.prompt_ids) + len(request.new_ids)), *outcomes]
        owned = self._texts[before]
        if not hmac.compare_digest(owned.owner, owner):
            return [Ended(key, Reason.refused, f"text {name:016x} must be resumed by who opened it")]
        known = [*request.prompt_ids, *request.new_ids]
        if not _same(request, owned.text.request) or owned.text.ids[: len(known)] != known:
            return [Ended(key, Reason.refused, f"text {name:016x} must be resumed with its own prompt and settings")]
        if owned.ended is None and (refusal := self._over_limits(owned.text.request, client, besides=owned)):
            return [Ended(key, Reason.refused, refusal)]
        outcomes = [] if owned.is_kept else [Ended(before, Reason.left, "it was resumed elsewhere")]
        self._rename(owned, key)
        owned.client, owned.is_left, owned.since, owned.place = client, False, self._clock(), 0
        outcomes.append(owned.text.told(len(known)))
        if owned.ended is not None:
            return [*outcomes, replace(owned.ended, key=key)]
        if key in self._resting:
            self._running[key] = self._resting.pop(key)
        elif key not in self._running and key not in self._line:
            outcomes += self._queue(owned.text)
        return [*outcomes, *self._tell_place(key)]

    def offer(self, key: Hashable, epoch: int, position: int, guesses: Sequence[int], now: float) -> list[Outcome]:
        """Take guesses for a text. One that has ended meanwhile wants none; one they do not fit is closed.

        `now` is when they arrived, which may have been during a pass.
        """
        owned = self._texts.get(key)
        if owned is None or owned.ended is not None:
            return []
        owned.since = now
        try:
            owned.text.offer(epoch, position, guesses, now)
        except ValueError as error:
            return [self._fail(owned.text, str(error)), *self._admit()]
        return []

    def leave(self, key: Hashable) -> list[Outcome]:
        """Its connection ended: nothing more is computed for the text; it is kept for a while, if it has a name."""
        owned = self._texts.get(key)
        if owned is None:
            return []
        if owned.name is None or not self._terms.keep_seconds:
            return self.close(key)
        owned.is_left, owned.since = True, self._clock()
        self._leave_line(owned.text)
        if key in self._running:
            self._resting[key] = self._running.pop(key)
        return self._admit()

    def close(self, key: Hashable) -> list[Outcome]:
        """Forget a text, if it is still there."""
        owned = self._texts.get(key)
        if owned is None:
            return []
        if owned.ended is None:
            self._end(owned.text, Ended(key, Reason.left, ""), forget=True)
            return self._admit()
        self._forget(owned)
        return []

    def fail(self, key: Hashable, error: Exception) -> list[Outcome]:
        """What was to be done for a text went wrong by a fault of ours: that text ends."""
        owned = self._texts.get(key)
        if owned is None or owned.ended is not None:
            return [Ended(key, Reason.failed, _one_line(error))]
        return [self._fail(owned.text, _one_line(error)), *self._admit()]

    def tick(self) -> list[Outcome]:
        """One pass over every text that has something to check, and one over prompts that are not through yet.

        Returns what came of it; nothing when no text was ready.
        """
        outcomes = self._expire()
        chunk = self._terms.prefill_chunk
        prompts = [(text, piece) for text in self._running.values() if (piece := text.prompt_piece(chunk))]
        fed = {text.key for text, _ in prompts}
        ready = [
            (text, text.guesses(self._terms.longest_check))
            for text in self._running.values()
            if text.key not in fed and text.is_ready
        ]
        outcomes += self._check(ready) if ready else []
        outcomes += self._feed(prompts) if prompts else []
        if self._is_in_doubt:
            self._is_in_doubt = False
            self.prove()
        # Not before: whoever gets room of another must not be in the middle of a pass.
        return [*outcomes, *self._admit(), *self._tell_places()]

    def patience(self) -> float:
        """Seconds until a tick has something to do, if nobody calls meanwhile; infinite when it never will.

        As soon as one text need not wait, all go on with what they have: a pass costs the same anyway, and a text that
        stayed behind would lose all of it.
        """
        if self._is_in_doubt:
            return 0.0
        chunk = self._terms.prefill_chunk
        now = self._clock()
        waits = [math.inf]
        for text in self._running.values():
            waits.append(0.0 if text.prompt_piece(chunk) else text.patience(now))
        waits += [self._deadline(owned) - now for owned in self._texts.values()]
        waits += [self._next_places_at - now] if self._line else []
        return max(0.0, min(waits))

    def unended(self) -> list[VerifiedSequence]:
        """The texts that have not ended; for any thread."""
        return [owned.text for owned in list(self._texts.values()) if owned.ended is None]

    def shutdown(self) -> None:
        """Close every text and the engine."""
        for key in list(self._texts):
            self.close(key)
        self.engine.shutdown()

    def _new_text(self, key: Hashable, request: GenerationRequest) -> VerifiedSequence:
        terms = self._terms
        lookup = Lookup(*terms.lookup, self.costs) if terms.lookup and request.threshold is None else None
        pacing = Pacing(self.costs, request.draft_length or None, terms.longest_check)
        return VerifiedSequence(key, request, window=terms.window, pacing=pacing, lookup=lookup)

    # Passes

    def _check(self, ready: Sequence[tuple[VerifiedSequence, list[int]]]) -> list[Outcome]:
        """One forward pass over the last token of each text and its guesses."""
        asked = [(text, [text.ids[-1], *guesses]) for text, guesses in ready]
        rows = sum(len(ids) for _, ids in asked)
        outcomes: list[Outcome] = []
        began = self._clock()
        steps = self._extend(asked, want_all=True)
        if not self._is_in_doubt:
            self.costs.passed(self._clock() - began, rows, len(ready))
        for (text, guesses), step in zip(ready, steps):
            outcomes += self._judge(text, guesses, step)
        return outcomes

    def _feed(self, prompts: Sequence[tuple[VerifiedSequence, list[int]]]) -> list[Outcome]:
        """One forward pass over a piece of each prompt; the last piece gives the first new token."""
        outcomes: list[Outcome] = []
        for (text, _), step in zip(prompts, self._extend(prompts, want_all=False)):
            if isinstance(step, Exception) or step.fault or not text.unseen:
                outcomes += self._judge(text, [], step)
        return outcomes

    def _extend(
        self, asked: Sequence[tuple[VerifiedSequence, list[int]]], *, want_all: bool
    ) -> list[TargetStep | Exception]:
        """All texts in one pass; where that goes wrong each alone, so that only whose fault it is fails.

        A step with a fault is one of a text that met NaN or infinity; the others have theirs."""
        positions = [text.session.position for text, _ in asked]
        try:
            return list(self.engine.extend([(text.session, ids) for text, ids in asked], "all" if want_all else "last"))
        except NotFinite as some:
            return list(some.steps)
        except Exception as error:  # of torch, of a device, memory that runs out: whose fault it is must be found out
            self._is_in_doubt = True
            if len(asked) == 1:
                return [error]
            log.info("a pass over %d texts failed, now each goes alone: %s", len(asked), _one_line(error))
        for (text, _), position in zip(asked, positions, strict=True):
            text.session.position = min(text.session.position, position)
        return [step for one in asked for step in self._extend([one], want_all=want_all)]

    def _judge(self, text: VerifiedSequence, guesses: Sequence[int], step: TargetStep | Exception) -> list[Outcome]:
        if isinstance(step, Exception):
            log.warning("a text ends by a fault of its own: %s", _one_line(step))
            return [self._fail(text, f"the target failed on it: {_one_line(step)}")]
        if step.fault:
            return self._distrust(text, guesses, step.fault)
        try:
            verdict = text.judge(guesses, step, self._end_ids, self._clock())
        except Exception as error:  # ours, and no reason to end the others
            log.exception("a text ends by a fault of ours")
            return [self._fail(text, _one_line(error))]
        self._touch(text)
        ended = text.ended(self._end_ids)
        if ended is None:
            return [verdict]
        costs = self.costs
        ended = replace(ended, step_seconds=costs.step_seconds, row_seconds=costs.row_seconds)
        return [verdict, self._end(text, ended, forget=False)]

    def _touch(self, text: VerifiedSequence) -> None:
        owned = self._texts[text.key]
        if not owned.is_left:
            owned.since = self._clock()

    def _distrust(self, text: VerifiedSequence, guesses: Sequence[int], fault: str) -> list[Outcome]:
        """A pass met NaN or infinity. With guesses in it that says nothing of the text: what the engine holds is
        forgotten, and the next token is made without any."""
        if not guesses:
            log.warning("a text cannot go on: %s", fault)
            return [self._fail(text, fault)]
        text.go_alone()
        self._stop(text)
        self._line = {text.key: text} | self._line
        self._texts[text.key].queued_at = self._clock()
        with contextlib.suppress(Exception):  # the room that it gave back is its own again; else it waits like others
            self._enter(text)
        return []

    def _fail(self, text: VerifiedSequence, why: str) -> Ended:
        return self._end(text, Ended(text.key, Reason.failed, why), forget=True)

    # Room

    def _queue(self, text: VerifiedSequence) -> list[Outcome]:
        """A text that has no room stands in line, if there is none for it now."""
        self._line[text.key] = text
        self._texts[text.key].queued_at = self._clock()
        return self._admit()

    def _admit(self) -> list[Outcome]:
        """Texts in line get what room there is, in their order. One that needs more than there is holds up those behind
        it: else it might wait for ever, while shorter ones come and go."""
        outcomes: list[Outcome] = []
        while self._line:
            text = self._order()[0]
            try:
                self._enter(text)
            except CacheFull:
                if not self._make_room():
                    break
            except Exception as error:  # of an engine: `prove` finds out whether it is the engine's own fault
                self._is_in_doubt = True
                outcomes.append(self._fail(text, f"the target did not take it: {_one_line(error)}"))
        return outcomes

    def _enter(self, text: VerifiedSequence) -> None:
        """The text gets the room that it may come to need. Raises `CacheFull` when there is none."""
        text.enter(self.engine.open([], text.request.sampling, text.longest))
        self._leave_line(text)
        self._running[text.key] = text
        self._touch(text)

    def _leave_line(self, text: VerifiedSequence) -> None:
        owned = self._texts[text.key]
        if self._line.pop(text.key, None) is not None and owned.place:
            text.figures.waited_seconds += self._clock() - owned.queued_at
        owned.place = 0

    def _order(self) -> list[VerifiedSequence]:
        """Those in line as they will get room: first those of clients that have the fewest running."""
        ahead = Counter(self._texts[key].client for key in self._running)
        turns = []
        for text in self._line.values():
            client = self._texts[text.key].client
            turns.append((ahead[client], text))
            ahead[client] += 1
        return [text for _, text in sorted(turns, key=lambda turn: turn[0])]

    def _make_room(self) -> bool:
        """A text that rests gives its room to one that waits."""
        for text in self._resting.values():
            self._stop(text)
            return True
        return False

    def _tell_place(self, key: Hashable) -> list[Outcome]:
        """Where a text stands that has just come, if it must wait."""
        if key not in self._line:
            return []
        owned = self._texts[key]
        owned.place = 1 + self._order().index(owned.text)
        return [Waiting(key, owned.place)]

    def _tell_places(self) -> list[Outcome]:
        """To those in line whose place is another by now."""
        now = self._clock()
        if not self._line or now < self._next_places_at:
            return []
        self._next_places_at = now + PLACE_SECONDS
        told: list[Outcome] = []
        for place, text in enumerate(self._order(), start=1):
            owned = self._texts[text.key]
            if owned.place != place:
                owned.place = place
                told.append(Waiting(text.key, place))
        return told

    def _stop(self, text: VerifiedSequence) -> None:
        self._leave_line(text)
        self._running.pop(text.key, None)
        self._resting.pop(text.key, None)
        text.leave()

    # Ends

    def _expire(self) -> list[Outcome]:
        """Forget what nobody came back for, and end what its drafter has left lying."""
        now = self._clock()
        outcomes: list[Outcome] = []
        kept = [key for key, owned in self._texts.items() if owned.is_kept]
        for oldest in kept[:-MOST_KEPT]:
            outcomes += self.close(oldest)
        for owned in [owned for owned in self._texts.values() if self._deadline(owned) <= now]:
            if owned.is_kept:
                outcomes += self.close(owned.text.key)
            else:
                text = f"no DRAFT came for {self._terms.idle_seconds:g} s"
                outcomes.append(self._end(owned.text, Ended(owned.text.key, Reason.evicted, text), forget=True))
        return outcomes

    def _deadline(self, owned: _Owned) -> float:
        if owned.is_kept:
            return owned.since + self._terms.keep_seconds
        waits = owned.text.key in self._running and not owned.text.is_ready
        return owned.since + self._terms.idle_seconds if waits else math.inf

    def _end(self, text: VerifiedSequence, ended: Ended, *, forget: bool) -> Ended:
        """Nothing follows. Unless it is to be forgotten, a text with a name is kept: its last VERDICT may be lost."""
        owned = self._texts[text.key]
        owned.ended = ended
        if not owned.is_left:
            owned.since = self._clock()
        self._stop(text)
        if forget or owned.name is None:
            self._forget(owned)
        self._closed(text, ended)
        return ended

    def _forget(self, owned: _Owned) -> None:
        del self._texts[owned.text.key]
        if owned.name is not None:
            del self._keys[owned.name]

    def _rename(self, owned: _Owned, key: Hashable) -> None:
        before, owned.text.key = owned.text.key, key
        # In line it keeps its place.
        self._line = {key if other == before else other: text for other, text in self._line.items()}
        for texts in (self._running, self._resting):
            if before in texts:
                texts[key] = texts.pop(before)
        self._texts[key] = self._texts.pop(before)
        assert owned.name is not None
        self._keys[owned.name] = key

    def _refusal(self, key: Hashable, request: GenerationRequest, client: Hashable) -> str | None:
        length = len(request.prompt_ids)
        if key in self._texts:
            return "text must have a number of its own, got one that is open"
        if not length:
            return "prompt must hold at least one token, got none"
        try:
            check_ids([*request.prompt_ids, *request.new_ids], self.engine.vocabulary_size)
        except ValueError as error:
            return f"prompt must hold tokens that the target has rows for: {error}"
        try:
            check_words(self.engine, request.sampling)
        except ValueError as error:
            return str(error)
        if request.max_new_tokens < 1:
            return f"max_new_tokens must be at least 1, got {request.max_new_tokens}"
        if len(request.new_ids) >= request.max_new_tokens:
            return f"new tokens must be fewer than max_new_tokens {request.max_new_tokens}, got {len(request.new_ids)}"
        longest, context = self.engine.longest, self.engine.context
        why = "its context" if longest == context else "its project.cache_limit_bytes"
        why = f"a text at this verifier has room for {longest} tokens, {why}"
        return _does_not_fit(request, longest, why) or self._over_limits(request, client)

    def _over_limits(self, request: GenerationRequest, client: Hashable, besides: _Owned | None = None) -> str | None:
        terms = self._terms
        others = [
            owned.text.request
            for owned in self._texts.values()
            if owned.client == client and not owned.is_kept and owned is not besides
        ]
        if len(others) >= terms.client_texts:
            return f"a client may have {terms.client_texts} texts at once (the verifier's project.client.texts)"
        if not terms.bytes_per_token:
            return None
        taken = sum(len(other.prompt_ids) + other.max_new_tokens for other in others)
        left = terms.client_cache_bytes // terms.bytes_per_token - taken
        return _does_not_fit(
            request, left, f"a client's texts may need {terms.client_cache_bytes} bytes of keys and values, its "
            "project.client.cache_bytes" + (f", and {taken} tokens are taken" if taken else ""),
        )  # fmt: skip


def _does_not_fit(request: GenerationRequest, most: int, why: str) -> str | None:
    """What to say to a text for which there will never be room: how much would fit."""
    length = len(request.prompt_ids)
    if length + request.max_new_tokens <= most:
        return None
    if length >= most:
        return f"prompt must be at most {max(0, most - 1)} tokens here ({why}), got {length}"
    return (
        f"project.max_new_tokens must be at most {most - length} here for a prompt of {length} tokens ({why}), "
        f"got {request.max_new_tokens}"
    )


def _one_line(error: Exception) -> str:
    """What went wrong, for people; torch writes whole pages."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _same(left: GenerationRequest, right: GenerationRequest) -> bool:
    """Whether both ask for the same text."""
    settings = all(getattr(left, name) == getattr(right, name) for name in ("sampling", "max_new_tokens", "threshold"))
    return settings and list(left.prompt_ids) == list(right.prompt_ids)
