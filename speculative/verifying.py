"""The verifier's core: all texts on one engine, and one forward pass checks every guess of every text that is ready.

Texts that have room in the engine are *running*; others wait in line for it. A text that was left by its connection
goes on alone for a while, so that whoever takes it up again (`resume`) finds it further on.

Knows nothing about tokenizers, networks or threads: whoever holds a `Verifier` calls it from one thread, and sleeps for
`patience()` between two ticks unless there is something to tell it.
"""

from __future__ import annotations

import hmac
import logging
import math
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

from lab.engine import Engine, Request, TargetStep, check_ids
from lab.kv import CacheFull
from lab.not_finite import NotFinite
from speculative.lookup import Lookup
from speculative.messages import Reason
from speculative.policy import Pacing, PassCosts
from speculative.text import Ended, Outcome, Text, TextRequest

log = logging.getLogger(__name__)

MOST_KEPT = 256
"""Texts that nobody is connected to; the oldest is forgotten for one more. What is kept of most is their ids."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """How much a verifier gives."""

    prefill_chunk: int
    """Most tokens of a prompt in one pass."""
    longest_check: int
    """Most guesses of one text in one pass."""
    window: int
    """Most guesses of one text that may wait."""
    lookup: tuple[int, int] | None
    """Longest and shortest n-gram of the verifier's own guesses; None: it makes none."""
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

    text: Text
    client: Hashable
    name: int | None
    owner: bytes
    since: float
    """When its client was last heard of, or was told something."""
    is_left: bool = False
    ended: Ended | None = None

    @property
    def is_kept(self) -> bool:
        """Whether it is here only in case that somebody asks for it again."""
        return self.is_left or self.ended is not None


class Verifier:
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
        terms: Terms,
        closed: Callable[[Text, Ended], None],
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
        self._running: dict[Hashable, Text] = {}
        self._line: dict[Hashable, Text] = {}
        """Those that wait for room, in the order in which they came."""

    def open(
        self, key: Hashable, request: TextRequest, *, client: Hashable, name: int | None = None, owner: bytes = b""
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
        terms = self._terms
        lookup = Lookup(*terms.lookup, self.costs) if terms.lookup and request.threshold is None else None
        pacing = Pacing(self.costs, request.draft_length or None, terms.longest_check)
        text = Text(key, request, window=terms.window, pacing=pacing, lookup=lookup)
        self._texts[key] = _Owned(text, client, name, owner, self._clock())
        if name is not None:
            self._keys[name] = key
        self._line[key] = text
        self._admit()
        return []

    def resume(
        self, key: Hashable, request: TextRequest, *, client: Hashable, name: int, owner: bytes
    ) -> list[Outcome]:
        """Take up a text again: whoever was connected to it is told that it left. One that is not here is begun where
        it stood."""
        before = self._keys.get(name)
        if before is None:
            refused = self.open(key, request, client=client, name=name, owner=owner)
            return refused or [self._texts[key].text.told(len(request.prompt_ids) + len(request.new_ids))]
        owned = self._texts[before]
        if not hmac.compare_digest(owned.owner, owner):
            return [Ended(key, Reason.refused, f"text {name:016x} must be resumed by who opened it")]
        known = [*request.prompt_ids, *request.new_ids]
        if not _same(request, owned.text.request) or owned.text.ids[: len(known)] != known:
            return [Ended(key, Reason.refused, f"text {name:016x} must be resumed with its own prompt and settings")]
        if owned.ended is None and (refusal := self._over_limits(owned.text.request, client, besides=owned)):
            return [Ended(key, Reason.refused, refusal)]
        outcomes: list[Outcome] = [] if owned.is_kept else [Ended(before, Reason.left, "it was resumed elsewhere")]
        self._rename(owned, key)
        owned.client, owned.is_left, owned.since = client, False, self._clock()
        outcomes.append(owned.text.told(len(known)))
        if owned.ended is not None:
            outcomes.append(replace(owned.ended, key=key))
        return outcomes

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
            ended = self._end(owned.text, Ended(key, Reason.failed, str(error)), forget=True)
            self._admit()
            return [ended]
        return []

    def leave(self, key: Hashable) -> None:
        """Its connection ended: the text goes on alone and is kept for a while, if it has a name."""
        owned = self._texts.get(key)
        if owned is None:
            return
        if owned.name is None:
            self.close(key)
            return
        owned.is_left, owned.since = True, self._clock()
        self._admit()

    def close(self, key: Hashable) -> None:
        """Forget a text, if it is still there."""
        owned = self._texts.get(key)
        if owned is None:
            return
        if owned.ended is None:
            self._end(owned.text, Ended(key, Reason.left, ""), forget=True)
            self._admit()
        else:
            self._forget(owned)

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
            if text.key not in fed and self._is_ready(text)
        ]
        outcomes += self._check(ready) if ready else []
        outcomes += self._feed(prompts) if prompts else []
        self._admit()  # not before: whoever makes room for another must not be in the middle of a pass
        return outcomes

    def patience(self) -> float:
        """Seconds until a tick has something to do, if nobody calls meanwhile; infinite when it never will.

        As soon as one text need not wait, all go on with what they have: a pass costs the same anyway, and a text that
        stayed behind would lose all of it.
        """
        chunk = self._terms.prefill_chunk
        now = self._clock()
        waits = [math.inf]
        for text in self._running.values():
            alone = self._texts[text.key].is_left or bool(text.prompt_piece(chunk))
            waits.append(0.0 if alone else text.patience(now))
        waits += [self._deadline(owned) - now for owned in self._texts.values()]
        return max(0.0, min(waits))

    def shutdown(self) -> None:
        """Close every text and the engine."""
        for key in list(self._texts):
            self.close(key)
        self.engine.shutdown()

    def _is_ready(self, text: Text) -> bool:
        return text.is_ready or self._texts[text.key].is_left

    # Passes

    def _check(self, ready: Sequence[tuple[Text, list[int]]]) -> list[Outcome]:
        """One forward pass over the last token of each text and its guesses."""
        requests = [(text.session, [text.ids[-1], *guesses]) for text, guesses in ready]
        rows = sum(len(ids) for _, ids in requests)
        outcomes: list[Outcome] = []
        began = self._clock()
        steps = self._extend(requests, want_all=True)
        self.costs.passed(self._clock() - began, rows, len(ready))
        for (text, guesses), step in zip(ready, steps):
            outcomes += self._judge(text, guesses, step)
        return outcomes

    def _feed(self, prompts: Sequence[tuple[Text, list[int]]]) -> list[Outcome]:
        """One forward pass over a piece of each prompt; the last piece gives the first new token."""
        requests = [(text.session, piece) for text, piece in prompts]
        outcomes: list[Outcome] = []
        for (text, _), step in zip(prompts, self._extend(requests, want_all=False)):
            if not text.unseen or not isinstance(step, TargetStep) or step.fault:
                outcomes += self._judge(text, [], step)
        return outcomes

    def _extend(self, requests: Sequence[Request], *, want_all: bool) -> list[TargetStep | CacheFull]:
        """All texts in one pass; without room for all of them each alone, so that only who is too long fails.

        A step with a fault is one of a text that met NaN or infinity; the others have theirs."""
        try:
            return list(self.engine.extend(requests, "all" if want_all else "last"))
        except NotFinite as some:
            return list(some.steps)
        except CacheFull as full:
            if len(requests) == 1:
                return [full]
            return [step for request in requests for step in self._extend([request], want_all=want_all)]

    def _judge(self, text: Text, guesses: Sequence[int], step: TargetStep | CacheFull) -> list[Outcome]:
        if isinstance(step, CacheFull):
            return [self._fail(text, str(step))]
        if step.fault:
            return self._distrust(text, guesses, step.fault)
        verdict = text.judge(guesses, step, self._end_ids, self._clock())
        self._touch(text)
        ended = text.ended(self._end_ids)
        if ended is None:
            return [verdict]
        costs = self.costs
        ended = replace(ended, step_seconds=costs.step_seconds, row_seconds=costs.row_seconds)
        return [verdict, self._end(text, ended, forget=False)]

    def _touch(self, text: Text) -> None:
        owned = self._texts[text.key]
        if not owned.is_left:
            owned.since = self._clock()

    def _distrust(self, text: Text, guesses: Sequence[int], fault: str) -> list[Outcome]:
        """A pass met NaN or infinity. With guesses in it that says nothing of the text: what the engine holds is
        forgotten, and the next token is made without any."""
        if not guesses:
            log.warning("a text cannot go on: %s", fault)
            return [self._fail(text, fault)]
        text.go_alone()
        self._wait_again(text)
        return []

    def _fail(self, text: Text, why: str) -> Ended:
        return self._end(text, Ended(text.key, Reason.failed, why), forget=True)

    # Room

    def _admit(self) -> None:
        """Texts in line get what room there is: first those of clients that have the fewest running."""
        while self._line:
            text = min(self._line.values(), key=self._running_of_client)
            try:
                text.enter(self.engine.open([], text.request.sampling, text.longest))
            except CacheFull:
                if not self._make_room():
                    return
                continue
            del self._line[text.key]
            self._running[text.key] = text
            self._touch(text)

    def _running_of_client(self, text: Text) -> int:
        client = self._texts[text.key].client
        return sum(self._texts[key].client == client for key in self._running)

    def _make_room(self) -> bool:
        """A text that nobody is connected to gives its place to one that somebody waits for."""
        waits = any(not self._texts[key].is_left for key in self._line)
        left = [text for key, text in self._running.items() if self._texts[key].is_left]
        if not (waits and left):
            return False
        self._wait_again(left[0])
        return True

    def _wait_again(self, text: Text) -> None:
        """Give a text's room back; it comes in again when there is some."""
        self._stop(text)
        self._line[text.key] = text

    def _stop(self, text: Text) -> None:
        self._line.pop(text.key, None)
        if self._running.pop(text.key, None) is not None:
            text.leave()

    # Ends

    def _expire(self) -> list[Outcome]:
        """Forget what nobody came back for, and end what its drafter has left lying."""
        now = self._clock()
        outcomes: list[Outcome] = []
        kept = [key for key, owned in self._texts.items() if owned.is_kept]
        for oldest in kept[:-MOST_KEPT]:
            self.close(oldest)
        for owned in [owned for owned in self._texts.values() if self._deadline(owned) <= now]:
            if owned.is_kept:
                self.close(owned.text.key)
            else:
                text = f"no DRAFT came for {self._terms.idle_seconds:g} s"
                outcomes.append(self._end(owned.text, Ended(owned.text.key, Reason.evicted, text), forget=True))
        return outcomes

    def _deadline(self, owned: _Owned) -> float:
        if owned.is_kept:
            return owned.since + self._terms.keep_seconds
        waits = owned.text.key in self._running and not owned.text.is_ready
        return owned.since + self._terms.idle_seconds if waits else math.inf

    def _end(self, text: Text, ended: Ended, *, forget: bool) -> Ended:
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
        if before in self._running:
            self._running[key] = self._running.pop(before)
        self._texts[key] = self._texts.pop(before)
        assert owned.name is not None
        self._keys[owned.name] = key

    def _refusal(self, key: Hashable, request: TextRequest, client: Hashable) -> str | None:
        length = len(request.prompt_ids)
        if key in self._texts:
            return "text must have a number of its own, got one that is open"
        if not length:
            return "prompt must hold at least one token, got none"
        try:
            check_ids([*request.prompt_ids, *request.new_ids], self.engine.vocabulary_size)
        except ValueError as error:
            return f"prompt must hold tokens that the target has rows for: {error}"
        if request.max_new_tokens < 1:
            return f"max_new_tokens must be at least 1, got {request.max_new_tokens}"
        if len(request.new_ids) >= request.max_new_tokens:
            return f"new tokens must be fewer than max_new_tokens {request.max_new_tokens}, got {len(request.new_ids)}"
        if length + request.max_new_tokens > self.engine.context:
            return (
                f"prompt and max_new_tokens together must fit the context of {self.engine.context} tokens, "
                f"got {length} + {request.max_new_tokens}"
            )
        return self._over_limits(request, client)

    def _over_limits(self, request: TextRequest, client: Hashable, besides: _Owned | None = None) -> str | None:
        terms = self._terms
        others = [
            owned.text.request
            for owned in self._texts.values()
            if owned.client == client and not owned.is_kept and owned is not besides
        ]
        if len(others) >= terms.client_texts:
            return f"a client may have {terms.client_texts} texts at once (the verifier's project.client.texts)"
        need = terms.bytes_per_token * sum(_full_length([request, *others]))
        if need > terms.client_cache_bytes:
            return (
                f"a client's texts may need {terms.client_cache_bytes} bytes of keys and values (the verifier's "
                f"project.client.cache_bytes), with this one they would need {need}"
            )
        return None


def _same(left: TextRequest, right: TextRequest) -> bool:
    """Whether both ask for the same text."""
    settings = all(getattr(left, name) == getattr(right, name) for name in ("sampling", "max_new_tokens", "threshold"))
    return settings and list(left.prompt_ids) == list(right.prompt_ids)


def _full_length(requests: Iterable[TextRequest]) -> Iterable[int]:
    return (len(request.prompt_ids) + request.max_new_tokens for request in requests)
