"""A verifier over the wire, as a drafter's `Target`.

One thread stays in `recv`, where heartbeats live: so a drafter that computes for long neither looks dead nor misses
that its verifier is.
"""

from __future__ import annotations

import queue
import ssl
import struct
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import msgspec
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

from lab.wire import (
    BadFrame,
    Endpoint,
    Frame,
    FrameSocket,
    PeerSilent,
    Unreachable,
    WireError,
    pack_tokens,
    unpack_tokens,
)
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
from speculative.verifying import Ended, Outcome, TextRequest, Verdict

LOOK_SECONDS = 0.5
"""A wait is cut into pieces of this length, so that Ctrl+C comes through on every system."""


class RemoteTarget:
    """A connection to a verifier, with one text at a time. A context manager: leaving it closes the connection.

    Args:
        frames: A connection that has agreed.
        report: Whether to ask for cross-entropies and margins.
        request_seconds: Longest wait for one answer.
    """

    def __init__(self, frames: FrameSocket, *, report: bool, request_seconds: float) -> None:
        self._frames = frames
        self._report = report
        self._request_seconds = request_seconds
        self._arrived: queue.SimpleQueue[Frame | WireError] = queue.SimpleQueue()
        self._number = 0
        self._is_open = False
        self._reader = threading.Thread(target=self._read, name="drafter-reader", daemon=True)
        self._reader.start()
        try:
            self.welcome: Welcome = self._expect(MessageType.welcome, "WELCOME").head
        except BaseException:
            self.close()
            raise

    @property
    def fingerprints(self) -> dict[str, str]:
        """What the verifier showed in the handshake."""
        return self._frames.agreed.fingerprints

    @property
    def rtt_seconds(self) -> float | None:
        """Smoothed round-trip time of heartbeats; None before the first."""
        return self._frames.rtt_seconds

    @property
    def bytes_sent(self) -> int:
        """All bytes so far, headers, handshake and heartbeats included."""
        return self._frames.bytes_sent

    @property
    def bytes_received(self) -> int:
        """All bytes so far, headers, handshake and heartbeats included."""
        return self._frames.bytes_received

    def vocabulary(self) -> list[str]:
        """The text of every id of the verifier's tokenizer."""
        self._frames.send(MessageType.ask_vocabulary, 0, AskVocabulary())
        frame = self._expect(MessageType.vocabulary, "VOCABULARY")
        assert isinstance(frame.head, Vocabulary)
        try:
            texts = msgspec.msgpack.decode(frame.body, type=list[bytes])
            return [text.decode(errors="surrogatepass") for text in texts]
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadFrame(self._frames.peer, f"sent a bad vocabulary: {error}") from None

    def open(self, request: TextRequest) -> None:
        """See `Target.open`."""
        assert not self._is_open, "one text at a time"
        self._number += 1
        self._is_open = True
        sampling = request.sampling
        head = Open(
            seed=sampling.seed,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            max_new_tokens=request.max_new_tokens,
            waits=request.waits,
            threshold=request.threshold,
            report=self._report,
        )
        self._frames.peer.phase = "OPEN"
        self._frames.send(MessageType.open, self._number, head, pack_tokens(request.prompt_ids))

    def draft(self, epoch: int, position: int, guesses: Sequence[int]) -> None:
        """See `Target.draft`."""
        self._frames.peer.phase, self._frames.peer.state = "DRAFT", f"epoch {epoch}, position {position}"
        self._frames.send(MessageType.draft, self._number, Draft(epoch=epoch, position=position), pack_tokens(guesses))

    def next(self) -> Outcome:
        """See `Target.next`. Raises a `WireError`."""
        frame = self._next_frame()
        if isinstance(frame.head, Close):
            self._is_open = False
            return Ended(self._number, frame.head.reason, frame.head.text)
        if not isinstance(frame.head, VerdictHead):
            raise BadFrame(self._frames.peer, f"sent {type(frame.head).__name__.upper()} where VERDICT was due")
        head = frame.head
        nll, margins = self._scores() if self._report else ([], [])
        ids = self._ids(frame)
        return Verdict(self._number, head.epoch, head.position, head.accepted, ids, nll, margins)

    def leave(self) -> None:
        """See `Target.leave`. The CLOSE of a text that has just ended is still under way: the verifier ignores ours."""
        if self._is_open:
            self._is_open = False
            try:
                self._frames.send(MessageType.close, self._number, Close(reason=Reason.left, text=""))
            except WireError:  # there is nobody to tell; whoever waits for an answer hears of it
                return

    def close(self) -> None:
        """End the connection."""
        self._frames.close()
        self._reader.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> None:
        try:
            while True:
                self._arrived.put(self._frames.recv())
        except WireError as error:
            self._arrived.put(error)

    def _next_frame(self) -> Frame:
        """The next frame of this text; those of texts that were left are dropped."""
        while True:
            frame = self._wait()
            if frame.session == self._number:
                return frame

    def _wait(self) -> Frame:
        deadline = time.monotonic() + self._request_seconds
        while True:
            try:
                arrived = self._arrived.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                if time.monotonic() > deadline:
                    peer = self._frames.peer
                    raise PeerSilent(peer, f"has not answered for {self._request_seconds:g} s") from None
                continue
            if isinstance(arrived, WireError):
                self._arrived.put(arrived)  # whoever asks again hears it again
                raise arrived
            return arrived

    def _expect(self, number: MessageType, name: str) -> Frame:
        self._frames.peer.phase = name
        frame = self._wait()
        if frame.type != number:
            raise BadFrame(self._frames.peer, f"sent a frame of type {frame.type} where {name} was due")
        return frame

    def _scores(self) -> tuple[list[float], list[float]]:
        frame = self._next_frame()
        if not isinstance(frame.head, Scores) or len(frame.body) % 4 or frame.head.guesses > len(frame.body) // 4:
            raise BadFrame(self._frames.peer, "sent no SCORES where they were due")
        numbers = list(struct.unpack(f"<{len(frame.body) // 4}f", frame.body))
        return numbers[: frame.head.guesses], numbers[frame.head.guesses :]

    def _ids(self, frame: Frame) -> list[int]:
        return unpack_tokens(frame.body, vocabulary_size=self.welcome.vocabulary_size, peer=self._frames.peer)


def connect(host: str, port: int, endpoint: Endpoint, tls: ssl.SSLContext | None) -> FrameSocket:
    """Connect, trying again while nobody listens, for at most `connect_seconds` in all.

    Raises:
        Unreachable: with who, for how long, and how often it was tried.
        WireError: what the handshake found; that is not tried again.
    """
    seconds = endpoint.deadlines.connect_seconds
    began = time.monotonic()

    def give_up(state: RetryCallState) -> None:
        assert state.outcome is not None
        error = state.outcome.exception()
        assert isinstance(error, Unreachable)
        waited = time.monotonic() - began
        error.what += f"; gave up after {waited:.1f} s, attempt {state.attempt_number}"
        error.args = (f"{error.role} {error.address} {error.what}",)
        raise error

    retrying = Retrying(
        retry=retry_if_exception_type(Unreachable),
        stop=stop_after_delay(seconds),
        wait=wait_exponential(multiplier=0.1, max=2.0),
        retry_error_callback=give_up,
    )
    return retrying(FrameSocket.connect, host, port, endpoint, tls=tls)
