"""The first protocol, byte for byte, on every kind of socket, with peers that do it wrong."""

import asyncio
import contextlib
import random
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.wire.faults import BadFrame, Peer, PeerGone, PeerSilent
from speculative.protocol import (
    MAX_TEXT_BYTES,
    MAX_TOKENS,
    LeftBetweenMessages,
    encode_msg,
    encode_tokens,
    read_msg,
    recv_msg,
    recv_tokens,
    send_msg,
    send_tokens,
    write_tokens,
)

Pair = tuple[socket.socket, socket.socket]


@contextlib.contextmanager
def tcp_pair() -> Iterator[Pair]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname(), timeout=20)
        ours.settimeout(None)
        theirs, _ = listener.accept()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def pair() -> Iterator[Pair]:
    with tcp_pair() as both:
        yield both


def test_the_bytes_are_the_documented_ones(pair: Pair) -> None:
    ours, theirs = pair
    send_msg(ours, "añ")
    assert theirs.recv(100) == b"\x00\x00\x00\x03a\xc3\xb1"
    send_tokens(ours, [1, -2, 258])
    assert theirs.recv(100) == b"\x00\x00\x00\x03" + b"\x00\x00\x00\x01" + b"\xff\xff\xff\xfe" + b"\x00\x00\x01\x02"
    theirs.sendall(b"\x00\x00\x00\x02hi" + b"\x00\x00\x00\x01\x00\x00\x00\x07")
    assert recv_msg(ours) == "hi"
    assert recv_tokens(ours) == [7]


@given(text=st.text(max_size=300), ids=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=300))
def test_what_is_sent_is_received(text: str, ids: list[int]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send_msg(ours, text)
        send_tokens(ours, ids)
        assert recv_msg(theirs) == text
        assert recv_tokens(theirs) == ids


def test_messages_may_arrive_in_single_bytes(pair: Pair) -> None:
    ours, theirs = pair

    def dribble() -> None:
        for byte in encode_msg("häppchen") + encode_tokens([1, 2, 3]):
            theirs.sendall(bytes([byte]))
            time.sleep(0.001)

    with ThreadPoolExecutor(1) as threads:
        sending = threads.submit(dribble)
        assert recv_msg(ours) == "häppchen"
        assert recv_tokens(ours) == [1, 2, 3]
        sending.result(20)


@pytest.mark.parametrize("own_timeout", [None, 0.0, 7.0])
def test_blocking_non_blocking_and_timed_sockets_stay_what_they_are(pair: Pair, own_timeout: float | None) -> None:
    ours, theirs = pair
    for one in pair:
        one.settimeout(own_timeout)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that writes are partial
    text, ids = "x" * MAX_TEXT_BYTES, [random.Random(0).randrange(2**31)] * MAX_TOKENS

    def answer() -> str:
        time.sleep(0.05)
        received = recv_msg(theirs)
        send_tokens(theirs, ids)
        return received

    with ThreadPoolExecutor(1) as threads:
        answering = threads.submit(answer)
        send_msg(ours, text)
        assert recv_tokens(ours) == ids
        assert answering.result(60) == text
    assert ours.gettimeout() == theirs.gettimeout() == own_timeout
    assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


Receive = Callable[[socket.socket], object]


@pytest.mark.parametrize("receive", [recv_msg, recv_tokens])
@pytest.mark.parametrize("sent", [b"\0", b"\0\0\0\5", b"\0\0\0\5abcd"])
def test_a_peer_that_leaves_within_a_message(pair: Pair, receive: Receive, sent: bytes) -> None:
    ours, theirs = pair
    theirs.sendall(sent)
    theirs.close()
    with pytest.raises(PeerGone, match="in the middle of a message") as caught:
        receive(ours)
    assert not isinstance(caught.value, LeftBetweenMessages)


def test_a_peer_that_leaves_where_it_may(pair: Pair) -> None:
    ours, theirs = pair
    send_msg(theirs, "")
    theirs.close()
    assert recv_msg(ours) == ""
    with pytest.raises(LeftBetweenMessages, match=r"^peer 127.0.0.1:\d+ closed the connection during request$"):
        recv_msg(ours)


def test_a_reset_is_named_in_both_directions(pair: Pair) -> None:
    ours, theirs = pair
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    theirs.close()
    with pytest.raises(PeerGone, match="broke the connection"):
        recv_msg(ours)
    with pytest.raises(PeerGone, match="broke the connection"):
        send_msg(ours, "x" * 100)


def send_without_end(connection: socket.socket) -> None:
    while True:
        send_msg(connection, "x" * MAX_TEXT_BYTES, timeout_seconds=0.2)


@pytest.mark.parametrize("own_timeout", [None, 0.0])
def test_a_silent_peer_meets_a_deadline(pair: Pair, own_timeout: float | None) -> None:
    ours, theirs = pair
    ours.settimeout(own_timeout)
    theirs.sendall(b"\0\0\0\5ab")
    started = time.monotonic()
    with pytest.raises(PeerSilent, match=r"sent no whole message in 0\.2 s during request"):
        recv_msg(ours, timeout_seconds=0.2)
    with pytest.raises(PeerSilent, match=r"took no whole message in 0\.2 s"):
        send_without_end(ours)
    assert 0.4 <= time.monotonic() - started < 20


def test_the_deadline_is_for_the_whole_message(pair: Pair) -> None:
    ours, theirs = pair
    stop = threading.Event()

    def dribble() -> None:
        with contextlib.suppress(OSError):
            theirs.sendall(b"\0\0\1\0")
            while not stop.wait(0.05):
                theirs.sendall(b"x")

    with ThreadPoolExecutor(1) as threads:
        threads.submit(dribble)
        with pytest.raises(PeerSilent):
            recv_msg(ours, timeout_seconds=0.3)
        stop.set()


def test_a_sockets_own_timeout_counts(pair: Pair) -> None:
    ours, _ = pair
    ours.settimeout(0.2)
    with pytest.raises(PeerSilent, match=r"0\.2 s"):
        recv_tokens(ours)


@pytest.mark.parametrize(("receive", "cap"), [(recv_msg, MAX_TEXT_BYTES), (recv_tokens, MAX_TOKENS)])
@pytest.mark.parametrize("more", [1, 2**31])
def test_a_length_over_the_cap_allocates_nothing(pair: Pair, receive: Receive, cap: int, more: int) -> None:
    ours, theirs = pair
    theirs.sendall(struct.pack("!I", cap + more))
    tracemalloc.start()
    with pytest.raises(BadFrame, match=rf"announced {cap + more}, cap is {cap}"):
        receive(ours)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


def test_the_check_above_sees_an_allocation(pair: Pair) -> None:
    ours, theirs = pair
    theirs.sendall(struct.pack("!I", MAX_TEXT_BYTES))
    theirs.close()
    tracemalloc.start()
    with pytest.raises(PeerGone):
        recv_msg(ours)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak > MAX_TEXT_BYTES


def test_a_caller_may_set_a_smaller_cap(pair: Pair) -> None:
    ours, theirs = pair
    send_msg(theirs, "four")
    with pytest.raises(BadFrame, match="announced 4, cap is 3"):
        recv_msg(ours, max_bytes=3)


def test_text_that_is_not_utf8(pair: Pair) -> None:
    ours, theirs = pair
    theirs.sendall(b"\0\0\0\3a\xffb")
    with pytest.raises(BadFrame, match=r"not UTF-8 \(invalid start byte at byte 1\)"):
        recv_msg(ours)


def test_what_does_not_fit_is_refused_before_it_travels(pair: Pair) -> None:
    ours, theirs = pair
    with pytest.raises(ValueError, match="must be at most 1048576 bytes of UTF-8, got 1048578"):
        send_msg(ours, "ü" * (MAX_TEXT_BYTES // 2 + 1))
    with pytest.raises(ValueError, match="at most 65536 tokens, got 65537"):
        send_tokens(ours, [0] * (MAX_TOKENS + 1))
    with pytest.raises(ValueError, match="token ids must be in"):
        send_tokens(ours, [2**31])
    theirs.setblocking(False)
    with pytest.raises(BlockingIOError):
        theirs.recv(1)


# The asyncio side


def serve_once(handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], object], talk: Receive) -> object:
    """Run `talk` as a client in a thread against `handle` on a loop; return what `handle` came to."""

    async def main() -> object:
        result: asyncio.Future[object] = asyncio.get_running_loop().create_future()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                result.set_result(await handle(reader, writer))  # type: ignore[misc]
            except Exception as error:
                result.set_exception(error)
            finally:
                writer.close()

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        async with server:
            client = asyncio.to_thread(
                lambda: talk(socket.create_connection(server.sockets[0].getsockname(), timeout=20))
            )
            talking = asyncio.ensure_future(client)
            outcome = await asyncio.wait_for(result, 20)
            await talking
            return outcome

    return asyncio.run(main())


PEER = Peer(role="client", address="somewhere", phase="request")


async def read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
    return await read_msg(reader, peer=PEER, max_bytes=1000, timeout_seconds=0.5)


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    for _ in range(3):
        text = await read_msg(reader, peer=PEER, max_bytes=1000, timeout_seconds=10)
        await write_tokens(writer, [len(text)] * 50_000, peer=PEER, timeout_seconds=10)


def test_a_server_answers_any_number_of_requests() -> None:
    def talk(connection: socket.socket) -> None:
        with connection:
            for text in ("", "a", "bcd"):
                send_msg(connection, text)
                assert recv_tokens(connection) == [len(text)] * 50_000

    assert serve_once(answer, talk) is None


@pytest.mark.parametrize(
    ("sent", "fault", "complaint"),
    [
        (b"", LeftBetweenMessages, "client somewhere closed"),
        (b"\0\0", PeerGone, "in the middle"),
        (b"\0\0\0\4", PeerGone, "in the middle"),
        (b"\0\0\0\4ab", PeerGone, "in the middle"),
        (b"\0\0\4\0", BadFrame, "announced 1024, cap is 1000"),
        (b"\0\0\0\1\xff", BadFrame, "not UTF-8"),
    ],
)
def test_a_server_names_what_a_client_does_wrong(sent: bytes, fault: type[Exception], complaint: str) -> None:
    def talk(connection: socket.socket) -> None:
        with connection:
            connection.sendall(sent)

    with pytest.raises(fault, match=complaint):
        serve_once(read, talk)


def test_a_server_does_not_wait_for_ever() -> None:
    def talk(connection: socket.socket) -> None:
        with connection:
            connection.sendall(b"\0\0\0\4ab")
            assert connection.recv(1) == b""

    with pytest.raises(PeerSilent, match=r"sent no whole request in 0\.5 s"):
        serve_once(read, talk)
