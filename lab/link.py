"""A slow, narrow, unreliable link between two real sockets: a TCP proxy with delay, jitter, bandwidth and cuts.

One thread moves the bytes of every connection; it waits in `select` (microseconds; `epoll` counts in milliseconds), so
a delay is met to a fraction of a millisecond as long as the machine has a core for it. Bytes are never lost, altered or
reordered, as over TCP; only their time changes. The connection itself is made at once: the delay is that of the bytes.

In a process whose other threads compute in Python, the interpreter lock adds up to its switch interval: measure with
the link in a separate process (`simulations.link`).
"""

import contextlib
import logging
import math
import random
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Self

logger = logging.getLogger(__name__)

PACKET_BYTES = 1460  # a narrow link sends in pieces of about this size
READ_BYTES = 64 * 1024
COMMAND_SECONDS = 5.0  # time limit for a command to the link's thread, which is never busy for so long


@dataclass(kw_only=True)
class OneWay:
    """Properties of one direction of a link. Zeros change nothing."""

    delay_seconds: float
    """Delay from the arrival of the last byte of a piece to its departure."""
    jitter_seconds: float
    """Added to the delay, uniform in [0, this]; order is kept, so a late piece holds up those behind it."""
    bytes_per_second: float
    """Shared by all connections; 0: no limit."""

    def __post_init__(self) -> None:
        for name in ("delay_seconds", "jitter_seconds", "bytes_per_second"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {getattr(self, name)}")


class CutKind(Enum):
    """Kinds of failures of a link; names are values of the setting."""

    reset = "reset"
    """Every connection is reset at both ends; so are new ones while it lasts."""
    blackhole = "blackhole"
    """Nothing arrives, and neither end is notified: half-open. Bytes in transit wait, as TCP would resend them."""


@dataclass(kw_only=True)
class Cut:
    """A failure at a given time."""

    at_seconds: float
    """After the start of the link."""
    kind: CutKind
    duration_seconds: float
    """Until the link is whole again; infinite is never. A reset of 0 hits the connections of that moment only."""

    def __post_init__(self) -> None:
        if not 0 <= self.at_seconds < math.inf:
            raise ValueError(f"at_seconds must be a finite number of at least 0, got {self.at_seconds}")
        if not self.duration_seconds >= 0:
            raise ValueError(f"duration_seconds must be at least 0, got {self.duration_seconds}")


@dataclass(frozen=True, kw_only=True)
class LinkSettings:
    """A link from a client to a target."""

    up: OneWay
    """From the client to the target."""
    down: OneWay
    """From the target to the client."""
    buffer_bytes: int
    """Bytes of one connection and direction that may be under way; beyond it the sender is not read (back-pressure).
    Throughput is at most this divided by the delay."""
    seed: int
    """Seed of the jitter."""
    cuts: tuple[Cut, ...] = ()
    """Failures to come."""

    def __post_init__(self) -> None:
        if self.buffer_bytes < PACKET_BYTES:
            raise ValueError(f"buffer_bytes must be at least {PACKET_BYTES}, got {self.buffer_bytes}")


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Payload of TCP that the two ends have sent into a link so far."""

    connections: int
    up_bytes: int
    down_bytes: int


class Link:
    """A running link: `with Link((host, port), settings, host="127.0.0.1", port=0) as link: connect to link.port`.

    Thread-safe; it has its own thread, which `with` starts and ends.
    """

    def __init__(self, target: tuple[str, int], settings: LinkSettings, *, host: str, port: int) -> None:
        """Listen on `host`, `port` (0: any free one). Raises `OSError` for an address that is taken or unknown."""
        found = socket.getaddrinfo(*target, type=socket.SOCK_STREAM)[0]
        self._target_family, self._target = found[0], found[4]
        self._listener = socket.create_server((host, port), backlog=128)
        self._listener.setblocking(False)
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        random_numbers = random.Random(settings.seed)
        self._buffer_bytes = settings.buffer_bytes
        self._up = _Direction(settings.up, random_numbers)
        self._down = _Direction(settings.down, random_numbers)
        self._pairs: list[_Pair] = []
        self._connections = 0
        self._cut: CutKind | None = None
        self._heal_at = math.inf
        self._cuts = sorted(settings.cuts, key=lambda cut: cut.at_seconds)
        self._commands: deque[tuple[Callable[[], None], threading.Event]] = deque()
        self._stopping, self._over = False, threading.Event()
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)

    @property
    def port(self) -> int:
        """The port to connect to instead of the target's."""
        return int(self._listener.getsockname()[1])

    @property
    def traffic(self) -> Traffic:
        """Payload that has entered the link so far."""
        return Traffic(connections=self._connections, up_bytes=self._up.carried, down_bytes=self._down.carried)

    def cut(self, kind: CutKind, *, duration_seconds: float) -> None:
        """Fail now, for `duration_seconds` (infinite: until `heal`); it has happened when this returns."""

        def begin() -> None:
            self._begin_cut(kind, time.monotonic() + duration_seconds)
            if duration_seconds == 0:  # a connection that comes at once must not meet a link that has yet to notice
                self._heal()

        self._command(begin)

    def heal(self) -> None:
        """Repair the link."""
        self._command(self._heal)

    def wait(self) -> None:
        """Wait until the link ends, which it does when another thread leaves its `with`; Ctrl+C interrupts."""
        self._over.wait()  # not `join`: one that a signal ends takes the thread for over (Python 3.11)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Reset what is open and end the thread."""
        self._stopping = True
        self._wake()
        self._thread.join()
        for owned in (self._wake_in, self._wake_out):  # not by the thread, which may stop before it is woken
            owned.close()

    def _command(self, do: Callable[[], None]) -> None:
        done = threading.Event()
        self._commands.append((do, done))
        self._wake()
        assert done.wait(COMMAND_SECONDS), "the link's thread is gone"

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full of wakes already
            self._wake_in.send(b"\0")

    # The link's own thread

    def _run(self) -> None:
        started = time.monotonic()
        try:
            while not self._stopping:
                now = time.monotonic()
                self._obey(now - started, now)
                if self._cut is not CutKind.blackhole:
                    self._deliver(now)
                self._wait_for_work(started)
        finally:
            self._reset_all()
            self._listener.close()
            self._over.set()

    def _obey(self, elapsed: float, now: float) -> None:
        """Run commands and planned cuts that are due."""
        while self._commands:
            do, done = self._commands.popleft()
            do()
            done.set()
        if now >= self._heal_at:
            self._heal()
        while self._cuts and self._cuts[0].at_seconds <= elapsed:
            cut = self._cuts.pop(0)
            self._begin_cut(cut.kind, now + cut.duration_seconds)

    def _begin_cut(self, kind: CutKind, heal_at: float) -> None:
        self._cut, self._heal_at = kind, heal_at
        if kind is CutKind.reset:
            self._reset_all()

    def _heal(self) -> None:
        self._cut, self._heal_at = None, math.inf

    def _reset_all(self) -> None:
        for pair in self._pairs:
            pair.reset()
        self._pairs.clear()

    def _deliver(self, now: float) -> None:
        for pair in self._pairs:
            pair.deliver(now)
        self._pairs = [pair for pair in self._pairs if not pair.is_over]

    def _wait_for_work(self, started: float) -> None:
        carrying = self._cut is not CutKind.blackhole
        pairs = self._pairs if carrying else []
        readers = [pipe for pair in pairs for pipe in pair.readers()]
        reading: list[socket.socket] = [pipe.source for pipe in readers]
        writing = [sink for pair in pairs for sink in pair.waiting_to_write()]
        reading += [self._wake_out, self._listener] if carrying else [self._wake_out]
        timeout = self._next_event(started, pairs) - time.monotonic()
        readable, _, _ = select.select(reading, writing, [], _short_of(timeout))
        ready = set(readable)
        for pipe in readers:
            if pipe.source in ready:
                pipe.read(time.monotonic())
        if self._wake_out in ready:
            self._wake_out.recv(READ_BYTES)
        if self._listener in ready:
            self._accept()

    def _next_event(self, started: float, pairs: "list[_Pair]") -> float:
        scheduled = started + self._cuts[0].at_seconds if self._cuts else math.inf
        return min([scheduled, self._heal_at, *(pair.next_due() for pair in pairs)])

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:  # it left again
            return
        if self._cut is CutKind.reset:
            _reset(client)
            return
        target = socket.socket(self._target_family, socket.SOCK_STREAM)
        if max(client.fileno(), target.fileno()) >= 1024:  # FD_SETSIZE
            logger.warning("link refused a connection: select takes no more than 1024 files in this process")
            _reset(client)
            target.close()
            return
        self._connections += 1
        self._pairs.append(_Pair(client, target, self._target, self._up, self._down, self._buffer_bytes))


class _Direction:
    """One way of the link: its clock is shared by all connections, as a wire is."""

    def __init__(self, settings: OneWay, random_numbers: random.Random) -> None:
        self._settings, self._random = settings, random_numbers
        self._bytes_per_second = settings.bytes_per_second or math.inf
        self._free_at = 0.0
        self.carried = 0
        limit = self._bytes_per_second / 1000
        self.piece_bytes = READ_BYTES if limit > READ_BYTES else max(PACKET_BYTES, int(limit))

    def enter(self, now: float, size_bytes: int) -> float:
        """Take a piece in; return when it comes out at the other end."""
        self.carried += size_bytes
        self._free_at = max(self._free_at, now) + size_bytes / self._bytes_per_second
        jitter = self._random.uniform(0.0, self._settings.jitter_seconds) if self._settings.jitter_seconds else 0.0
        return self._free_at + self._settings.delay_seconds + jitter


class _End(Enum):
    """The end of a connection after the last byte."""

    close = "close"
    reset = "reset"


class _Pipe:
    """One direction of one connection: what was read and is not yet due."""

    def __init__(self, source: socket.socket, sink: socket.socket, direction: _Direction, buffer_bytes: int) -> None:
        self.source = source
        self.sink = sink
        self._direction = direction
        self._buffer_bytes = buffer_bytes
        self._queue: deque[tuple[float, memoryview | _End]] = deque()
        self._queued_bytes = 0
        self._last_due = 0.0
        self.has_read_all = False
        self.is_blocked = False
        """Whether something is due but the sink takes no more."""
        self.end: _End | None = None
        """The end of the connection, once it is delivered."""
        self.is_broken = False
        """Whether the sink takes nothing any more; what was under way is lost."""

    @property
    def wants_to_read(self) -> bool:
        """Whether there is room for more."""
        return not self.has_read_all and self._queued_bytes < self._buffer_bytes

    def next_due(self) -> float:
        """Return when to deliver; infinite when nothing is under way or the sink must move first."""
        return math.inf if self.is_blocked or not self._queue else self._queue[0][0]

    def read(self, now: float) -> None:
        """Take what the source has."""
        room = min(self._direction.piece_bytes, self._buffer_bytes - self._queued_bytes)
        try:
            piece = self.source.recv(room)
        except BlockingIOError:
            return
        except OSError:
            self.finish(_End.reset, now)
            return
        if piece:
            self._put(memoryview(piece), now, len(piece))
        else:
            self.finish(_End.close, now)

    def finish(self, end: _End, now: float) -> None:
        """Let the end follow the bytes that are under way."""
        if not self.has_read_all:
            self.has_read_all = True
            self._put(end, now, 0)

    @property
    def is_done(self) -> bool:
        """Whether nothing more comes out."""
        return self.is_broken or self.end is not None

    def deliver(self, now: float) -> None:
        """Write what is due."""
        self.is_blocked = False
        while self._queue and self._queue[0][0] <= now and not self.is_blocked:
            piece = self._queue[0][1]
            try:
                if isinstance(piece, memoryview):
                    self._write(piece)
                else:
                    self._queue.popleft()
                    self._deliver_end(piece)
            except OSError:
                self._break()

    def _break(self) -> None:
        self.is_broken = self.has_read_all = True
        self._queue.clear()
        self._queued_bytes = 0

    def _put(self, piece: memoryview | _End, now: float, size_bytes: int) -> None:
        self._last_due = max(self._last_due, self._direction.enter(now, size_bytes))
        self._queued_bytes += size_bytes
        self._queue.append((self._last_due, piece))

    def _write(self, piece: memoryview) -> None:
        try:
            count = self.sink.send(piece)
        except BlockingIOError:
            self.is_blocked = True
            return
        self._queued_bytes -= count
        due, _ = self._queue.popleft()
        if count < len(piece):
            self._queue.appendleft((due, piece[count:]))
            self.is_blocked = True

    def _deliver_end(self, end: _End) -> None:
        self.end = end
        if end is _End.close:
            self.sink.shutdown(socket.SHUT_WR)


class _Pair:
    """One connection through the link: the client's socket, ours to the target, a pipe each way."""

    def __init__(
        self,
        client: socket.socket,
        target: socket.socket,
        address: tuple[object, ...],
        up: _Direction,
        down: _Direction,
        buffer_bytes: int,
    ) -> None:
        for end in (client, target):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._client, self._target = client, target
        self._up = _Pipe(client, target, up, buffer_bytes)
        self._down = _Pipe(target, client, down, buffer_bytes)
        self._is_connected = False
        self.is_over = False
        with contextlib.suppress(BlockingIOError):
            target.connect_ex(address)

    def readers(self) -> Iterator[_Pipe]:
        """Yield the pipes that can take bytes from their source."""
        if self._up.wants_to_read:
            yield self._up
        if self._down.wants_to_read and self._is_connected:
            yield self._down

    def waiting_to_write(self) -> Iterator[socket.socket]:
        """Yield the sockets whose peer must move before we can."""
        if self._up.is_blocked or not self._is_connected:
            yield self._target
        if self._down.is_blocked:
            yield self._client

    def next_due(self) -> float:
        """Return when something comes out at either end."""
        up_due = self._up.next_due() if self._is_connected else math.inf
        return min(up_due, self._down.next_due())

    def deliver(self, now: float) -> None:
        """Write what is due at both ends, and end when both have ended."""
        if not self._is_connected:
            self._look_for_connection(now)
        if self._is_connected:
            self._up.deliver(now)
        self._down.deliver(now)
        if self._up.is_broken:
            self._down.finish(_End.reset, now)
        if self._down.is_broken:
            self._up.finish(_End.reset, now)
        self._end()

    def _end(self) -> None:
        both_done = self._up.is_done and self._down.is_done
        if _End.reset in (self._up.end, self._down.end) or (both_done and (self._up.is_broken or self._down.is_broken)):
            self.reset()
        elif both_done:
            self._client.close()
            self._target.close()
            self.is_over = True

    def reset(self) -> None:
        """Reset the connection at both ends."""
        _reset(self._client)
        _reset(self._target)
        self.is_over = True

    def _look_for_connection(self, now: float) -> None:
        _, writable, _ = select.select([], [self._target], [], 0)
        if not writable:
            return
        self._is_connected = True
        if self._target.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._up.has_read_all = True
            self._down.finish(_End.reset, now)


def _short_of(timeout_seconds: float) -> float:
    """Return for how long to wait at once: Linux may end a wait late by 0.5 % of it, so a long one takes two steps."""
    if timeout_seconds < 0.001:
        return max(0.0, timeout_seconds)
    return min(timeout_seconds * 0.98, 3600.0)


def _reset(end: socket.socket) -> None:
    """Close `end` so that its peer gets an RST, not an orderly end."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()
