"""A writer over an engine in this process: a whole model, or one over shards; texts share forward passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext

from typing_extensions import override

from lab.engine.base import Engine, check_schema
from serve.settings import ServeProjectSettings
from serve.writer import Counts, Ended, InLine, NewTokens, PromptTokens, Receive, Writer
from speculative.messages import Reason
from speculative.request import Ending, GenerationRequest, Outcome, Verdict, Waiting
from speculative.verifier.forward_thread import ForwardThread
from speculative.verifier.limits import SchedulerLimits
from speculative.verifier.scheduler import Scheduler
from speculative.verifier.sequence import DraftCounts, VerifiedSequence
from speculative.verifier.target import OpenTarget

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
        self._prompt_tokens = self._cached_tokens = 0
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
    def begin(self, key: Hashable, request: GenerationRequest, client: Hashable, receive: Receive) -> None:
        def received(outcome: Outcome) -> None:
            if isinstance(outcome, Waiting):
                receive(InLine(outcome.place))
            elif isinstance(outcome, Verdict):
                if outcome.prompt is not None:
                    receive(PromptTokens(outcome.prompt.nll, outcome.prompt.top))
                if outcome.ids:
                    # All but the last were draft tokens of the pass that chose them.
                    new = outcome.ids
                    receive(NewTokens(new, len(new) - 1, outcome.nll, outcome.top, outcome.cached_tokens))
            else:
                receive(_ended(outcome))

        self._thread.open(key, received, lambda scheduler: scheduler.open(key, request, client=client))

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
        )

    @override
    def close(self) -> None:
        self._thread.__exit__(None, None, None)

    def _count(self, sequence: VerifiedSequence, ended: Ending) -> None:
        self._ended.passes += sequence.figures.passes
        self._ended.lookups_checked += sequence.figures.lookups_checked
        self._ended.lookups_accepted += sequence.figures.lookups_accepted
        self._prompt_tokens += len(sequence.request.prompt_ids)
        self._cached_tokens += sequence.figures.cached_tokens


def _ended(outcome: Ending) -> Ended:
    if outcome.reason in (Reason.end_token, Reason.length):
        return Ended()
    return Ended(outcome.text or outcome.reason.name, is_refused=outcome.reason is Reason.refused)


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
