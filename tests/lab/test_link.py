"""The link between real sockets. Times are bounded from below; from above only by what no machine misses."""

import contextlib
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.link import Cut, CutKind, Link, LinkSettings, OneWay
from tests.shared import one_way

DEADLINE_SECONDS = 20.0


class EchoServer:
    """Says back what it is told; one thread a connection."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self.ends: list[str] = []
        """How connections ended, as seen here."""
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(2**16):
                    connection.sendall(data)
                self.ends.append("close")
            except ConnectionResetError:
                self.ends.append("reset")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # else the thread in accept keeps it open
        self._listener.close()


@pytest.fixture
def server() -> Iterator[EchoServer]:
    echo = EchoServer()
    yield echo
    echo.close()


def settings(
    up: OneWay | None = None, down: OneWay | None = None, *, buffer_bytes: int = 2**20, cuts: tuple[Cut, ...] = ()
) -> LinkSettings:
    return LinkSettings(up=up or one_way(), down=down or one_way(), buffer_bytes=buffer_bytes, seed=0, cuts=cuts)


def link_to(server: EchoServer, link_settings: LinkSettings) -> Link:
    return Link(server.address, link_settings, host="127.0.0.1", port=0)


def dial(link: Link) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", link.port), timeout=DEADLINE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def recv_exactly(connection: socket.socket, count: int) -> bytes:
    received = bytearray()
    while len(received) < count:
        data = connection.recv(count - len(received))
        assert data, "the link ended"
        received += data
    return bytes(received)


def ask(connection: socket.socket, message: bytes = b"x" * 60) -> float:
    """Seconds of one round trip."""
    started = time.perf_counter()
    connection.sendall(message)
    assert recv_exactly(connection, len(message)) == message
    return time.perf_counter() - started


def ask_until_it_fails(connection: socket.socket) -> list[float]:
    """Seconds of each round trip until the connection breaks."""
    trips = []
    deadline = time.monotonic() + DEADLINE_SECONDS
    with contextlib.suppress(ConnectionError):
        while time.monotonic() < deadline:
            trips.append(ask(connection))
    return trips


def is_refused(link: Link) -> bool:
    """Whether a new connection is reset, in or after its opening."""
    try:
        with dial(link) as connection:
            connection.recv(1)
    except ConnectionResetError:
        return True
    return False


def until(true: "list[str]", seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not true and time.monotonic() < deadline:
        time.sleep(0.005)


@pytest.mark.parametrize(("up_seconds", "down_seconds"), [(0.01, 0.01), (0.03, 0.0), (0.0, 0.1)])
def test_the_delay_is_met_and_never_early(server: EchoServer, up_seconds: float, down_seconds: float) -> None:
    both_ways = settings(one_way(up_seconds), one_way(down_seconds))
    with link_to(server, both_ways) as link, dial(link) as connection:
        errors = [ask(connection) - up_seconds - down_seconds for _ in range(15)]
    assert min(errors) >= 0
    assert min(errors) < 0.005
    assert statistics.median(errors) < 0.05


def test_without_settings_it_is_only_a_proxy(server: EchoServer) -> None:
    with link_to(server, settings()) as link, dial(link) as connection:
        assert min(ask(connection) for _ in range(50)) < 0.005
        assert link.traffic.up_bytes == link.traffic.down_bytes == 50 * 60
        assert link.traffic.connections == 1


def test_many_pieces_are_under_way_at_once(server: EchoServer) -> None:
    with link_to(server, settings(one_way(0.1))) as link, dial(link) as connection:
        started = time.monotonic()
        for number in range(10):
            connection.sendall(bytes([number]) * 10)
            time.sleep(0.01)
        received = recv_exactly(connection, 100)
        assert received == b"".join(bytes([number]) * 10 for number in range(10))
        assert time.monotonic() - started < 0.1 * 10, "delays overlap, they do not add up"


@given(st.binary(min_size=1, max_size=5000), st.floats(0, 0.003))
def test_jitter_keeps_order_and_every_byte(message: bytes, jitter_seconds: float) -> None:
    way = one_way(jitter_seconds=jitter_seconds)
    connection = _JITTERY.connection(way)
    for start in range(0, len(message), 1000):
        connection.sendall(message[start : start + 1000])
    assert recv_exactly(connection, len(message)) == message


class _Jittery:
    """One link for each jitter of a hypothesis run would be slow: they share a few."""

    def __init__(self) -> None:
        self._connections: dict[float, socket.socket] = {}

    def connection(self, way: OneWay) -> socket.socket:
        rounded = round(way.jitter_seconds, 3)
        if rounded not in self._connections:
            link = link_to(EchoServer(), settings(one_way(jitter_seconds=rounded), one_way(jitter_seconds=rounded)))
            link.__enter__()
            self._connections[rounded] = dial(link)
        return self._connections[rounded]


_JITTERY = _Jittery()


def test_jitter_varies_within_its_bounds(server: EchoServer) -> None:
    with link_to(server, settings(one_way(0.01, jitter_seconds=0.03))) as link, dial(link) as connection:
        trips = [ask(connection) for _ in range(30)]
    assert min(trips) >= 0.01
    assert max(trips) - min(trips) > 0.01
    assert statistics.median(trips) < 0.01 + 0.03 + 0.02


def test_bandwidth_limits_one_direction_and_is_shared(server: EchoServer) -> None:
    narrow = settings(one_way(bytes_per_second=1e6))
    with link_to(server, narrow) as link, dial(link) as first, dial(link) as second:
        started = time.monotonic()
        for connection in (first, second):
            connection.sendall(bytes(100_000))
        for connection in (first, second):
            recv_exactly(connection, 100_000)
        took = time.monotonic() - started
    assert 0.2 <= took < 2
    with link_to(server, settings()) as link, dial(link) as connection:
        assert ask(connection, bytes(200_000)) < 0.2, "without the limit it is much faster"


def test_back_pressure_reaches_the_sender(server: EchoServer) -> None:
    far = settings(one_way(60.0), buffer_bytes=2**16)
    with link_to(server, far) as link, dial(link) as connection:
        connection.setblocking(False)
        sent, deadline = 0, time.monotonic() + 1
        while time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                sent += connection.send(bytes(2**16))
        held = sum(pair._up._queued_bytes for pair in link._pairs)
        assert held == 2**16
        assert sent < 2**24, "the rest waits in the two kernels' buffers"


def test_an_end_follows_the_bytes_and_half_closing_works(server: EchoServer) -> None:
    with link_to(server, settings(one_way(0.05))) as link, dial(link) as connection:
        started = time.monotonic()
        connection.sendall(b"last words")
        connection.shutdown(socket.SHUT_WR)
        assert recv_exactly(connection, 10) == b"last words"
        assert connection.recv(1) == b""
        assert time.monotonic() - started >= 0.05
    assert server.ends == ["close"]


def test_a_reset_travels(server: EchoServer) -> None:
    with link_to(server, settings(one_way(0.05))) as link:
        connection = dial(link)
        ask(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()
        until(server.ends)
        assert server.ends == ["reset"]


def test_a_target_that_is_not_there(server: EchoServer) -> None:
    server.close()
    with link_to(server, settings()) as link:
        assert is_refused(link)


def test_a_thread_that_stops_before_it_is_woken(server: EchoServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traffic may wake it first: then it is told to stop when it has."""
    link = link_to(server, settings())
    wake = link._wake

    def wake_late() -> None:
        with contextlib.suppress(ConnectionError), dial(link):
            link.wait()
        wake()

    with link:
        monkeypatch.setattr(link, "_wake", wake_late)


def test_a_reset_cut_hits_both_ends_and_new_connections_live(server: EchoServer) -> None:
    with link_to(server, settings()) as link, dial(link) as connection:
        ask(connection)
        link.cut(CutKind.reset, duration_seconds=0)
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
        until(server.ends)
        assert server.ends == ["reset"]
        with dial(link) as again:
            ask(again)


def test_a_lasting_reset_refuses_until_healed(server: EchoServer) -> None:
    with link_to(server, settings()) as link:
        link.cut(CutKind.reset, duration_seconds=math.inf)
        assert is_refused(link)
        link.heal()
        with dial(link) as connection:
            ask(connection)


def test_a_blackhole_swallows_in_silence_and_gives_back_when_healed(server: EchoServer) -> None:
    with link_to(server, settings()) as link, dial(link) as connection:
        ask(connection)
        link.cut(CutKind.blackhole, duration_seconds=math.inf)
        connection.sendall(b"hello?")
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        assert not server.ends, "the other end does not notice either"
        link.heal()
        connection.settimeout(DEADLINE_SECONDS)
        assert recv_exactly(connection, 6) == b"hello?"


def test_a_cut_ends_by_itself(server: EchoServer) -> None:
    with link_to(server, settings()) as link, dial(link) as connection:
        link.cut(CutKind.blackhole, duration_seconds=0.2)
        assert ask(connection) >= 0.15


def test_cuts_come_when_they_are_due(server: EchoServer) -> None:
    cuts = (
        Cut(at_seconds=0.5, kind=CutKind.reset, duration_seconds=0),
        Cut(at_seconds=0.1, kind=CutKind.blackhole, duration_seconds=0.2),
    )
    with link_to(server, settings(cuts=cuts)) as link, dial(link) as connection:
        started = time.monotonic()
        trips = ask_until_it_fails(connection)
        assert 0.4 < time.monotonic() - started < 5
        assert max(trips) >= 0.15, "the blackhole came first"


def test_many_connections_at_once(server: EchoServer) -> None:
    with link_to(server, settings(one_way(0.02))) as link, contextlib.ExitStack() as stack:
        connections = [stack.enter_context(dial(link)) for _ in range(50)]
        started = time.monotonic()
        for number, connection in enumerate(connections):
            connection.sendall(bytes([number]) * 1000)
        for number, connection in enumerate(connections):
            assert recv_exactly(connection, 1000) == bytes([number]) * 1000
        assert time.monotonic() - started < 50 * 0.02
        assert link.traffic.connections == 50


def test_leaving_resets_what_is_open_and_frees_the_port(server: EchoServer) -> None:
    with link_to(server, settings()) as link:
        connection = dial(link)
        ask(connection)
        port = link.port
    with connection, pytest.raises(ConnectionResetError):
        connection.recv(1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    assert not any(thread.name == "link" and thread.is_alive() for thread in _started_by_this_test(link))


def _started_by_this_test(link: Link) -> list[threading.Thread]:
    return [link._thread]


def test_it_is_a_link_until_ctrl_c(server: EchoServer) -> None:
    code = f"""
from contextlib import suppress
from lab.link import Link, LinkSettings, OneWay
way = OneWay(delay_seconds=0.01, jitter_seconds=0, bytes_per_second=0)
settings = LinkSettings(up=way, down=way, buffer_bytes=2**20, seed=0)
with Link({server.address!r}, settings, host="127.0.0.1", port=0) as link:
    print(link.port, flush=True)
    with suppress(KeyboardInterrupt):
        link.wait()
    print(link.traffic.up_bytes, link.traffic.down_bytes)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        assert process.stdout is not None
        with socket.create_connection(("127.0.0.1", int(process.stdout.readline())), timeout=20) as connection:
            assert ask(connection) >= 0.02
            process.send_signal(signal.SIGINT)
            assert process.stdout.read() == "60 60\n"
        assert process.wait(20) == 0
        watchdog.cancel()


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: one_way(-1), "delay_seconds must be a finite number of at least 0, got -1"),
        (lambda: one_way(jitter_seconds=math.nan), "jitter_seconds must be"),
        (lambda: one_way(bytes_per_second=-1), "bytes_per_second must be a finite number of at least 0, got -1"),
        (lambda: settings(buffer_bytes=10), "buffer_bytes must be at least 1460, got 10"),
        (lambda: Cut(at_seconds=math.inf, kind=CutKind.reset, duration_seconds=0), "at_seconds must be"),
        (lambda: Cut(at_seconds=1, kind=CutKind.reset, duration_seconds=-1), "duration_seconds must be at least 0"),
    ],
)
def test_settings_that_make_no_sense(make: "type[object]", complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make()
