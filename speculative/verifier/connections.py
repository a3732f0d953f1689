"""The verifier's front: connections on an event loop, texts in the forward thread, messages between the two.

Sessions of `speculative.messages` and requests of the first protocol (`speculative.protocol`) come in on one port. A
connection that sends more frames than it may is not cut off: it is read more slowly, and nobody else is.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import struct
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from lab.engine.sampling import Sampling
from lab.models.fingerprints import changes
from lab.text.settings import FILL
from lab.wire import BadFrame, Frame, FrameConnection, Peer, PeerGone, PeerSilent, WireError, pack_tokens, unpack_tokens
from lab.wire.frames import Error, WireType
from speculative.messages import (
    TABLE,
    TOKENIZER,
    AskVocabularyFrame,
    CloseFrame,
    DraftFrame,
    MessageType,
    OpenFrame,
    Reason,
    ResumeFrame,
    ScoresFrame,
    VerdictFrame,
    VocabularyFrame,
    WaitingFrame,
    WelcomeFrame,
)
from speculative.protocol import MAX_TOKENS, LeftBetweenMessages, read_msg, write_tokens
from speculative.request import Ended, GenerationRequest, Outcome, Verdict, Waiting
from speculative.settings import Mode
from speculative.verifier.forward_thread import Call, ForwardThread
from speculative.verifier.scheduler import Scheduler

log = logging.getLogger(__name__)

LONGEST_REQUEST_BYTES = 2**18
"""Of the first protocol: no text is longer than this in a context of a few thousand tokens."""


@dataclass(frozen=True, kw_only=True)
class FirstProtocolAnswers:
    """How requests of the first protocol are answered: plain text, greedy."""

    to_ids: Callable[[str], Sequence[int]]
    max_new_tokens: int
    timeout_seconds: float
    """Longest silence of a client."""


class Front:
    """Takes every connection of one verifier. Belongs to its event loop."""

    def __init__(
        self,
        verifier: Scheduler,
        welcome: WelcomeFrame,
        token_texts: Sequence[str],
        tokenizer_fingerprint: str,
        answers: FirstProtocolAnswers,
        frames_per_second: float,
        idle_seconds: float,
    ) -> None:
        self._welcome = welcome
        self._token_texts = token_texts
        self._fingerprint = tokenizer_fingerprint
        self._answers = answers
        self._frames_per_second = frames_per_second
        self._idle_seconds = idle_seconds
        self._loop = asyncio.get_running_loop()
        self._receivers: dict[Hashable, Callable[[Outcome], None]] = {}
        """Who is told of a text's outcomes, by its key."""
        self._numbers = itertools.count()
        self.refused = 0
        """Texts that were not taken."""
        self.thread = ForwardThread(verifier, self._deliver)

    async def serve_frames(self, connection: FrameConnection) -> None:
        """Everything a connection asks for, until it ends."""
        texts = _Texts(self, connection)
        pace = _Pace(self._frames_per_second, self._loop.time())
        try:
            connection.send(MessageType.welcome, 0, self._welcome)
            while True:
                frame = await self._next_frame(connection, texts)
                if connection.fault is None:
                    texts.take(frame)
                    await connection.pause(pace.spend(self._loop.time()))
                elif isinstance(frame.head, CloseFrame):  # it has left: of what it said before only its goodbyes count
                    texts.take(frame)
        except BadFrame as bad:
            texts.refuse(bad)
            raise
        except PeerGone:
            if texts.begun == 0 or not texts.is_idle:
                raise
            log.info("%s left after %d text%s", connection.peer, texts.begun, "s" * (texts.begun > 1))
        finally:
            texts.close()

    async def serve_first_protocol(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: asyncio.Event
    ) -> None:
        """Requests of the first protocol, one after the other, until the client has `left`."""
        name = writer.get_extra_info("peername") or ("?", 0)
        peer = Peer(role="client", address=f"{name[0]}:{name[1]}", phase="request")
        while True:
            try:
                text = await read_msg(
                    reader,
                    peer=peer,
                    max_bytes=LONGEST_REQUEST_BYTES,
                    timeout_seconds=self._answers.timeout_seconds,
                )
            except LeftBetweenMessages:
                return
            ids = await self._continuation(text, peer, left)
            await write_tokens(writer, ids, peer=peer, timeout_seconds=self._answers.timeout_seconds)

    def open(self, key: Hashable, receiver: Callable[[Outcome], None], call: Call) -> None:
        """Begin or resume a text, as `call` does it; `receiver` is told of its outcomes, in the event loop."""
        self._receivers[key] = receiver
        self._submit(key, call)

    def offer(self, key: Hashable, draft: DraftFrame, guesses: Sequence[int]) -> None:
        """Hand in guesses."""
        now = time.monotonic()
        self._submit(key, lambda verifier: verifier.offer(key, draft.epoch, draft.position, guesses, now))

    def close(self, key: Hashable) -> None:
        """Forget a text; its receiver is told nothing more."""
        self._receivers.pop(key, None)
        self._submit(key, lambda verifier: verifier.close(key))

    def leave(self, key: Hashable) -> None:
        """Nobody listens to a text any more; its receiver is told nothing."""
        self._receivers.pop(key, None)
        self._submit(key, lambda verifier: verifier.leave(key))

    def _submit(self, key: Hashable, call: Call) -> None:
        """Have something done for a text, in the forward thread. If it fails, that text ends, and nothing else."""

        def do(verifier: Scheduler) -> list[Outcome]:
            try:
                return call(verifier)
            except Exception as error:  # what one text does must not end the thread that serves all
                log.exception("a text ends by a fault of ours")
                return verifier.fail(key, error)

        self.thread.submit(do)

    def _deliver(self, outcomes: list[Outcome]) -> None:
        """Called in the forward thread."""
        try:
            self._loop.call_soon_threadsafe(self._hand_out, outcomes)
        except RuntimeError:  # the loop has ended, and with it every connection
            log.debug("%d outcomes came after the end", len(outcomes))

    def _hand_out(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            receiver = self._receivers.get(outcome.key)
            if isinstance(outcome, Ended):
                self.refused += outcome.reason is Reason.refused
                self._receivers.pop(outcome.key, None)
            if receiver is None:
                continue
            try:
                receiver(outcome)
            except Exception:  # what one cannot be told is no reason not to tell the others
                log.exception("a text ends by a fault of ours")
                self.close(outcome.key)

    async def _continuation(self, text: str, peer: Peer, left: asyncio.Event) -> list[int]:
        """The target's own greedy text. Raises `BadFrame` for a prompt that is refused, `PeerGone` when the client does
        not wait for it."""
        done: asyncio.Future[Ended] = self._loop.create_future()
        accepted: list[int] = []

        def receive(outcome: Outcome) -> None:
            if isinstance(outcome, Verdict):
                accepted.extend(outcome.ids)
            elif isinstance(outcome, Ended) and not done.done():
                done.set_result(outcome)

        prompt_ids = self._answers.to_ids(text)
        request = GenerationRequest(
            prompt_ids=prompt_ids,
            sampling=Sampling.greedy(),
            max_new_tokens=self._most_new_tokens(len(prompt_ids)),
            mode=Mode["async"],
            threshold=None,
        )
        key = client = self.new_key()
        gone = asyncio.create_task(left.wait())
        try:
            if not left.is_set():
                self.open(key, receive, lambda verifier: verifier.open(key, request, client=client))
                either: set[asyncio.Future[Any]] = {done, gone}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                raise PeerGone(peer, "left before its answer")
        finally:
            gone.cancel()
            self.close(key)
        ended = done.result()
        if ended.reason in (Reason.refused, Reason.failed):
            raise BadFrame(peer, f"sent a prompt that cannot be continued: {ended.text}")
        return accepted

    def _most_new_tokens(self, prompt_tokens: int) -> int:
        """Of an answer of the first protocol."""
        if self._answers.max_new_tokens != FILL:
            return self._answers.max_new_tokens
        return max(1, min(self._welcome.context - prompt_tokens, MAX_TOKENS))  # the verifier refuses what is full

    async def _next_frame(self, connection: FrameConnection, texts: _Texts) -> Frame:
        """What the peer says next. A connection without a text is not worth its place for ever: raises `PeerSilent`."""
        while True:
            try:
                async with asyncio.timeout(self._idle_seconds):
                    return await connection.recv()
            except TimeoutError:
                if texts.is_idle:
                    what = f"asked for nothing in {self._idle_seconds:g} s"
                    raise PeerSilent(connection.peer, what) from None

    def new_key(self) -> Hashable:
        """Something that nothing else is named by."""
        return next(self._numbers)

    def vocabulary(self) -> bytes:
        """The text of every id, as VOCABULARY's body."""
        return msgspec.msgpack.encode([text.encode(errors="surrogatepass") for text in self._token_texts])

    def knows(self, connection: FrameConnection) -> bool:
        """Whether the peer's tokenizer is ours."""
        return connection.agreed.fingerprints.get(TOKENIZER) == self._fingerprint

    @property
    def limits(self) -> WelcomeFrame:
        """What the target takes."""
        return self._welcome


def _close(ended: Ended) -> CloseFrame:
    return CloseFrame(
        reason=ended.reason,
        text=ended.text[:1024],
        step_seconds=ended.step_seconds,
        row_seconds=ended.row_seconds,
    )


class _Pace:
    """Frames that a connection may send: so many a second, and what it did not use for a second."""

    def __init__(self, per_second: float, now: float) -> None:
        self._per_second = per_second
        self._saved = per_second
        self._now = now

    def spend(self, now: float) -> float:
        """A frame has come; returns how long not to read the next one."""
        self._saved = min(self._per_second, self._saved + (now - self._now) * self._per_second) - 1
        self._now = now
        return max(0.0, -self._saved / self._per_second)


class _Texts:
    """The texts of one connection."""

    def __init__(self, front: Front, connection: FrameConnection) -> None:
        self._front = front
        self._connection = connection
        self._client = front.new_key()
        self._open: dict[int, OpenFrame] = {}
        """By number; those that have ended are not in it."""
        self._keys: dict[int, Hashable] = {}
        """By number, for as long as the peer may still say something of the text."""
        self._asked = False
        self.begun = 0
        """Texts that it has asked for."""

    @property
    def is_idle(self) -> bool:
        """Whether it has no text."""
        return not self._open

    def take(self, frame: Frame) -> None:
        """Do what a frame asks for. Raises `BadFrame` for what no drafter of ours would send."""
        head = frame.head
        if isinstance(head, OpenFrame):
            self.begun += 1
            self._begin(frame, head)
        elif isinstance(head, DraftFrame):
            self._offer(frame, head)
        elif isinstance(head, CloseFrame):
            self._open.pop(frame.session, None)
            self._front.close(self._keys.pop(frame.session, None))
        elif isinstance(head, AskVocabularyFrame) and not self._asked:
            self._asked = True
            self._connection.send(MessageType.vocabulary, 0, VocabularyFrame(), self._front.vocabulary())
        else:
            raise BadFrame(self._connection.peer, f"sent {TABLE.name(frame.type)}, which a verifier does not take")

    def refuse(self, bad: BadFrame) -> None:
        """Tell the peer why the connection ends, if it still listens."""
        if self._connection.fault is None:
            self._connection.send(WireType.error, 0, Error(code=type(bad).__name__, text=bad.what[:1024]))

    def close(self) -> None:
        """The connection has ended: nobody listens."""
        for number in self._open:
            self._front.leave(self._keys[number])

    def _begin(self, frame: Frame, head: OpenFrame) -> None:
        peer = self._connection.peer
        peer.phase = "RESUME" if isinstance(head, ResumeFrame) else "OPEN"
        if frame.session in self._open:
            raise BadFrame(peer, f"opened text {frame.session} twice")
        if not self._front.knows(self._connection):
            raise BadFrame(peer, "opened a text with another tokenizer than the target's")
        if head.threshold is not None:
            log.warning("%s asked for rule cross_entropy: its text will not be the target's own (lossy)", peer)
        ids = unpack_tokens(frame.body, vocabulary_size=2**31, peer=peer)  # the verifier refuses those without a row
        request = self._request(head, ids)
        key = self._front.new_key()
        if isinstance(head, ResumeFrame) and (changed := changes(head.target, self._front.limits.target)):
            self._open[frame.session] = head
            self._tell(
                frame.session, Ended(key, Reason.refused, f"a text must be resumed at its own target: {changed}")
            )
            return

        def begin(verifier: Scheduler) -> list[Outcome]:
            do = verifier.resume if isinstance(head, ResumeFrame) else verifier.open
            return do(key, request, client=self._client, name=head.name, owner=head.owner)

        self._open[frame.session], self._keys[frame.session] = head, key
        self._front.open(key, lambda outcome: self._tell(frame.session, outcome), begin)

    def _request(self, head: OpenFrame, ids: list[int]) -> GenerationRequest:
        peer = self._connection.peer
        try:
            sampling = head.sampling
        except ValueError as error:
            raise BadFrame(peer, f"asked for sampling that makes no sense: {error}") from None
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
        )

    def _offer(self, frame: Frame, head: DraftFrame) -> None:
        peer = self._connection.peer
        peer.phase, peer.state = "DRAFT", f"epoch {head.epoch}, position {head.position}"
        if frame.session not in self._open:  # it has ended while these were under way
            return
        limits = self._front.limits
        guesses = unpack_tokens(frame.body, vocabulary_size=limits.vocabulary_size, peer=peer)
        if len(guesses) > limits.max_draft_length:
            raise BadFrame(peer, f"sent {len(guesses)} guesses, at most {limits.max_draft_length} are checked at once")
        self._front.offer(self._keys[frame.session], head, guesses)

    def _tell(self, number: int, outcome: Outcome) -> None:
        try:
            if isinstance(outcome, Verdict):
                self._send_verdict(number, outcome)
            elif isinstance(outcome, Waiting):
                self._connection.send(MessageType.waiting, number, WaitingFrame(place=outcome.place))
            elif self._open.pop(number, None) is not None:
                self._connection.send(MessageType.close, number, _close(outcome))
        except WireError as error:  # `serve_frames` sees it, too, and ends
            log.debug("%s", error)

    def _send_verdict(self, number: int, verdict: Verdict) -> None:
        head = VerdictFrame(
            epoch=verdict.epoch, position=verdict.position, accepted=verdict.accepted, prefix=verdict.prefix
        )
        self._connection.send(MessageType.verdict, number, head, pack_tokens(verdict.ids))
        if self._open[number].report:
            numbers = [*verdict.guess_nll, *verdict.margins]
            scores = ScoresFrame(position=verdict.position, guesses=len(verdict.guess_nll))
            self._connection.send(MessageType.scores, number, scores, struct.pack(f"<{len(numbers)}f", *numbers))
