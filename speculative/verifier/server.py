"""A verifier at work: port, connections, forward thread, and the figures of every text it served."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lab.network import cannot_listen, make_endpoint
from lab.settings import UserError
from lab.text.prompts import prompt_ids
from lab.tracking import Tracker
from lab.wire import FrameServer
from speculative.messages import PROTOCOL, TABLE, TOKENIZER, Reason, WelcomeFrame
from speculative.request import Ended
from speculative.settings import SpeculativeProjectSettings, SpeculativeSettings
from speculative.verifier.connections import FirstProtocolAnswers, Front
from speculative.verifier.scheduler import EngineFailed, Scheduler, SchedulerLimits
from speculative.verifier.sequence import VerifiedSequence
from speculative.verifier.target import OpenTarget
from speculative.vocabulary import fingerprint, token_texts

BACKLOG_BYTES = 2**20
"""Frames of one connection that wait: about 2,000 of a client that sends more than it may."""


@dataclass
class ServerStats:
    """What a verifier has done so far."""

    texts: int = 0
    """Those that were taken."""
    finished: int = 0
    unfinished: int = 0
    """Their client wanted no more of them before they were finished, or did not come back for them."""
    failed: int = 0
    evicted: int = 0
    refused: int = 0
    """Texts that were not taken, for a reason that their client was told."""
    waited: int = 0
    """Texts that stood in line for room."""
    refused_connections: int = 0
    """Those for which there was no place."""
    new_tokens: int = 0
    passes: int = 0
    """Of texts: one that serves three texts counts three times."""
    drafts_checked: int = 0
    drafts_right: int = 0
    drafts_accepted: int = 0
    """Right ones that came in time."""
    lookups_checked: int = 0
    lookups_accepted: int = 0
    resumes: int = 0

    def add(self, text: VerifiedSequence, ended: Ended) -> None:
        """A text that has ended."""
        figures = text.figures
        self.texts += 1
        self.finished += ended.reason in (Reason.end_token, Reason.length)
        self.unfinished += ended.reason is Reason.left
        self.failed += ended.reason is Reason.failed
        self.evicted += ended.reason is Reason.evicted
        self.waited += figures.waited_seconds > 0
        self.new_tokens += text.new_tokens - len(text.request.new_ids)
        self.passes += figures.passes
        self.drafts_checked += figures.checked
        self.drafts_right += figures.right
        self.drafts_accepted += figures.accepted
        self.lookups_checked += figures.looked_up
        self.lookups_accepted += figures.found
        self.resumes += figures.resumes


async def serve(
    settings: SpeculativeSettings,
    target: OpenTarget,
    tokenizer: PreTrainedTokenizerBase,
    tls: ssl.SSLContext | None,
    tracker: Tracker,
    served: ServerStats,
    announce: Callable[[str, int], None],
) -> None:
    """Serve until cancelled; `announce(host, port)` is called when it listens.

    Raises:
        UserError: an address that cannot be listened on, a target that no request can use.
        EngineFailed: the target fails, whoever asks.
        Exception: what else ended the forward thread.
    """
    project, network = settings.project, settings.network
    loop = asyncio.get_running_loop()

    def closed(text: VerifiedSequence, ended: Ended) -> None:  # in the forward thread
        loop.call_soon_threadsafe(_record, served, tracker, text, ended)

    texts = token_texts(tokenizer)
    digest = fingerprint(texts)
    verifier = Scheduler(target.engine, end_ids=target.end_ids, terms=_terms(target, project), closed=closed)
    try:
        verifier.prove()
    except EngineFailed as error:
        raise UserError(f"model {target.model} must run here: {error}") from None
    front = Front(
        verifier,
        _welcome(target, project),
        texts,
        digest,
        _answers(settings, tokenizer),
        frames_per_second=project.client.frames_per_second,
        idle_seconds=project.idle_seconds,
    )
    endpoint = make_endpoint(
        network,
        role="verifier",
        peer_roles=frozenset({"drafter"}),
        table=TABLE,
        protocol=PROTOCOL,
        fingerprints={TOKENIZER: digest},
        difference=lambda ours, theirs: None,  # the drafter asks which id differs; no text is opened for it
    )
    server = FrameServer(
        replace(endpoint, limits=replace(endpoint.limits, backlog_bytes=BACKLOG_BYTES)),
        front.serve_frames,
        host=network.host,
        port=network.port,
        max_connections=project.max_connections,
        tls=tls,
        # The first protocol has no key: where one is required, it would be a way around it.
        handle_first_protocol=None if endpoint.key else front.serve_first_protocol,
    )
    try:
        with front.thread:
            try:
                await server.__aenter__()
            except OSError as error:
                raise cannot_listen(network, error) from None
            try:
                announce(network.host, server.port)
                # The thread itself says when it ends.
                await asyncio.shield(asyncio.wrap_future(front.thread.finished))
            finally:
                await server.__aexit__(None, None, None)
                served.refused, served.refused_connections = front.refused, server.refused
        await asyncio.sleep(0)  # the texts that the thread closed at its end are recorded now
    finally:
        for text in verifier.unended():  # those that it did not get to
            _record(served, tracker, text, Ended(text.key, Reason.left, ""))


def _record(served: ServerStats, tracker: Tracker, text: VerifiedSequence, ended: Ended) -> None:
    figures = text.figures
    served.add(text, ended)
    tracker.log(
        served.texts,
        ended_by=ended.reason,
        prompt_tokens=len(text.request.prompt_ids),
        new_tokens=text.new_tokens,
        passes=figures.passes,
        drafts_checked=figures.checked,
        drafts_accepted=figures.accepted,
        alpha=figures.right / figures.checked if figures.checked else None,
        lookups_checked=figures.looked_up,
        lookups_accepted=figures.found,
        epochs=text.epoch,
        resumes=figures.resumes,
        waited_seconds=figures.waited_seconds,
        drafts_stale=figures.stale_drafts,
        least_margin=figures.least_margin if figures.passes else None,
        guess_cross_entropy=[round(value, 4) for value in figures.guess_nll],
        lossless=text.request.threshold is None,
    )


def _terms(target: OpenTarget, project: SpeculativeProjectSettings) -> SchedulerLimits:
    draft, client = project.draft, project.client
    return SchedulerLimits(
        prefill_chunk=project.prefill_chunk,
        longest_check=project.max_draft_length,
        window=draft.window,
        lookup=(draft.longest_ngram, draft.shortest_ngram) if project.lookup else None,
        most_waiting=project.max_waiting,
        client_texts=client.texts,
        client_cache_bytes=client.cache_bytes,
        bytes_per_token=target.bytes_per_token,
        keep_seconds=project.resume_seconds,
        idle_seconds=project.idle_seconds,
    )


def _welcome(target: OpenTarget, project: SpeculativeProjectSettings) -> WelcomeFrame:
    return WelcomeFrame(
        model=target.model,
        dtype=target.dtype,
        vocabulary_size=target.engine.vocabulary_size,
        context=target.engine.longest,
        max_draft_length=project.max_draft_length,
        window=project.draft.window,
        end_ids=target.end_ids,
        target=target.fingerprints,
    )


def _answers(settings: SpeculativeSettings, tokenizer: PreTrainedTokenizerBase) -> FirstProtocolAnswers:
    def to_ids(text: str) -> Sequence[int]:
        return prompt_ids(tokenizer, text, chat=False, special_tokens=settings.project.special_tokens)

    return FirstProtocolAnswers(
        to_ids=to_ids,
        max_new_tokens=settings.project.max_new_tokens,
        timeout_seconds=settings.network.request_timeout_seconds,
    )


def figures_of(served: ServerStats) -> dict[str, Any]:
    """The figures of a verifier's last line."""
    return vars(served) | {
        "alpha": served.drafts_right / served.drafts_checked if served.drafts_checked else None,
    }
