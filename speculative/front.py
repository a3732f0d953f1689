"""The verifier's front: connections on an event loop, texts in the forward thread, messages between the two.

Sessions of `speculative.messages` and requests of the first protocol (`speculative.protocol`) come in on one port. A
connection that ends takes its texts with it.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import msgspec

from lab.sampling import Sampling
from lab.wire import BadFrame, Frame, FrameConnection, Peer, WireError, pack_tokens, unpack_tokens
from lab.wire.frames import Error, WireType
from speculative.forward_thread import ForwardThread
from speculative.messages import (
    AskVocabulary,
    Close,
    Draft,
    MessageType,
    Open,
    Reason,
    Scores,
    Vocabulary,
    Welcome,
)
from speculative.messages import Verdict as VerdictHead
from speculative.protocol import LeftBetweenMessages, read_msg, write_tokens
from speculative.verifying import Ended, Outcome, TextRequest, Verdict, Verifier

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer"
"""Name of the fingerprint that both roles show in the handshake."""
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
        verifier: Verifier,
        welcome: Welcome,
        token_texts: Sequence[str],
        tokenizer_fingerprint: str,
        answers: FirstProtocolAnswers,
    ) -> None:
        self._welcome = welcome
        self._token_texts = token_texts
        self._fingerprint = tokenizer_fingerprint
        self._answers = answers
        self._loop = asyncio.get_running_loop()
        self._receivers: dict[Hashable, Callable[[Outcome], None]] = {}
        """Who is told of a text's outcomes, by its key."""
        self.thread = ForwardThread(verifier, self._deliver)

    async def serve_frames(self, connection: FrameConnection) -> None:
        """Everything a connection asks for, until it ends."""
        texts = _Texts(self, connection)
        try:
            connection.send(MessageType.welcome, 0, self._welcome)
            while True:
                texts.take(await connection.recv())
        except BadFrame as bad:
            texts.refuse(bad)
            raise
        finally:
            texts.close()

    async def serve_first_protocol(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Requests of the first protocol, one after the other."""
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
            ids = await self._continuation(text, peer)
            await write_tokens(writer, ids, peer=peer, timeout_seconds=self._answers.timeout_seconds)

    def open(self, key: Hashable, request: TextRequest, receiver: Callable[[Outcome], None]) -> None:
        """Begin a text; `receiver` is told of its outcomes, in the event loop."""
        self._receivers[key] = receiver
        self.thread.submit(lambda verifier: verifier.open(key, request))

    def offer(self, key: Hashable, draft: Draft, guesses: Sequence[int]) -> None:
        """Hand in guesses."""
        self.thread.submit(lambda verifier: verifier.offer(key, draft.epoch, draft.position, guesses))

    def close(self, key: Hashable) -> None:
        """Forget a text; its receiver is told nothing more."""
        if self._receivers.pop(key, None) is not None:
            self.thread.submit(lambda verifier: verifier.close(key))

    def _deliver(self, outcomes: list[Outcome]) -> None:
        """Called in the forward thread."""
        try:
            self._loop.call_soon_threadsafe(self._hand_out, outcomes)
        except RuntimeError:  # the loop has ended, and with it every connection
            log.debug("%d outcomes came after the end", len(outcomes))

    def _hand_out(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            receiver = self._receivers.get(outcome.key)
            if receiver is not None:
                receiver(outcome)
            if isinstance(outcome, Ended):
                self._receivers.pop(outcome.key, None)

    async def _continuation(self, text: str, peer: Peer) -> list[int]:
        """The target's own greedy text. Raises `BadFrame` for a prompt that is refused."""
        done: asyncio.Future[Ended] = self._loop.create_future()
        accepted: list[int] = []

        def receive(outcome: Outcome) -> None:
            if isinstance(outcome, Verdict):
                accepted.extend(outcome.ids)
            elif not done.done():
                done.set_result(outcome)

        prompt_ids = self._answers.to_ids(text)
        request = TextRequest(
            prompt_ids=prompt_ids,
            sampling=Sampling.greedy(),
            max_new_tokens=self._answers.max_new_tokens,
            waits=False,
            threshold=None,
        )
        key = object()
        self.open(key, request, receive)
        try:
            ended = await done
        finally:
            self.close(key)
        if ended.reason in (Reason.refused, Reason.failed):
            raise BadFrame(peer, f"sent a prompt that cannot be continued: {ended.text}")
        return accepted

    def vocabulary(self) -> bytes:
        """The text of every id, as VOCABULARY's body."""
        return msgspec.msgpack.encode([text.encode(errors="surrogatepass") for text in self._token_texts])

    def knows(self, connection: FrameConnection) -> bool:
        """Whether the peer's tokenizer is ours."""
        return connection.agreed.fingerprints.get(TOKENIZER) == self._fingerprint

    @property
    def limits(self) -> Welcome:
        """What the target takes."""
        return self._welcome


class _Texts:
    """The texts of one connection."""

    def __init__(self, front: Front, connection: FrameConnection) -> None:
        self._front = front
        self._connection = connection
        self._open: dict[int, Open] = {}
        self._asked = False

    def take(self, frame: Frame) -> None:
        """Do what a frame asks for. Raises `BadFrame` for what no drafter of ours would send."""
        head = frame.head
        if isinstance(head, Open):
            self._begin(frame, head)
        elif isinstance(head, Draft):
            self._offer(frame, head)
        elif isinstance(head, Close):
            self._open.pop(frame.session, None)
            self._front.close(self._key(frame.session))
        elif isinstance(head, AskVocabulary) and not self._asked:
            self._asked = True
            self._connection.send(MessageType.vocabulary, 0, Vocabulary(), self._front.vocabulary())
        else:
            raise BadFrame(self._connection.peer, f"sent {type(head).__name__.upper()}, which a verifier does not take")

    def refuse(self, bad: BadFrame) -> None:
        """Tell the peer why the connection ends, if it still listens."""
        if self._connection.fault is None:
            self._connection.send(WireType.error, 0, Error(code=type(bad).__name__, text=bad.what[:1024]))

    def close(self) -> None:
        """Forget all texts."""
        for number in self._open:
            self._front.close(self._key(number))

    def _key(self, number: int) -> Hashable:
        return id(self._connection), number

    def _begin(self, frame: Frame, head: Open) -> None:
        peer = self._connection.peer
        peer.phase = "OPEN"
        if frame.session in self._open:
            raise BadFrame(peer, f"opened text {frame.session} twice")
        if not self._front.knows(self._connection):
            raise BadFrame(peer, "opened a text with another tokenizer than the target's")
        limits = self._front.limits
        ids = unpack_tokens(frame.body, vocabulary_size=limits.vocabulary_size, peer=peer)
        try:
            sampling = Sampling(seed=head.seed, temperature=head.temperature, top_k=head.top_k, top_p=head.top_p)
        except ValueError as error:
            raise BadFrame(peer, f"asked for sampling that makes no sense: {error}") from None
        if head.threshold is not None:
            log.warning("%s asked for rule cross_entropy: its text will not be the target's own (lossy)", peer)
        request = TextRequest(
            prompt_ids=ids,
            sampling=sampling,
            max_new_tokens=head.max_new_tokens,
            waits=head.waits,
            threshold=head.threshold,
        )
        self._open[frame.session] = head
        self._front.open(self._key(frame.session), request, lambda outcome: self._tell(frame.session, outcome))

    def _offer(self, frame: Frame, head: Draft) -> None:
        peer = self._connection.peer
        peer.phase, peer.state = "DRAFT", f"epoch {head.epoch}, position {head.position}"
        if frame.session not in self._open:  # it has ended while these were under way
            return
        limits = self._front.limits
        guesses = unpack_tokens(frame.body, vocabulary_size=limits.vocabulary_size, peer=peer)
        if len(guesses) > limits.max_draft_length:
            raise BadFrame(peer, f"sent {len(guesses)} guesses, at most {limits.max_draft_length} are checked at once")
        self._front.offer(self._key(frame.session), head, guesses)

    def _tell(self, number: int, outcome: Outcome) -> None:
        try:
            if isinstance(outcome, Verdict):
                self._send_verdict(number, outcome)
            else:
                self._open.pop(number, None)
                self._connection.send(MessageType.close, number, Close(reason=outcome.reason, text=outcome.text[:1024]))
        except WireError as error:  # `serve_frames` sees it, too, and ends
            log.debug("%s", error)

    def _send_verdict(self, number: int, verdict: Verdict) -> None:
        head = VerdictHead(epoch=verdict.epoch, position=verdict.position, accepted=verdict.accepted)
        self._connection.send(MessageType.verdict, number, head, pack_tokens(verdict.ids))
        if self._open[number].report:
            numbers = [*verdict.guess_nll, *verdict.margins]
            scores = Scores(position=verdict.position, guesses=len(verdict.guess_nll))
            self._connection.send(MessageType.scores, number, scores, struct.pack(f"<{len(numbers)}f", *numbers))
