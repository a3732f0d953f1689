"""A writer over an engine in this process: a whole model, or one over shards; texts share forward passes."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext

from typing_extensions import override

from lab.device import read_memory
from lab.engine.base import Engine, check_schema
from lab.engine.local import LocalEngine
from serve.models.writer import Counts, Ended, InLine, NewTokens, Place, PromptTokens, Receive, Writer
from serve.settings import ServeProjectSettings
from speculative.messages import Reason
from speculative.request import Ending, GenerationRequest, Outcome, Verdict, Waiting
from speculative.verifier.forward_thread import ForwardThread
from speculative.verifier.limits import SchedulerLimits
from speculative.verifier.scheduler import Scheduler
from speculative.verifier.sequence import DraftCounts, VerifiedSequence
from speculative.verifier.target import OpenTarget
from split.inference.sharded_model import ShardedModel
from split.inference.times import take_apart
from split.transport.base import ShardLost

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Least time between two looks at the engine's places."""
LOOK_REST = 50
"""After a look, the engine is left alone for so many times its duration: shards are asked over the network, and passes
wait meanwhile."""
LONG_AGO = 1e9
"""Seconds: no limit."""


class _InTurn(Scheduler):
    """A scheduler whose passes wait for their turn."""

    turn: Callable[[], AbstractContextManager[None]]

    @override
    def tick(self) -> list[Outcome]:
        with self.turn():
            return super().tick()


class ScheduledWriter(Writer):
    """A verifier's scheduler without a wire: its drafts are those of its own prompt lookup.

    Args:
        target: The engine, ready.
        project: Its limits.
        call_soon: Runs a function in the event loop's thread (`call_soon_threadsafe`).
        turn: A context manager around each pass, where several models share the processor.
    """

    scores_prompts = True

    def __init__(
        self,
        target: OpenTarget,
        project: ServeProjectSettings,
        call_soon: Callable[..., object],
        turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.engine: Engine = target.engine
        self.vocabulary_size, self.context = self.engine.vocabulary_size, self.engine.longest
        self.end_ids, self.fingerprints = target.end_ids, target.fingerprints
        self._ended = DraftCounts()
        self._prompt_tokens = self._cached_tokens = self._new_tokens = 0
        self._places = _places(self.engine, 0.0)
        self._next_look = 0.0
        self._scheduler = _InTurn(
            self.engine, end_ids=target.end_ids, limits=limits_of(project), closed=self._count, clock=time.monotonic
        )
        self._scheduler.turn = turn
        self._scheduler.prove()
        self._thread = ForwardThread(self._scheduler, call_soon)
        self.finished = self._thread.finished

    @override
    def start(self) -> None:
        self._thread.__enter__()

    @override
    def begin(self, key: Hashable, request: GenerationRequest, client: str, user: str, receive: Receive) -> None:
        def received(outcome: Outcome) -> None:
            if isinstance(outcome, Waiting):
                receive(InLine(outcome.place))
            elif isinstance(outcome, Verdict):
                if outcome.prompt is not None:
                    receive(PromptTokens(outcome.prompt.nll, outcome.prompt.top))
                if outcome.ids:
                    # All but the last were draft tokens of the pass that chose them.
                    new = outcome.ids
                    self._new_tokens += len(new)
                    receive(NewTokens(new, len(new) - 1, outcome.nll, outcome.top, outcome.cached_tokens))
            else:
                receive(_ended(outcome))

        self._thread.open(key, received, lambda scheduler: scheduler.open(key, request, client=client, user=user))

    @override
    def check_schema(self, schema: str) -> None:
        check_schema(self.engine.grammars, schema)

    @override
    def leave(self, key: Hashable) -> None:
        self._thread.close(key)

    @override
    def counts(self) -> Counts:
        unended = self._scheduler.unended()
        figures = [self._ended, *(one.figures for one in unended)]
        waiting = sum(1 for one in unended if one.place)
        return Counts(
            running=len(unended) - waiting,
            waiting=waiting,
            passes=sum(one.passes for one in figures),
            drafts_checked=sum(one.lookups_checked for one in figures),
            drafts_accepted=sum(one.lookups_accepted for one in figures),
            prefix_asked=self._prompt_tokens,
            prefix_found=self._cached_tokens,
            new_tokens=self._new_tokens,
        )

    @override
    def places(self) -> Sequence[Place]:
        if time.monotonic() >= self._next_look:
            self._next_look = math.inf  # until this look is over
            self._thread.submit(None, self._look)
        return self._places

    @override
    def close(self) -> None:
        self._thread.__exit__(None, None, None)

    def _look(self, scheduler: Scheduler) -> list[Outcome]:
        """Read the engine's figures, in the thread that owns it."""
        began = time.monotonic()
        try:
            self._places = _places(self.engine, scheduler.costs.step_seconds)
        except ShardLost as lost:  # the next pass brings it back, or says that it cannot
            log.debug("the places are not known now: %s", lost)
        finally:
            now = time.monotonic()
            self._next_look = now + max(LOOK_SECONDS, LOOK_REST * (now - began))
        return []

    def _count(self, sequence: VerifiedSequence, ended: Ending) -> None:
        self._ended.passes += sequence.figures.passes
        self._ended.lookups_checked += sequence.figures.lookups_checked
        self._ended.lookups_accepted += sequence.figures.lookups_accepted
        self._prompt_tokens += len(sequence.request.prompt_ids)
        self._cached_tokens += sequence.figures.cached_tokens


def _ended(outcome: Ending) -> Ended:
    if outcome.reason in (Reason.end_token, Reason.length):
        return Ended()
    reason = outcome.reason
    return Ended(outcome.text or reason.name, is_refused=reason is Reason.refused, is_full=reason is Reason.full)


def _places(engine: Engine, step_seconds: float) -> Sequence[Place]:
    """Where an engine computes; `step_seconds` is the time of a pass over one row, 0 where it is not known.

    Raises ShardLost.
    """
    if isinstance(engine, ShardedModel):
        return _shards(engine)
    if not isinstance(engine, LocalEngine):  # a synthetic one holds nothing
        return []
    numbers, memory = engine.cache.layer_numbers, read_memory(engine.device)
    return [
        Place(
            role="model",
            name="this server",
            device=str(engine.device),
            layers=(min(numbers), max(numbers) + 1),
            weights_bytes=engine.weights_bytes,
            cache_bytes=engine.cache.allocated_bytes,
            rss_bytes=memory.rss_bytes,
            device_memory_used_bytes=memory.device_used_bytes,
            compute_seconds=step_seconds or None,
        )
    ]


def _shards(engine: ShardedModel) -> Sequence[Place]:
    reports = engine.reports()
    apart = take_apart(list(engine.passes), reports)

    def median(number: int, part: str) -> float | None:
        return statistics.median(getattr(one.hops[number], part) for one in apart) if apart else None

    return [
        Place(
            role="shard",
            name=report.figures.name,
            device=report.figures.device,
            layers=(report.layers.start, report.layers.stop),
            weights_bytes=report.figures.weights_bytes,
            cache_bytes=report.figures.kv_bytes,
            rss_bytes=report.figures.rss_bytes,
            device_memory_used_bytes=report.figures.device_memory_used_bytes,
            compute_seconds=median(number, "compute"),
            # Between the clocks of two processes, which are compared to some microseconds.
            hop_seconds=None if (wire := median(number, "wire")) is None else max(0.0, wire),
        )
        for number, report in enumerate(reports)
    ]


def limits_of(project: ServeProjectSettings) -> SchedulerLimits:
    """The server counts its own requests, so nothing here refuses one for another's sake."""
    all_texts = (project.sessions + project.max_waiting) * project.max_choices
    return SchedulerLimits(
        prefill_chunk=project.prefill_chunk,
        longest_check=project.max_draft_length,
        window=project.draft.window,
        lookup=(project.draft.longest_ngram, project.draft.shortest_ngram) if project.lookup else None,
        most_waiting=all_texts,
        client_texts=all_texts,
        client_cache_bytes=0,
        bytes_per_token=0,
        keep_seconds=0.0,
        prefix_tokens=project.prefix_tokens,
        idle_seconds=LONG_AGO,
    )
