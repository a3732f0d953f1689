"""The verifier's core: all sequences on one engine; one forward pass checks the draft tokens of all that are ready.

Sequences that have room in the engine are *running*; others wait in line for it. Room is reserved: a running sequence
has room for its prompt and all of its new tokens, and no other can take it away. A sequence whose connection ended
*rests*: it is kept for a while in case it is resumed, but not computed, and its room may go to the next in line. So may
that of prompts that are kept after the end of their sequences (`speculative.verifier.prefixes`), which go first.

If a pass over several sequences fails, it is repeated with each of them alone, and ends those that fail again. If the
engine also fails on a sequence of the scheduler's own (`prove`), the engine itself is at fault.

Knows nothing about tokenizers, networks or threads: a `Scheduler` is called from one thread, which sleeps for
`patience()` between two ticks unless a call arrives.
"""

import contextlib
import hmac
import logging
import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

from lab.engine.base import Engine, TargetStep
from lab.engine.kv import CacheFull
from lab.engine.not_finite import NotFinite
from lab.engine.sampling import Sampling
from lab.faults import Fault
from speculative.drafts import NgramDrafts, with_schema
from speculative.messages import Reason
from speculative.policy import Pacing, PassCosts
from speculative.request import Ending, GenerationRequest, Outcome, PromptScores, Verdict, Waiting
from speculative.verifier.limits import SchedulerLimits, refusal_by_engine
from speculative.verifier.line import in_turn
from speculative.verifier.lookup import Lookup
from speculative.verifier.prefixes import KeptPrefixes
from speculative.verifier.sequence import VerifiedSequence

log = logging.getLogger(__name__)

MOST_KEPT = 256
"""Sequences without a connection; one more replaces the oldest. Mostly token ids are kept."""
PLACE_SECONDS = 1.0
"""Least time between two reports of a place in line to one client."""

Asked = Sequence[tuple[VerifiedSequence, list[int]]]
"""Sequences of a pass, each with the ids that it is fed."""


class EngineFailed(Fault):
    """The engine cannot do what every request needs: none can be served."""


class Scheduler:
    """All sequences on one engine.

    Args:
        engine: The target.
        end_ids: A sequence ends with any of these.
        limits: How much it gives.
        closed: Called with each sequence that ends.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        end_ids: Sequence[int],
        limits: SchedulerLimits,
        closed: Callable[[VerifiedSequence, Ending], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.costs = PassCosts()
        """Measured seconds of passes."""
        self._end_ids = frozenset(end_ids)
        self._limits = limits
        self._closed = closed
        self._clock = clock
        self._began_at = clock()
        self._sequences: dict[Hashable, VerifiedSequence] = {}
        """All sequences that have a connection or are kept, by key."""
        self._named: dict[int, VerifiedSequence] = {}
        """Sequences by name."""
        self._running: list[VerifiedSequence] = []
        self._resting: list[VerifiedSequence] = []
        """In the order in which their connections ended."""
        self._prefixes = KeptPrefixes(engine, limits.prefill_chunk, limits.prefix_tokens)
        self._line: list[VerifiedSequence] = []
        """In the order of arrival."""
        self._next_places_at = -math.inf
        """When places in line may be reported again."""
        self._is_in_doubt = False
        """Whether a pass failed in a way that may be the engine's own fault."""

    def prove(self) -> None:
        """Run two tokens that belong to no client. Raises `EngineFailed` if the engine cannot."""
        ids = [0] * min(2, self.engine.longest)
        try:
            self.engine.open(ids, Sampling.greedy(), len(ids)).close()
        except (CacheFull, NotFinite):  # the engine works
            return
        except Exception as error:  # any error of torch or a device: no request can be served
            raise EngineFailed(f"the target cannot run a sequence of two tokens: {_one_line(error)}") from error

    def open(
        self,
        key: Hashable,
        request: GenerationRequest,
        *,
        client: Hashable,
        user: str = "",
        name: int | None = None,
        owner: bytes = b"",
    ) -> list[Outcome]:
        """Begin a sequence, or refuse it. `VerifiedSequence` says what `key`, `client` and the other names are."""
        refusal = "request must have a new number, got one that is open" if key in self._sequences else None
        refusal = refusal or refusal_by_engine(request, self.engine) or self._refusal_by_client(request, client)
        if refusal is None and name in self._named:
            refusal = "request must have a new name, got one that is taken"
        if refusal is not None:
            return [Ending(key, Reason.refused, refusal)]
        limits = self._limits
        sequence = self._sequences[key] = VerifiedSequence(
            key,
            request,
            window=limits.window,
            pacing=Pacing(self.costs, request.draft_length or None, limits.longest_check),
            lookup=self._lookup(request),
            client=client,
            user=user,
            name=name,
            owner=owner,
        )
        sequence.heard_at = self._clock()
        if name is not None:
            self._named[name] = sequence
        outcomes = self._queue(sequence)
        # After a restart it knows none of the texts that it had begun. Later it knows each that can still be resumed.
        is_half_done = bool(request.new_ids) and sequence.heard_at - self._began_at < limits.keep_seconds
        if len(self._line) > limits.most_waiting and sequence in self._line and not is_half_done:
            self._line.remove(sequence)
            self._forget(sequence)
            refusal = (
                f"the verifier has no room now, and {limits.most_waiting} requests already wait in line "
                "(its project.max_waiting)"
            )
            return [*outcomes, Ending(key, Reason.full, refusal)]
        return [*outcomes, *self._report_places(sequence)]

    def resume(
        self, key: Hashable, request: GenerationRequest, *, client: Hashable, name: int, owner: bytes
    ) -> list[Outcome]:
        """Resume a sequence under a new `key`; a client that is still connected to it is told that it left. A sequence
        that is not known begins at the position that the request names."""
        sequence = self._named.get(name)
        if sequence is None:
            outcomes = self.open(key, request, client=client, name=name, owner=owner)
            if key not in self._sequences:
                return outcomes
            return [self._sequences[key].verdict_since(len(request.ids)), *outcomes]
        if refusal := self._refusal_to_resume(sequence, request, client, owner):
            return [Ending(key, Reason.refused, refusal)]
        outcomes = [] if sequence.is_kept else [Ending(sequence.key, Reason.left, "it was resumed elsewhere")]
        del self._sequences[sequence.key]
        self._sequences[key] = sequence
        sequence.key, sequence.client, sequence.is_left, sequence.place = key, client, False, 0
        sequence.heard_at = self._clock()
        outcomes.append(sequence.verdict_since(len(request.ids)))
        if sequence.ended is not None:
            return [*outcomes, replace(sequence.ended, key=key)]
        if sequence in self._resting:
            self._resting.remove(sequence)
            self._running.append(sequence)
        elif sequence not in self._running and sequence not in self._line:
            outcomes += self._queue(sequence)
        return [*outcomes, *self._report_places(sequence)]

    def offer(self, key: Hashable, epoch: int, position: int, draft_ids: Sequence[int], now: float) -> list[Outcome]:
        """Give draft tokens to a sequence. One that has ended ignores them; one that cannot hold them is closed.

        `now` is the time of their arrival, which may have been during a pass.
        """
        sequence = self._sequences.get(key)
        if sequence is None or sequence.ended is not None:
            return []
        sequence.heard_at = now
        try:
            sequence.offer(epoch, position, draft_ids, now)
        except ValueError as error:
            return [self._fail(sequence, str(error)), *self._admit()]
        return []

    def leave(self, key: Hashable) -> list[Outcome]:
        """End the connection of a sequence: nothing more is computed for it, and if it has a name it is kept for a
        while."""
        sequence = self._sequences.get(key)
        if sequence is None:
            return []
        if sequence.name is None or not self._limits.keep_seconds:
            return self.close(key)
        sequence.is_left, sequence.heard_at = True, self._clock()
        self._leave_line(sequence)
        if sequence in self._running:
            self._running.remove(sequence)
            self._resting.append(sequence)
        return self._admit()

    def close(self, key: Hashable) -> list[Outcome]:
        """Forget a sequence, if it is still known."""
        sequence = self._sequences.get(key)
        if sequence is None:
            return []
        if sequence.ended is None:
            self._end(sequence, Ending(key, Reason.left, ""), forget=True)
            return self._admit()
        self._forget(sequence)
        return []

    def fail(self, key: Hashable, error: Exception) -> list[Outcome]:
        """End a sequence after a fault of ours."""
        sequence = self._sequences.get(key)
        if sequence is None or sequence.ended is not None:
            return [Ending(key, Reason.failed, _one_line(error))]
        return [self._fail(sequence, _one_line(error)), *self._admit()]

    def tick(self) -> list[Outcome]:
        """Run one pass over every sequence that has tokens to check, and one over prompts that are not fed yet.

        Returns the outcomes; none when no sequence was ready.
        """
        outcomes = self._expire()
        limits = self._limits
        # One in each tick: all rows of its prompt are read in one pass, which takes a while.
        scored = next((one for one in self._running if one.request.scores_prompt and not one.session.position), None)
        unscored = [one for one in self._running if not one.request.scores_prompt or one.session.position]
        prompts = [(one, piece) for one in unscored if (piece := one.prompt_piece(limits.prefill_chunk))]
        fed = {one.key for one, _ in prompts}
        ready = [(one, one.next_draft(limits.longest_check)) for one in unscored if one.key not in fed and one.is_ready]
        outcomes += self._check(ready) if ready else []
        outcomes += self._feed(prompts) if prompts else []
        outcomes += self._score(scored) if scored is not None else []
        if self._is_in_doubt:
            self._is_in_doubt = False
            self.prove()
        # Not earlier: a sequence that gets the room of another must not be in the middle of a pass.
        return [*outcomes, *self._admit(), *self._report_places()]

    def patience(self) -> float:
        """Seconds until a tick has something to do, if nothing is called meanwhile; infinite if it never will.

        Once one sequence need not wait, all others join its pass with what they have: the pass takes as long anyway,
        and a sequence left out would lose all of that time.
        """
        if self._is_in_doubt:
            return 0.0
        now = self._clock()
        waits = [math.inf]
        for sequence in self._running:
            is_scored = sequence.request.scores_prompt and not sequence.session.position
            has_prompt = is_scored or sequence.prompt_piece(self._limits.prefill_chunk)
            waits.append(0.0 if has_prompt else sequence.patience(now))
        waits += [self._deadline(sequence) - now for sequence in self._sequences.values()]
        waits += [self._next_places_at - now] if self._line else []
        return max(0.0, min(waits))

    def unended(self) -> list[VerifiedSequence]:
        """Sequences that have not ended; may be called by any thread."""
        return [one for one in list(self._sequences.values()) if one.ended is None]

    def shutdown(self) -> None:
        """Close every sequence and the engine."""
        for key in list(self._sequences):
            self.close(key)
        self.engine.shutdown()

    # Passes

    def _check(self, ready: Asked) -> list[Outcome]:
        """Run the last token and the draft tokens of each sequence through one forward pass."""
        asked = [(sequence, [sequence.ids[-1], *draft_ids]) for sequence, draft_ids in ready]
        rows = sum(len(ids) for _, ids in asked)
        outcomes: list[Outcome] = []
        began = self._clock()
        steps = self._extend(asked, want_all=True)
        if not self._is_in_doubt:
            self.costs.add(self._clock() - began, rows, len(ready))
        for (sequence, draft_ids), step in zip(ready, steps):
            outcomes += self._judge(sequence, draft_ids, step)
        return outcomes

    def _feed(self, prompts: Asked) -> list[Outcome]:
        """Run a piece of each prompt through one forward pass; the last piece gives the first new token."""
        outcomes: list[Outcome] = []
        for (sequence, _), step in zip(prompts, self._extend(prompts, want_all=False)):
            if isinstance(step, Exception) or step.fault or not sequence.unseen:
                outcomes += self._judge(sequence, [], step)
        return outcomes

    def _score(self, sequence: VerifiedSequence) -> list[Outcome]:
        """Run a whole prompt through one pass, all of whose rows are read."""
        ids = sequence.unseen
        [step] = self._extend([(sequence, ids)], want_all=True)
        verdict, *others = self._judge(sequence, [], step)
        if isinstance(step, Exception) or not isinstance(verdict, Verdict):
            return [verdict, *others]
        count = len(sequence.request.prompt_ids) - 1
        # A step has the alternatives to the token after each of its own.
        return [replace(verdict, prompt=PromptScores(step.nll[1 : count + 1], step.top[:count])), *others]

    def _extend(self, asked: Asked, *, want_all: bool) -> list[TargetStep | Exception]:
        """Run all sequences in one pass; if that fails, each alone, so that only a sequence that fails again gets an
        exception. A sequence that met NaN or infinity gets a step with a fault."""
        positions = [sequence.session.position for sequence, _ in asked]
        try:
            requests = [(sequence.session, ids) for sequence, ids in asked]
            return list(self.engine.extend(requests, "all" if want_all else "last"))
        except NotFinite as some:
            return list(some.steps)
        except Exception as error:  # of torch, of a device, memory that runs out: whose fault it is must be found out
            self._is_in_doubt = True
            if len(asked) == 1:
                return [error]
            log.info("a pass over %d requests failed, now each runs alone: %s", len(asked), _one_line(error))
        for (sequence, _), position in zip(asked, positions, strict=True):
            sequence.session.position = min(sequence.session.position, position)
        return [step for one in asked for step in self._extend([one], want_all=want_all)]

    def _judge(
        self, sequence: VerifiedSequence, draft_ids: Sequence[int], step: TargetStep | Exception
    ) -> list[Outcome]:
        if isinstance(step, Exception):
            log.warning("a request ends by a fault of its own: %s", _one_line(step))
            return [self._fail(sequence, f"the target failed on it: {_one_line(step)}")]
        if step.fault:
            return self._retry_without_draft(sequence, draft_ids, step.fault)
        try:
            verdict = sequence.judge(draft_ids, step, self._end_ids, self._clock())
        except Exception as error:  # a fault of ours must not end other requests
            log.exception("a request ends by a fault of ours")
            return [self._fail(sequence, _one_line(error))]
        self._touch(sequence)
        ended = sequence.end(self._end_ids)
        if ended is None:
            return [verdict]
        costs = self.costs
        ended = replace(ended, step_seconds=costs.step_seconds, row_seconds=costs.row_seconds)
        return [verdict, self._end(sequence, ended, forget=False)]

    def _touch(self, sequence: VerifiedSequence) -> None:
        if not sequence.is_left:
            sequence.heard_at = self._clock()

    def _retry_without_draft(self, sequence: VerifiedSequence, draft_ids: Sequence[int], fault: str) -> list[Outcome]:
        """Forget what the engine holds of a sequence that met NaN or infinity, and make the next token without draft
        tokens: with some in the pass, the fault says nothing of the sequence. Without, it fails."""
        if not draft_ids:
            log.warning("a request cannot continue: %s", fault)
            return [self._fail(sequence, fault)]
        sequence.skip_drafts()
        self._stop(sequence)
        self._line.insert(0, sequence)
        sequence.queued_at = self._clock()
        with contextlib.suppress(Exception):  # it gets its room back at once, or waits like others
            self._enter(sequence)
        return []

    def _fail(self, sequence: VerifiedSequence, why: str) -> Ending:
        return self._end(sequence, Ending(sequence.key, Reason.failed, why), forget=True)

    # Room

    def _queue(self, sequence: VerifiedSequence) -> list[Outcome]:
        """Put a sequence in line, and admit sequences that there is room for."""
        self._line.append(sequence)
        sequence.queued_at = self._clock()
        return self._admit()

    def _admit(self) -> list[Outcome]:
        """Give free room to sequences in line, in their order. One that needs more than there is holds up those behind
        it: else it might wait for ever, while shorter ones come and go."""
        outcomes: list[Outcome] = []
        while self._line:
            sequence = self._order()[0]
            try:
                self._enter(sequence)
            except CacheFull:
                if self._prefixes.drop_oldest():
                    continue
                if not self._resting:
                    break
                self._stop(self._resting[0])
            except Exception as error:  # an engine's error: `prove` finds out whether the engine itself is at fault
                self._is_in_doubt = True
                outcomes.append(self._fail(sequence, f"the target did not take it: {_one_line(error)}"))
        return outcomes

    def _enter(self, sequence: VerifiedSequence) -> None:
        """Give a sequence all the room that it may ever need. Raises `CacheFull` if there is too little."""
        request = sequence.request
        asked = request.sampling, sequence.longest
        kept = None if request.scores_prompt else self._prefixes.open(request.prompt_ids, *asked)
        session = kept or self.engine.open([], *asked)
        session.prompt_tokens = len(request.prompt_ids)
        sequence.enter(session)
        self._leave_line(sequence)
        self._running.append(sequence)
        self._touch(sequence)

    def _leave_line(self, sequence: VerifiedSequence) -> None:
        if sequence in self._line:
            self._line.remove(sequence)
            if sequence.place:
                sequence.figures.waited_seconds += self._clock() - sequence.queued_at
        sequence.place = 0

    def _order(self) -> list[VerifiedSequence]:
        """The line in the order in which room is given."""
        return in_turn(self._line, self._running)

    def _report_places(self, new: VerifiedSequence | None = None) -> list[Outcome]:
        """Report new places in line, once in `PLACE_SECONDS`; or at once, but only to the `new` sequence."""
        now = self._clock()
        if not self._line or (new is None and now < self._next_places_at):
            return []
        if new is None:
            self._next_places_at = now + PLACE_SECONDS
        waiting: list[Outcome] = []
        for place, sequence in enumerate(self._order(), start=1):
            if sequence.place != place and new in (None, sequence):
                sequence.place = place
                waiting.append(Waiting(sequence.key, place))
        return waiting

    def _stop(self, sequence: VerifiedSequence) -> None:
        """Remove a sequence from the engine or from the line."""
        self._leave_line(sequence)
        for sequences in (self._running, self._resting):
            if sequence in sequences:
                sequences.remove(sequence)
        sequence.release()

    # Ends

    def _expire(self) -> list[Outcome]:
        """Forget sequences that were not resumed, and end those that receive no DRAFT."""
        now = self._clock()
        outcomes: list[Outcome] = []
        kept = [key for key, sequence in self._sequences.items() if sequence.is_kept]
        for oldest in kept[:-MOST_KEPT]:
            outcomes += self.close(oldest)
        for sequence in [one for one in self._sequences.values() if self._deadline(one) <= now]:
            if sequence.is_kept:
                outcomes += self.close(sequence.key)
            else:
                ended = Ending(sequence.key, Reason.evicted, f"no DRAFT came for {self._limits.idle_seconds:g} s")
                outcomes.append(self._end(sequence, ended, forget=True))
        return outcomes

    def _deadline(self, sequence: VerifiedSequence) -> float:
        if sequence.is_kept:
            return sequence.heard_at + self._limits.keep_seconds
        waits = not sequence.is_ready and sequence in self._running
        return sequence.heard_at + self._limits.idle_seconds if waits else math.inf

    def _end(self, sequence: VerifiedSequence, ended: Ending, *, forget: bool) -> Ending:
        """End a sequence. Unless `forget`, a named one is kept: its last VERDICT may have been lost."""
        sequence.ended = ended
        self._touch(sequence)
        if ended.reason is not Reason.failed and (session := sequence.hand_over()) is not None:
            self._prefixes.keep(session, sequence.request.prompt_ids)
        self._stop(sequence)
        if forget or sequence.name is None:
            self._forget(sequence)
        self._closed(sequence, ended)
        return ended

    def _forget(self, sequence: VerifiedSequence) -> None:
        del self._sequences[sequence.key]
        if sequence.name is not None:
            del self._named[sequence.name]

    def _lookup(self, request: GenerationRequest) -> Lookup | None:
        if self._limits.lookup is None or request.threshold is not None:
            return None
        drafts = with_schema(NgramDrafts(*self._limits.lookup), request.sampling.logit_rules, self.engine.grammars)
        return Lookup(drafts, self.costs)

    def _refusal_by_client(
        self, request: GenerationRequest, client: Hashable, besides: VerifiedSequence | None = None
    ) -> str | None:
        own = [one for one in self._sequences.values() if one.client == client and not one.is_kept]
        return self._limits.refusal_by_client(request, [one.request for one in own if one is not besides])

    def _refusal_to_resume(
        self, sequence: VerifiedSequence, request: GenerationRequest, client: Hashable, owner: bytes
    ) -> str | None:
        if not hmac.compare_digest(sequence.owner, owner):
            return f"request {sequence.name:016x} must be resumed by the client that opened it"
        if not _is_same(request, sequence.request) or sequence.ids[: len(request.ids)] != request.ids:
            return f"request {sequence.name:016x} must be resumed with its own prompt and settings"
        return None if sequence.ended else self._refusal_by_client(sequence.request, client, besides=sequence)


def _one_line(error: Exception) -> str:
    """A fault on one line; torch writes whole pages."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _is_same(left: GenerationRequest, right: GenerationRequest) -> bool:
    names = ("sampling", "max_new_tokens", "threshold", "logprobs")
    settings = all(getattr(left, name) == getattr(right, name) for name in names)
    return settings and list(left.prompt_ids) == list(right.prompt_ids)
