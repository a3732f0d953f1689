"""A running verifier: port, connections, forward thread, and the figures of every sequence that it has served."""

import asyncio
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lab.network import cannot_listen
from lab.settings import UserError
from lab.text.prompts import prompt_ids
from lab.tracking import Tracker
from lab.wire.frame_server import FrameServer
from speculative.messages import Reason, WelcomeFrame, make_side
from speculative.request import Ending
from speculative.settings import SpeculativeProjectSettings, SpeculativeSettings
from speculative.verifier.connections import Connections
from speculative.verifier.first_protocol import FirstProtocol
from speculative.verifier.forward_thread import ForwardThread
from speculative.verifier.limits import SchedulerLimits
from speculative.verifier.scheduler import EngineFailed, Scheduler
from speculative.verifier.sequence import DraftCounts, VerifiedSequence
from speculative.verifier.target import OpenTarget
from speculative.vocabulary import fingerprint, token_texts

BACKLOG_BYTES = 2**20
"""Most waiting frames of one connection: about 2,000 of a client that sends too fast."""


@dataclass
class ServerStats(DraftCounts):
    """Figures of a verifier so far."""

    texts: int = 0
    """Requests that were accepted."""
    finished: int = 0
    unfinished: int = 0
    """Requests whose client left before they were finished, or did not resume them."""
    failed: int = 0
    evicted: int = 0
    refused: int = 0
    """Requests that were refused, with a reason."""
    waited: int = 0
    """Requests that waited in line for room."""
    refused_connections: int = 0
    """Connections that were refused because all were in use."""
    new_tokens: int = 0

    def add(self, sequence: VerifiedSequence, ended: Ending) -> None:
        """Count a sequence that has ended."""
        self.texts += 1
        self.finished += ended.reason in (Reason.end_token, Reason.length)
        self.unfinished += ended.reason is Reason.left
        self.failed += ended.reason is Reason.failed
        self.evicted += ended.reason is Reason.evicted
        self.waited += sequence.figures.waited_seconds > 0
        self.new_tokens += sequence.new_tokens - len(sequence.request.new_ids)
        for count in fields(DraftCounts):
            setattr(self, count.name, getattr(self, count.name) + getattr(sequence.figures, count.name))

    def figures(self) -> dict[str, Any]:
        """The figures of a verifier's last line."""
        return vars(self) | {"alpha": self.alpha}


async def serve(
    settings: SpeculativeSettings,
    target: OpenTarget,
    tokenizer: PreTrainedTokenizerBase,
    tls: ssl.SSLContext | None,
    tracker: Tracker,
    stats: ServerStats,
    announce: Callable[[str, int], None],
) -> None:
    """Serve until cancelled; `announce(host, port)` is called when it listens.

    Raises:
        UserError: an address that cannot be listened on, a target that no request can use.
        EngineFailed: the target fails for every request.
        Exception: what else ended the forward thread.
    """
    project, network = settings.project, settings.network
    loop = asyncio.get_running_loop()

    def closed(sequence: VerifiedSequence, ended: Ending) -> None:  # in the forward thread
        loop.call_soon_threadsafe(_record, stats, tracker, sequence, ended)

    texts = token_texts(tokenizer)
    digest = fingerprint(texts)
    scheduler = Scheduler(target.engine, end_ids=target.end_ids, limits=_limits(target, project), closed=closed)
    try:
        scheduler.prove()
    except EngineFailed as error:
        raise UserError(f"model {target.model} must run here: {error}") from None
    thread = ForwardThread(scheduler, loop.call_soon_threadsafe)
    connections = Connections(
        thread=thread,
        welcome=_welcome(target, project),
        token_texts=texts,
        fingerprint=digest,
        frames_per_second=project.client.frames_per_second,
        idle_seconds=project.idle_seconds,
    )
    first_protocol = FirstProtocol(
        thread=thread,
        to_ids=_to_ids(settings, tokenizer),
        max_new_tokens=project.max_new_tokens,
        context=target.engine.longest,
        timeout_seconds=network.request_timeout_seconds,
    )
    endpoint = make_side(network, "verifier", digest)
    server = FrameServer(
        replace(endpoint, limits=replace(endpoint.limits, backlog_bytes=BACKLOG_BYTES)),
        connections.serve,
        host=network.host,
        port=network.port,
        max_connections=project.max_connections,
        tls=tls,
        # The first protocol has no key: it would be a way around a key that is required.
        handle_first_protocol=None if endpoint.key else first_protocol.serve,
    )
    try:
        with thread:
            try:
                await server.__aenter__()
            except OSError as error:
                raise cannot_listen(network, error) from None
            try:
                announce(network.host, server.port)
                await asyncio.shield(asyncio.wrap_future(thread.finished))  # done when the thread ends
            finally:
                await server.__aexit__(None, None, None)
                stats.refused, stats.refused_connections = thread.refused, server.refused
        await asyncio.sleep(0)  # sequences that the thread closed at its end are recorded now
    finally:
        for sequence in scheduler.unended():  # those that the thread did not close
            _record(stats, tracker, sequence, Ending(sequence.key, Reason.left, ""))


def _record(stats: ServerStats, tracker: Tracker, sequence: VerifiedSequence, ended: Ending) -> None:
    figures = sequence.figures
    stats.add(sequence, ended)
    tracker.log(
        stats.texts,
        ended_by=ended.reason,
        prompt_tokens=len(sequence.request.prompt_ids),
        new_tokens=sequence.new_tokens,
        alpha=figures.alpha,
        epochs=sequence.epoch,
        lossless=sequence.request.threshold is None,
        **figures.row(),
    )


def _limits(target: OpenTarget, project: SpeculativeProjectSettings) -> SchedulerLimits:
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
        prefix_tokens=project.prefix_tokens,
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


def _to_ids(settings: SpeculativeSettings, tokenizer: PreTrainedTokenizerBase) -> Callable[[str], Sequence[int]]:
    return partial(prompt_ids, tokenizer, chat=False, special_tokens=settings.project.special_tokens)
