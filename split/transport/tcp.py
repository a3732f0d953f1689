"""Messages over TCP, as seen by the client: a connection to every shard, the chain between them, answers from its end.

Each shard's process is `split.inference.server`; what both say is in `split.inference.messages`. The client is
attached to every shard: it sends to the first, the last one answers it directly, and a shard that dies is noticed at
once on its own connection, whichever it is.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import secrets
import ssl
import threading
import time
from collections.abc import Sequence

from lab.wire import (
    BadFrame,
    Endpoint,
    Frame,
    FrameSocket,
    Head,
    PeerFull,
    PeerMismatch,
    PeerRefused,
    Unreachable,
    WireError,
    WrongKey,
)
from split.chain.address import Address
from split.chain.messages import Ask, Attach, Fault, FaultCode, Welcome, send
from split.inference.messages import HOP, Opened, Report, Steps
from split.transport.base import Hop, Message, ShardLost, ShardReport

log = logging.getLogger(__name__)

CLOCK_ROUNDS = 5
"""The shortest of so many round trips tells how far a shard's clock is from ours."""
RETRY_SECONDS = 0.1
_HOPELESS = (WrongKey, PeerMismatch, PeerRefused, BadFrame)


class ChainMismatch(ValueError):
    """The shards that answered are not the layers of one model, from first to last."""


class TcpChain:
    """The client's end of a chain of shard processes.

    Args:
        addresses: Of the shards, first to last.
        spares: Shards that may take the place of one that is lost, where their layers are the same.
        endpoint: Our side of the wire, role `client`; its fingerprints name the model.
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
        self._lines: list[_Line] = []
        self.client = 0
        """The number that we are attached with."""
        self._known_layers: dict[int, range] = {}
        """What stood at each place when the chain was whole."""
        self.restore(time.monotonic() + start_seconds)

    taken: tuple[type[Head], ...] = (Steps, Fault, Opened)
    """What a shard may answer."""

    @property
    def layers(self) -> list[range]:
        """Of each shard."""
        return [range(line.welcome.first, line.welcome.last) for line in self._lines]

    @property
    def context(self) -> int:
        """The most tokens of a text that every shard takes."""
        return min(line.welcome.context for line in self._lines)

    def submit(self, message: Message) -> None:
        """See `Transport.submit`."""
        self.send(0, message)

    def send(self, shard: int, message: Message) -> None:
        """Send a message to one of the shards. Raises `ShardLost`."""
        if not self._lines:
            raise ShardLost("the shards are not connected")
        try:
            self._lines[shard].send(message)
        except ShardLost as lost:  # all connections of a chain end together: the reason is what came first
            raise self._reason() or lost from None

    def _reason(self) -> ShardLost | None:
        with contextlib.suppress(queue.Empty):
            while True:
                answer = self._answers.get_nowait()
                if isinstance(answer, WireError):
                    return ShardLost(str(answer))
                if isinstance(answer.head, Fault) and answer.head.code is FaultCode.link:
                    return ShardLost(answer.head.text)
        return None

    def collect(self, wait_seconds: float | None = None) -> Message:
        """See `Transport.collect`."""
        try:
            answer = self._answers.get(timeout=self._answer_seconds if wait_seconds is None else wait_seconds)
        except queue.Empty:
            if wait_seconds is not None:
                raise TimeoutError from None
            raise ShardLost(f"no answer came within {self._answer_seconds:g} s") from None
        if isinstance(answer, WireError):
            raise ShardLost(str(answer)) from None
        if isinstance(answer.head, Fault) and answer.head.code is FaultCode.link:
            raise ShardLost(answer.head.text)
        return answer

    def restore(self, deadline: float) -> None:
        """See `Transport.restore`: every connection anew, so that nothing of what was lost is under way."""
        self._leave()
        self._answers: queue.SimpleQueue[Message | WireError] = queue.SimpleQueue()
        is_told = False
        while True:
            try:
                self._lines = self._join()
                return
            except _HOPELESS:
                raise
            except WireError as error:
                if isinstance(error, PeerFull) and not is_told:
                    is_told = True
                    log.warning("%s; waiting for one to end, %.3g s at most", error, deadline - time.monotonic())
                if time.monotonic() + RETRY_SECONDS >= deadline:
                    raise ShardLost(str(error)) from None
                time.sleep(RETRY_SECONDS)

    def reports(self) -> list[ShardReport]:
        """See `Transport.reports`."""
        try:
            return [line.report(self._answer_seconds) for line in self._lines]
        except WireError as error:
            raise ShardLost(str(error)) from None

    def shutdown(self) -> None:
        """See `Transport.shutdown`."""
        self._leave()

    def _leave(self) -> None:
        for line in self._lines:
            line.close()
        self._lines = []

    def _join(self) -> list[_Line]:
        """Attach to all shards, last to first: each is told who comes behind it. Raises a `WireError`."""
        self.client = client = secrets.randbits(63)
        lines: list[_Line] = []
        behind: list[Address] = []
        instance = 0
        try:
            for place in reversed(range(len(self._addresses))):
                line = self._attach(place, Attach(client=client, next=[str(a) for a in behind], next_instance=instance))
                lines.insert(0, line)
                behind, instance = [line.address], line.welcome.instance
            _check_layers(lines)
        except BaseException:
            for line in lines:
                line.close()
            raise
        for line in lines:
            line.listen(self._answers)
        return lines

    def _attach(self, place: int, attach: Attach) -> _Line:
        """A line to the shard at a place, or to a spare that holds the same layers."""
        fault: WireError | None = None
        wanted = self._known_layers.get(place)
        for address in [self._addresses[place], *self._spares]:
            try:
                line = _Line(address, self._endpoint, self._tls, self.taken)
            except _HOPELESS:
                raise
            except WireError as error:
                fault = fault or error
                continue
            try:
                line.attach(attach, self._answer_seconds)
            except WireError as error:
                line.close()
                if isinstance(error, _HOPELESS):
                    raise
                fault = fault or error
                continue
            if wanted is not None and range(line.welcome.first, line.welcome.last) != wanted:
                line.close()
                continue
            self._remember(place, line)
            return line
        assert fault is not None
        raise fault

    def _remember(self, place: int, line: _Line) -> None:
        self._known_layers.setdefault(place, range(line.welcome.first, line.welcome.last))
        if line.address in self._spares:
            log.warning("spare %s takes the place of %s", line.address, self._addresses[place])
            self._spares[self._spares.index(line.address)] = self._addresses[place]
            self._addresses[place] = line.address


class _Line:
    """A connection to one shard, with a thread that listens to it."""

    def __init__(
        self, address: Address, endpoint: Endpoint, tls: ssl.SSLContext | None, taken: tuple[type[Head], ...]
    ) -> None:
        self.address = address
        self._taken = taken
        self.welcome: Welcome
        self._socket = FrameSocket.connect(address.host, address.port, endpoint, tls=tls)
        self._reports: queue.SimpleQueue[tuple[Report, memoryview, float] | WireError] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Message | WireError] | None = None

    def attach(self, attach: Attach, seconds: float) -> None:
        self._socket.peer.phase = "ATTACH"
        send(self._socket, 0, attach)
        frame = self._socket.poll(seconds)
        if frame is not None and isinstance(frame.head, Fault):  # it could not reach the next one
            raise Unreachable(self._socket.peer, f"says: {frame.head.text}")
        if frame is None or not isinstance(frame.head, Welcome):
            raise Unreachable(self._socket.peer, f"did not answer ATTACH within {seconds:g} s")
        self.welcome = frame.head
        self._socket.peer.phase = f"layers {frame.head.first}:{frame.head.last}"

    def listen(self, answers: queue.SimpleQueue[Message | WireError]) -> None:
        self._answers = answers
        threading.Thread(target=self._listen, args=(answers,), name=f"shard {self.address}", daemon=True).start()

    def send(self, message: Message) -> None:
        try:
            send(self._socket, message.number, message.head, message.body)
        except WireError as error:
            raise ShardLost(str(error)) from None

    def report(self, seconds: float) -> ShardReport:
        """Ask for figures; the clocks are compared by the shortest of some round trips (as NTP does, RFC 5905)."""
        best = None
        for _ in range(CLOCK_ROUNDS):
            asked = time.monotonic()
            send(self._socket, 0, Ask())
            try:
                found = self._reports.get(timeout=seconds)
            except queue.Empty:
                raise Unreachable(self._socket.peer, f"did not report within {seconds:g} s") from None
            if isinstance(found, WireError):
                raise found
            report, body, answered = found
            if best is None or answered - asked < best[0]:
                best = answered - asked, (asked + answered) / 2 - report.clock_seconds
        assert best is not None
        return _report(report, body, best[1], self.welcome)

    def close(self) -> None:
        self._socket.close()

    def _listen(self, answers: queue.SimpleQueue[Message | WireError]) -> None:
        try:
            while True:
                self._take(self._socket.recv(), answers)
        except WireError as error:
            answers.put(error)
            self._reports.put(error)

    def _take(self, frame: Frame, answers: queue.SimpleQueue[Message | WireError]) -> None:
        if isinstance(frame.head, Report):
            self._reports.put((frame.head, frame.body, time.monotonic()))
        elif isinstance(frame.head, self._taken):
            answers.put(Message(frame.session, frame.head, frame.body))
        else:
            raise BadFrame(self._socket.peer, f"sent {type(frame.head).__name__.upper()}, which a client does not take")


def _report(report: Report, body: memoryview, offset: float, welcome: Welcome) -> ShardReport:
    hops = {
        number: Hop(arrived + offset, began + offset, computed + offset, sent + offset, coding, sent_bytes)
        for number, arrived, began, computed, sent, coding, sent_bytes in HOP.iter_unpack(body)
    }
    return ShardReport(
        name=report.name,
        layers=range(welcome.first, welcome.last),
        device=report.device,
        weights_bytes=report.weights_bytes,
        kv_bytes=report.kv_bytes,
        rss_bytes=report.rss_bytes,
        peak_rss_bytes=report.peak_rss_bytes,
        device_memory_used_bytes=report.device_memory_used_bytes,
        device_memory_total_bytes=report.device_memory_total_bytes,
        hops=hops,
    )


def _check_layers(lines: Sequence[_Line]) -> None:
    """Refuse shards that do not make up the model. Raises `ChainMismatch`."""
    expected = 0
    for line in lines:
        first, last = line.welcome.first, line.welcome.last
        if first != expected:
            fault = "overlap" if first < expected else "leave a gap"
            raise ChainMismatch(f"layers must go on at {expected}, got {first}:{last} at {line.address}: they {fault}")
        expected = last
    if expected != lines[-1].welcome.model_layers:
        count = lines[-1].welcome.model_layers
        raise ChainMismatch(f"layers must end at the model's {count}, got {expected} at {lines[-1].address}")
