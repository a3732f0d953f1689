"""Connections of drafters: their frames become calls of the forward thread, its outcomes become frames.

A connection that sends too many frames is not cut off: it is read more slowly, without slowing others.
"""

import asyncio
import logging
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import msgspec

from lab.models.fingerprints import changes
from lab.wire.faults import BadFrame, PeerGone, PeerSilent, WireError
from lab.wire.frame_connection import FrameConnection
from lab.wire.frames import Error, Frame, WireType
from lab.wire.tokens import pack_tokens, unpack_tokens
from speculative.messages import (
    TABLE,
    TOKENIZER,
    AskVocabularyFrame,
    CachedFrame,
    CloseFrame,
    DraftFrame,
    MessageType,
    OpenFrame,
    Reason,
    ResumeFrame,
    VerdictFrame,
    VocabularyFrame,
    WaitingFrame,
    WelcomeFrame,
)
from speculative.request import Ending, GenerationRequest, Outcome, Verdict, Waiting
from speculative.scores import pack_scores
from speculative.verifier.forward_thread import ForwardThread
from speculative.verifier.scheduler import Scheduler

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Connections:
    """All connections of one verifier."""

    thread: ForwardThread
    welcome: WelcomeFrame
    token_texts: Sequence[str]
    fingerprint: str
    """Digest of the tokenizer, to detect drafters with another one."""
    frames_per_second: float
    idle_seconds: float

    async def serve(self, connection: FrameConnection) -> None:
        """Handle everything that a connection requests, until it ends."""
        await _DrafterConnection(self, connection).serve()


class _DrafterConnection:
    """One connection and its requests. Belongs to the event loop."""

    def __init__(self, shared: Connections, connection: FrameConnection) -> None:
        self._shared, self._thread, self._connection = shared, shared.thread, connection
        self._open: dict[int, OpenFrame] = {}
        """Requests by session; without those that have ended."""
        self._keys: dict[int, Hashable] = {}
        """By session, as long as the drafter may still send frames for it."""
        self._cached: dict[int, int] = {}
        """Tokens of the last CACHED, by session."""
        self._has_vocabulary = False
        self._begun = 0
        """Number of requests."""

    async def serve(self) -> None:
        connection, loop = self._connection, asyncio.get_running_loop()
        pace = _Pace(self._shared.frames_per_second, loop.time())
        try:
            connection.send(MessageType.welcome, 0, self._shared.welcome)
            while True:
                frame = await self._next_frame()
                if connection.fault is None:
                    self._take(frame)
                    await connection.pause(pace.spend(loop.time()))
                elif isinstance(frame.head, CloseFrame):  # it has left: earlier frames no longer matter
                    self._take(frame)
        except BadFrame as bad:
            if connection.fault is None:
                connection.send(WireType.error, 0, Error(code=type(bad).__name__, text=bad.what[:1024]))
            raise
        except PeerGone:
            if self._begun == 0 or self._open:
                raise
            log.info("%s left after %d request%s", connection.peer, self._begun, "s" * (self._begun > 1))
        finally:
            for session in self._open:
                self._thread.leave(self._keys[session])

    async def _next_frame(self) -> Frame:
        """Raises `PeerSilent` when nothing comes: a connection without a request may not stay for ever."""
        seconds = self._shared.idle_seconds
        while True:
            try:
                async with asyncio.timeout(seconds):
                    return await self._connection.recv()
            except TimeoutError:
                if not self._open:
                    raise PeerSilent(self._connection.peer, f"sent no request in {seconds:g} s") from None

    # From the drafter

    def _take(self, frame: Frame) -> None:
        """Handle a frame. Raises `BadFrame` for frames that no drafter of ours would send."""
        head = frame.head
        if isinstance(head, OpenFrame):
            self._begun += 1
            self._begin(frame, head)
        elif isinstance(head, DraftFrame):
            self._offer(frame, head)
        elif isinstance(head, CloseFrame):
            self._open.pop(frame.session, None)
            self._cached.pop(frame.session, None)
            self._thread.close(self._keys.pop(frame.session, None))
        elif isinstance(head, AskVocabularyFrame) and not self._has_vocabulary:
            self._has_vocabulary = True
            texts = [text.encode(errors="surrogatepass") for text in self._shared.token_texts]
            self._connection.send(MessageType.vocabulary, 0, VocabularyFrame(), msgspec.msgpack.encode(texts))
        else:
            raise BadFrame(self._connection.peer, f"sent {TABLE.name(frame.type)}, which a verifier does not accept")

    def _begin(self, frame: Frame, head: OpenFrame) -> None:
        peer, session = self._connection.peer, frame.session
        peer.phase = "RESUME" if isinstance(head, ResumeFrame) else "OPEN"
        if session in self._open:
            raise BadFrame(peer, f"opened request {session} twice")
        if self._connection.agreed.fingerprints.get(TOKENIZER) != self._shared.fingerprint:
            raise BadFrame(peer, "opened a request with another tokenizer than the target's")
        if head.threshold is not None:
            log.warning("%s asked for rule cross_entropy: its text will not be the target's own (lossy)", peer)
        ids = unpack_tokens(frame.body, vocabulary_size=2**31, peer=peer)  # the scheduler checks their range
        request = self._request(head, ids)
        key = object()
        self._open[session] = head
        if isinstance(head, ResumeFrame) and (changed := changes(head.target, self._shared.welcome.target)):
            self._send(session, Ending(key, Reason.refused, f"request must be resumed at its own target: {changed}"))
            return

        def begin(scheduler: Scheduler) -> list[Outcome]:
            do = scheduler.resume if isinstance(head, ResumeFrame) else scheduler.open
            return do(key, request, client=self, name=head.name, owner=head.owner)

        self._keys[session] = key
        self._thread.open(key, lambda outcome: self._send(session, outcome), begin)

    def _request(self, head: OpenFrame, ids: list[int]) -> GenerationRequest:
        peer = self._connection.peer
        try:
            sampling = head.sampling
        except ValueError as error:
            raise BadFrame(peer, f"sent invalid sampling settings: {error}") from None
        new = head.new_tokens if isinstance(head, ResumeFrame) else 0
        if new > len(ids):
            raise BadFrame(peer, f"sent {len(ids)} ids and called {new} of them new")
        return GenerationRequest(
            prompt_ids=ids[: len(ids) - new],
            new_ids=ids[len(ids) - new :],
            sampling=sampling,
            max_new_tokens=head.max_new_tokens,
            mode=head.mode,
            threshold=head.threshold,
            draft_length=head.draft_length,
            logprobs=head.logprobs,
        )

    def _offer(self, frame: Frame, head: DraftFrame) -> None:
        peer, limits, now = self._connection.peer, self._shared.welcome, time.monotonic()
        peer.phase, peer.state = "DRAFT", f"epoch {head.epoch}, position {head.position}"
        if frame.session not in self._open:  # it ended while this was in transit
            return
        ids = unpack_tokens(frame.body, vocabulary_size=limits.vocabulary_size, peer=peer)
        if len(ids) > limits.max_draft_length:
            raise BadFrame(peer, f"sent {len(ids)} draft tokens, at most {limits.max_draft_length} are checked at once")
        key = self._keys[frame.session]
        self._thread.submit(key, lambda scheduler: scheduler.offer(key, head.epoch, head.position, ids, now))

    # To the drafter

    def _send(self, session: int, outcome: Outcome) -> None:
        send = self._connection.send
        try:
            if isinstance(outcome, Verdict):
                self._send_verdict(session, outcome)
            elif isinstance(outcome, Waiting):
                send(MessageType.waiting, session, WaitingFrame(place=outcome.place))
            elif self._open.pop(session, None) is not None:
                self._cached.pop(session, None)
                head = CloseFrame(
                    reason=outcome.reason,
                    text=outcome.text[:1024],
                    step_seconds=outcome.step_seconds,
                    row_seconds=outcome.row_seconds,
                )
                send(MessageType.close, session, head)
        except WireError as error:  # `serve` sees the error, too, and ends
            log.debug("%s", error)

    def _send_verdict(self, session: int, verdict: Verdict) -> None:
        if verdict.cached_tokens != self._cached.get(session, 0):
            self._cached[session] = verdict.cached_tokens
            self._connection.send(MessageType.cached, session, CachedFrame(tokens=verdict.cached_tokens))
        head = VerdictFrame(
            epoch=verdict.epoch, position=verdict.position, accepted=verdict.accepted, prefix=verdict.prefix
        )
        self._connection.send(MessageType.verdict, session, head, pack_tokens(verdict.ids))
        asked = self._open[session]
        if asked.report or asked.logprobs:
            self._connection.send(MessageType.scores, session, *pack_scores(verdict, report=asked.report))


class _Pace:
    """Limits the speed of reading: `per_second` frames, plus those that were unused in the last second."""

    def __init__(self, per_second: float, now: float) -> None:
        self._per_second = per_second
        self._saved = per_second
        self._now = now

    def spend(self, now: float) -> float:
        """Count a frame that came at `now`; return how long not to read the next one."""
        self._saved = min(self._per_second, self._saved + (now - self._now) * self._per_second) - 1
        self._now = now
        return max(0.0, -self._saved / self._per_second)
