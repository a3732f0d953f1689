"""One connection to a verifier, from the drafter's side.

One thread stays in `recv`, where heartbeats are handled: so a drafter that computes for long neither looks dead nor
fails to notice a dead verifier.
"""

import queue
import ssl
import threading
import time

import msgspec

from lab.wire.endpoint import Endpoint
from lab.wire.faults import BadFrame, PeerSilent, WireError
from lab.wire.frame_socket import FrameSocket
from lab.wire.frames import Buffer, Frame, Head
from lab.wire.tokens import unpack_tokens
from speculative.messages import AskVocabularyFrame, MessageType, VocabularyFrame, WelcomeFrame

LOOK_SECONDS = 0.5
"""Longest uninterrupted wait, so that Ctrl+C works on every system."""


class VerifierConnection:
    """Frames in both directions, and the verifier's WELCOME. The caller closes it.

    Args:
        host: Address of the verifier.
        port: Its port.
        endpoint: This side of the wire.
        tls: None: no TLS.
        request_seconds: Longest wait for one answer.

    Raises:
        WireError: nothing listens there, another key, no WELCOME.
    """

    def __init__(
        self, host: str, port: int, endpoint: Endpoint, tls: ssl.SSLContext | None, *, request_seconds: float
    ) -> None:
        self.frames = FrameSocket.connect(host, port, endpoint, tls=tls)
        self._request_seconds = request_seconds
        self._arrived: queue.SimpleQueue[Frame | WireError] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="drafter-reader", daemon=True)
        self._reader.start()
        try:
            self.welcome: WelcomeFrame = self.expect(MessageType.welcome).head
        except BaseException:
            self.close()
            raise

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprints that the verifier sent in the handshake."""
        return self.frames.agreed.fingerprints

    def vocabulary(self) -> list[str]:
        """Ask for the text of every id of the verifier's tokenizer."""
        self.frames.send(MessageType.ask_vocabulary, 0, AskVocabularyFrame())
        frame = self.expect(MessageType.vocabulary)
        assert isinstance(frame.head, VocabularyFrame)
        try:
            texts = msgspec.msgpack.decode(frame.body, type=list[bytes])
            return [text.decode(errors="surrogatepass") for text in texts]
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self.bad(f"sent a bad vocabulary: {error}") from None

    def send(self, number: MessageType, session: int, head: Head, *body: Buffer, state: str = "") -> None:
        """Send a frame. `state` is part of the message of later faults."""
        self.frames.peer.phase, self.frames.peer.state = number.name.upper(), state
        self.frames.send(number, session, head, *body)

    def has_news(self) -> bool:
        """Whether `wait` would return at once."""
        return not self._arrived.empty()

    def wait(self, *, patiently: bool = False) -> Frame:
        """Wait for the next frame; `patiently`: as long as the connection lives. Raises a `WireError`, and again at
        each call after the end of the connection."""
        deadline = time.monotonic() + self._request_seconds
        while True:
            try:
                arrived = self._arrived.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                if time.monotonic() > deadline and not patiently:
                    silent = f"has not answered for {self._request_seconds:g} s"
                    raise PeerSilent(self.frames.peer, silent) from None
                continue
            if isinstance(arrived, WireError):
                self._arrived.put(arrived)
                raise arrived
            return arrived

    def expect(self, number: MessageType) -> Frame:
        """Wait for the next frame, which must be of type `number`."""
        self.frames.peer.phase = name = number.name.upper()
        frame = self.wait()
        if frame.type != number:
            raise self.bad(f"sent a frame of type {frame.type} where {name} was expected")
        return frame

    def ids(self, frame: Frame) -> list[int]:
        """Read the token ids in the body of a frame."""
        return unpack_tokens(frame.body, vocabulary_size=self.welcome.vocabulary_size, peer=self.frames.peer)

    def bad(self, what: str) -> BadFrame:
        """A fault of the verifier: it sent something wrong."""
        return BadFrame(self.frames.peer, what)

    def close(self) -> None:
        """End the connection."""
        self.frames.close()
        self._reader.join()

    def _read(self) -> None:
        try:
            while True:
                self._arrived.put(self.frames.recv())
        except WireError as error:
            self._arrived.put(error)
