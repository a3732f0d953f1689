"""Messages over TCP, on the client's side: a connection to every shard, which form a chain among themselves.

Each shard's process is a `split.chain.server.ChainServer`. The client is attached to every shard, which answers it
directly, and the death of any shard is noticed at once on its own connection.
"""

from __future__ import annotations

import logging
import queue
import secrets
import ssl
import threading
import time
from collections.abc import Sequence
from functools import partial

from typing_extensions import override

from lab.wire.endpoint import Endpoint
from lab.wire.faults import BadFrame, PeerFull, PeerMismatch, PeerRefused, Unreachable, WireError, WrongKey
from lab.wire.frame_socket import FrameSocket
from lab.wire.frames import Frame
from split.chain.address import Address
from split.chain.messages import Answer, Ask, Attach, Fault, ShardFigures, Welcome, send
from split.transport.base import Message, ShardLost, ShardReport, Transport, ask_figures, check_layers, check_link

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.1
_HOPELESS = (WrongKey, PeerMismatch, PeerRefused, BadFrame)


class TcpChain(Transport):
    """The client's end of a chain of shard processes.

    Args:
        addresses: Of the shards, first to last.
        spares: Shards that may take the place of one that is lost, where their layers are the same.
        endpoint: Our side of the wire, talking to shards; its fingerprints name the model.
        tls: For every connection; None without.
        answer_seconds: Longest wait for one answer.
        start_seconds: How long to try to reach all shards at first.

    Raises:
        ShardLost: not all of them could be reached.
        ChainMismatch: their layers overlap or leave a gap.
        WrongKey, PeerMismatch, PeerRefused: another key, model or revision.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        spares: Sequence[Address],
        endpoint: Endpoint,
        *,
        tls: ssl.SSLContext | None,
        answer_seconds: float,
        start_seconds: float,
    ) -> None:
        self._addresses, self._spares = list(addresses), list(spares)
        self._endpoint, self._tls = endpoint, tls
        self._answer_seconds = answer_seconds
        self._lines: list[_ShardConnection] = []
        self.client = 0
        """Our number in ATTACH."""
        self._known_layers: dict[int, range] = {}
        """Layers of each place when the chain was whole."""
        self.restore(time.monotonic() + start_seconds)

    @override
    def send(self, shard: int, message: Message) -> None:
        if not self._lines:
            raise ShardLost("the shards are not connected")
        try:
            send(self._lines[shard].socket, *message)
        except WireError as error:  # all connections of a chain end together: the first one has the reason
            raise self._reason() or ShardLost(str(error)) from None

    def _reason(self) -> ShardLost | None:
        try:
            while True:
                _sound(self._answers.get_nowait())
        except queue.Empty:
            return None
        except ShardLost as lost:
            return lost

    @override
    def collect(self, wait_seconds: float | None = None) -> Message:
        try:
            return _sound(self._answers.get(timeout=self._answer_seconds if wait_seconds is None else wait_seconds))
        except queue.Empty:
            if wait_seconds is not None:
                raise TimeoutError from None
            raise ShardLost(f"no answer came within {self._answer_seconds:g} s") from None

    @override
    def restore(self, deadline: float) -> None:
        self._leave()  # new connections, so that nothing of the lost ones is in transit
        self._answers: queue.SimpleQueue[Message | WireError] = queue.SimpleQueue()
        is_told = False
        while True:
            try:
                self._lines = self._join()
                self.layers = [line.layers for line in self._lines]
                self.context = min(line.welcome.context for line in self._lines)
                return
            except _HOPELESS:
                raise
            except WireError as error:
                if isinstance(error, PeerFull) and not is_told:
                    is_told = True
                    log.warning("%s; waiting for one to end, %.3g s at most", error, deadline - time.monotonic())
                left = deadline - time.monotonic()
                if left <= 0:
                    raise ShardLost(str(error)) from None
                time.sleep(min(RETRY_SECONDS, left))

    @override
    def reports(self) -> list[ShardReport[ShardFigures]]:
        try:
            return [ask_figures(line.layers, partial(line.ask, self._answer_seconds)) for line in self._lines]
        except WireError as error:
            raise ShardLost(str(error)) from None

    @override
    def shutdown(self) -> None:
        self._leave()

    def _leave(self) -> None:
        for line in self._lines:
            line.close()
        self._lines = []

    def _join(self) -> list[_ShardConnection]:
        """Attach to all shards, last to first, each with the address of the next. Raises a `WireError`."""
        self.client = client = secrets.randbits(63)
        lines: list[_ShardConnection] = []
        behind: list[Address] = []
        instance = 0
        try:
            for place in reversed(range(len(self._addresses))):
                line = self._attach(place, Attach(client=client, next=[str(a) for a in behind], next_instance=instance))
                lines.insert(0, line)
                behind, instance = [line.address], line.welcome.instance
            check_layers([line.welcome for line in lines], [line.address for line in lines])
        except BaseException:
            for line in lines:
                line.close()
            raise
        for line in lines:
            line.listen(self._answers)
        return lines

    def _attach(self, place: int, attach: Attach) -> _ShardConnection:
        """A line to the shard at a place, or to a spare with the same layers."""
        fault: WireError | None = None
        wanted = self._known_layers.get(place)
        for address in [self._addresses[place], *self._spares]:
            try:
                line = _ShardConnection(address, self._endpoint, self._tls, attach, self._answer_seconds)
            except _HOPELESS:
                raise
            except WireError as error:
                fault = fault or error
                continue
            if wanted in (None, line.layers):
                self._remember(place, line)
                return line
            fault = fault or Unreachable(line.socket.peer, "is there again, with other layers")
            line.close()
        assert fault is not None
        raise fault

    def _remember(self, place: int, line: _ShardConnection) -> None:
        self._known_layers.setdefault(place, line.layers)
        if line.address in self._spares:
            log.warning("spare %s takes the place of %s", line.address, self._addresses[place])
            self._spares[self._spares.index(line.address)] = self._addresses[place]
            self._addresses[place] = line.address


class _ShardConnection:
    """A connection to one shard, with a thread that reads from it."""

    def __init__(
        self, address: Address, endpoint: Endpoint, tls: ssl.SSLContext | None, attach: Attach, seconds: float
    ) -> None:
        self.address = address
        self.socket = FrameSocket.connect(address.host, address.port, endpoint, tls=tls)
        try:
            self.welcome = self._attach(attach, seconds)
        except BaseException:
            self.close()
            raise
        self.layers = range(self.welcome.first, self.welcome.last)
        self.socket.peer.phase = f"layers {self.welcome.first}:{self.welcome.last}"
        self._reports: queue.SimpleQueue[tuple[ShardFigures, memoryview, float] | WireError] = queue.SimpleQueue()

    def _attach(self, attach: Attach, seconds: float) -> Welcome:
        self.socket.peer.phase = "ATTACH"
        send(self.socket, 0, attach)
        frame = self.socket.poll(seconds)
        if frame is not None and isinstance(frame.head, Fault):  # it could not reach the next shard
            raise Unreachable(self.socket.peer, f"says: {frame.head.text}")
        if frame is None or not isinstance(frame.head, Welcome):
            raise Unreachable(self.socket.peer, f"did not answer ATTACH within {seconds:g} s")
        return frame.head

    def listen(self, answers: queue.SimpleQueue[Message | WireError]) -> None:
        threading.Thread(target=self._listen, args=(answers,), name=f"shard {self.address}", daemon=True).start()

    def ask(self, seconds: float) -> tuple[ShardFigures, memoryview, float]:
        send(self.socket, 0, Ask())
        try:
            found = self._reports.get(timeout=seconds)
        except queue.Empty:
            raise Unreachable(self.socket.peer, f"did not report within {seconds:g} s") from None
        if isinstance(found, WireError):
            raise found
        return found

    def close(self) -> None:
        self.socket.close()

    def _listen(self, answers: queue.SimpleQueue[Message | WireError]) -> None:
        try:
            while True:
                self._take(self.socket.recv(), answers)
        except WireError as error:
            answers.put(error)
            self._reports.put(error)

    def _take(self, frame: Frame, answers: queue.SimpleQueue[Message | WireError]) -> None:
        if isinstance(frame.head, ShardFigures):
            self._reports.put((frame.head, frame.body, time.monotonic()))
        elif isinstance(frame.head, Answer):
            answers.put(Message(frame.session, frame.head, frame.body))
        else:
            raise BadFrame(self.socket.peer, f"sent {type(frame.head).__name__.upper()}, unknown to a client")


def _sound(answer: Message | WireError) -> Message:
    """Raises `ShardLost` for an answer that says that the chain is broken."""
    if isinstance(answer, WireError):
        raise ShardLost(str(answer)) from None
    return check_link(answer)
