"""Hostile peers against a real listening server: one function for 2,000 frames in `test` and 200,000 in `soak`.

The server is a process of its own (`python tests/wire_fuzz.py`), so that its memory can be read from outside: an echo
of token ids over frames, and the first protocol on the same port. Beside the attackers a legitimate client asks all the
time.
"""

import argparse
import asyncio
import contextlib
import json
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from lab.wire.endpoint import Deadlines, Endpoint
from lab.wire.faults import Peer, WireError
from lab.wire.frame_connection import FrameConnection, address
from lab.wire.frame_server import FrameServer
from lab.wire.frame_socket import FrameSocket
from lab.wire.frames import (
    FORMAT_VERSION,
    HEADER,
    MAGIC,
    Buffer,
    FrameReader,
    Head,
    Limits,
    MessageKind,
    MessageTable,
    Ping,
    WireType,
    encode,
)
from lab.wire.handshake import HANDSHAKE_TABLE, ClientHandshake, Hello, Proof
from lab.wire.tokens import pack_tokens, unpack_tokens
from speculative.protocol import MAX_TEXT_BYTES, read_msg, recv_tokens, send_msg, write_tokens

KEY = b"a key for the tests only"
ECHO = 16
VOCABULARY = 1000
PAYLOAD_CAP_BYTES = 2**20
HANDSHAKE_CAP_BYTES = 4096
ANSWER_SECONDS = 20.0  # a deadline for a loaded machine, not an expectation
RSS_BUDGET_BYTES = 10 * 2**20
ADDRESS_SPACE_BUDGET_BYTES = 64 * 2**20


class Echo(Head):
    number: int


TABLE = MessageTable({ECHO: MessageKind(head=Echo, max_bytes=PAYLOAD_CAP_BYTES, has_body=True)})


def endpoint(role: str, peer_role: str, *, key: bytes = KEY, handshake_seconds: float = ANSWER_SECONDS) -> Endpoint:
    return Endpoint(
        role=role,
        peer_roles=frozenset({peer_role}),
        key=key,
        table=TABLE,
        protocol=range(1, 2),
        limits=Limits(
            handshake_bytes=HANDSHAKE_CAP_BYTES,
            payload_bytes=PAYLOAD_CAP_BYTES,
            backlog_bytes=PAYLOAD_CAP_BYTES,
            outgoing_bytes=2 * PAYLOAD_CAP_BYTES,
        ),
        deadlines=Deadlines(
            connect_seconds=ANSWER_SECONDS,
            handshake_seconds=handshake_seconds,
            send_seconds=ANSWER_SECONDS,
            ping_seconds=1,
            dead_seconds=ANSWER_SECONDS,
        ),
    )


# The server


async def echo(connection: FrameConnection) -> None:
    while True:
        frame = await connection.recv()
        ids = unpack_tokens(frame.body, vocabulary_size=VOCABULARY, peer=connection.peer)
        connection.send(ECHO, frame.session, frame.head, pack_tokens(ids))


async def spell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, idle_seconds: float) -> None:
    """The first protocol's answer here: the bytes of the text."""
    peer = Peer(role="client", address=address(writer.transport), phase="request")
    while True:
        text = await read_msg(reader, peer=peer, max_bytes=MAX_TEXT_BYTES, timeout_seconds=idle_seconds)
        await write_tokens(writer, list(text[:100].encode()), peer=peer, timeout_seconds=idle_seconds)


def allocate_first(monkey: type[FrameReader]) -> None:
    """Break the reader on purpose: memory first, checks later."""
    check = monkey._read_header
    hoard: list[bytearray] = []

    def careless(reader: FrameReader) -> object:
        size = HEADER.unpack_from(reader._memory, reader._start)[5]
        hoard.append(bytearray(size))
        return check(reader)

    monkey._read_header = careless  # type: ignore[method-assign, assignment]


async def serve(handshake_seconds: float) -> None:
    idle_seconds = 4 * handshake_seconds  # long for a loaded machine, short enough to see slow senders end
    server = FrameServer(
        endpoint("server", "client", handshake_seconds=handshake_seconds),
        echo,
        host="127.0.0.1",
        port=0,
        max_connections=200,
        tls=None,
        handle_first_protocol=lambda reader, writer, left: spell(reader, writer, idle_seconds),
    )
    async with server:
        print(json.dumps({"port": server.port}), flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


@dataclass
class Target:
    """The server as seen from outside."""

    port: int
    process: psutil.Process

    def rss_bytes(self) -> int:
        return int(self.process.memory_info().rss)

    def address_space_peak_bytes(self) -> int:
        """What was ever asked for, touched or not; only Linux says."""
        status = Path(f"/proc/{self.process.pid}/status")
        if not status.exists():
            return 0
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmPeak"))
        return int(line.split()[1]) * 1024


@contextlib.contextmanager
def server_process(*, handshake_seconds: float = 1.0, careless: bool = False) -> Iterator[Target]:
    command = [sys.executable, __file__, "--handshake-seconds", str(handshake_seconds)]
    command += ["--allocate-first"] if careless else []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        assert process.stdout is not None
        line = process.stdout.readline()
        watchdog.cancel()
        assert line, "the server did not start"
        try:
            yield Target(json.loads(line)["port"], psutil.Process(process.pid))
            assert process.poll() is None, "the server died"
        finally:
            process.kill()


# The attackers: each connects, does one thing, and leaves


def raw_header(
    number: int, head_bytes: int, payload_bytes: int, *, magic: bytes = MAGIC, version: int = FORMAT_VERSION
) -> bytes:
    return HEADER.pack(magic, version, number, head_bytes, 7, payload_bytes)


def random_bytes(dice: random.Random) -> bytes:
    return dice.randbytes(dice.randrange(1, 200))


def wrong_magic(dice: random.Random) -> bytes:
    return raw_header(WireType.hello, 8, 8, magic=dice.randbytes(4)) + dice.randbytes(8)


def wrong_version(dice: random.Random) -> bytes:
    return raw_header(WireType.hello, 8, 8, version=dice.choice([0, 2, 255])) + dice.randbytes(8)


def length_bomb(dice: random.Random) -> bytes:
    return raw_header(dice.choice([*WireType, ECHO]), 8, dice.randrange(HANDSHAKE_CAP_BYTES + 1, 2**32)) + b"12345678"


def first_protocol_bomb(dice: random.Random) -> bytes:
    return struct.pack("!I", dice.randrange(MAX_TEXT_BYTES + 1, 2**31)) + random_bytes(dice)


def first_protocol_not_utf8(dice: random.Random) -> bytes:
    return struct.pack("!I", 4) + b"\xff\xfe\xfd\xfc"


def application_frame_first(dice: random.Random) -> bytes:
    return bytes(encode(TABLE, ECHO, 1, Echo(number=1), pack_tokens([1, 2])))


def wrong_mac(dice: random.Random) -> bytes:
    hello = encode(HANDSHAKE_TABLE, WireType.hello, 0, Hello(statement=_statement()))
    return bytes(hello + encode(HANDSHAKE_TABLE, WireType.proof, 0, Proof(mac=dice.randbytes(32))))


def bad_statement(dice: random.Random) -> bytes:
    return bytes(encode(HANDSHAKE_TABLE, WireType.hello, 0, Hello(statement=_torn(_statement(), dice))))


def unknown_field(dice: random.Random) -> bytes:
    head = b"\x92" + b"\xc4\x01x" + b"\x07"  # HELLO with one field too many
    return raw_header(WireType.hello, len(head), len(head)) + head


def torn_hello(dice: random.Random) -> bytes:
    return _torn(bytes(encode(HANDSHAKE_TABLE, WireType.hello, 0, Hello(statement=_statement()))), dice)


STRANGERS: list[Callable[[random.Random], bytes]] = [
    random_bytes,
    wrong_magic,
    wrong_version,
    length_bomb,
    first_protocol_bomb,
    first_protocol_not_utf8,
    application_frame_first,
    wrong_mac,
    bad_statement,
    unknown_field,
    torn_hello,
]


def token_out_of_range(dice: random.Random) -> bytes:
    wrong = dice.choice([-1, VOCABULARY, 2**31 - 1, -(2**31)])
    return bytes(encode(TABLE, ECHO, 1, Echo(number=1), pack_tokens([1, wrong, 2])))


def torn_tokens(dice: random.Random) -> bytes:
    return bytes(encode(TABLE, ECHO, 1, Echo(number=1), b"123"))


def member_bomb(dice: random.Random) -> bytes:
    return raw_header(ECHO, 2, dice.randrange(PAYLOAD_CAP_BYTES + 1, 2**32)) + b"\x91\x01"


def head_beyond_payload(dice: random.Random) -> bytes:
    return raw_header(ECHO, dice.randrange(9, 2**16), 8) + bytes(8)


def unknown_type(dice: random.Random) -> bytes:
    return raw_header(dice.choice([0, 7, 15, 17, 255]), 2, 2) + b"\x91\x01"


def msgpack_bomb(dice: random.Random) -> bytes:
    head = dice.choice(
        [b"\xdd\xff\xff\xff\xff", b"\x91\xdb\xff\xff\xff\xff", b"\x91\xdf\xff\xff\xff\xff", b"\x91" * 5000]
    )
    return raw_header(ECHO, len(head), len(head)) + head


def body_on_ping(dice: random.Random) -> bytes:
    return raw_header(WireType.ping, 2, 6) + b"\x91\x01abcd"


def handshake_again(dice: random.Random) -> bytes:
    return bytes(encode(HANDSHAKE_TABLE, WireType.hello, 0, Hello(statement=_statement())))


def ping_flood(dice: random.Random) -> bytes:
    return bytes(encode(TABLE, WireType.ping, 0, Ping(number=dice.randrange(2**32)))) * 50


def forged_pong(dice: random.Random) -> bytes:
    return bytes(encode(TABLE, WireType.pong, 0, Ping(number=dice.randrange(2**32))))


def torn_echo(dice: random.Random) -> bytes:
    return _torn(bytes(encode(TABLE, ECHO, 1, Echo(number=1), pack_tokens([1, 2, 3]))), dice)


MEMBERS: list[Callable[[random.Random], bytes]] = [
    token_out_of_range,
    torn_tokens,
    member_bomb,
    head_beyond_payload,
    unknown_type,
    msgpack_bomb,
    body_on_ping,
    handshake_again,
    ping_flood,
    forged_pong,
    torn_echo,
]


def _statement() -> bytes:
    return ClientHandshake(endpoint("client", "server"), Peer("server", "?", "handshake"))._ours


def _torn(whole: bytes, dice: random.Random) -> bytes:
    """A few bytes changed, or the end cut off."""
    torn = bytearray(whole)
    for _ in range(dice.randrange(1, 4)):
        torn[dice.randrange(len(torn))] = dice.randrange(256)
    return bytes(torn[: dice.randrange(1, len(torn) + 1)])


@dataclass
class Report:
    """What came of it."""

    frames: int
    served: int = 0
    """Requests of the legitimate client that were answered rightly, both protocols."""
    failures: list[str] = field(default_factory=list)
    slowest_answer_seconds: float = 0.0
    rss_growth_bytes: int = 0
    address_space_growth_bytes: int = 0
    slow_senders: int = 0
    slow_senders_ended: int = 0

    def is_harmless(self) -> bool:
        """Whether the server held what the wire promises."""
        return (
            not self.failures
            and self.rss_growth_bytes < RSS_BUDGET_BYTES
            and self.address_space_growth_bytes < ADDRESS_SPACE_BUDGET_BYTES
            and self.slow_senders_ended == self.slow_senders
        )


class Customer(threading.Thread):
    """A legitimate client that asks all the time, both ways, over lasting connections."""

    def __init__(self, port: int, report: Report) -> None:
        super().__init__(daemon=True)
        self._port, self._report = port, report
        self._enough = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            with (
                FrameSocket.connect("127.0.0.1", self._port, endpoint("client", "server"), tls=None) as frames,
                socket.create_connection(("127.0.0.1", self._port), timeout=ANSWER_SECONDS) as text,
            ):
                while not self._enough.wait(0.002):
                    started = time.monotonic()
                    self._ask(frames, text)
                    took = time.monotonic() - started
                    self._report.slowest_answer_seconds = max(took, self._report.slowest_answer_seconds)
        except (WireError, AssertionError) as error:
            self._report.failures.append(repr(error))

    def _ask(self, frames: FrameSocket, text: socket.socket) -> None:
        ids = [self._report.served % VOCABULARY, 2, 3]
        frames.send(ECHO, 5, Echo(number=self._report.served), pack_tokens(ids))
        frame = frames.poll(ANSWER_SECONDS)
        assert frame is not None, "no echo"
        assert unpack_tokens(frame.body, vocabulary_size=VOCABULARY, peer=frames.peer) == ids, "wrong echo"
        send_msg(text, "abc")
        assert recv_tokens(text) == [97, 98, 99], "wrong text"
        self._report.served += 1

    def stop(self) -> None:
        self._enough.set()
        self.join(2 * ANSWER_SECONDS)


def fuzz(
    target: Target, *, frames: int, seed: int, attacks: list[Callable[[random.Random], bytes]] | None = None
) -> Report:
    """Send `frames` hostile frames, one a connection, and return what came of it; `attacks` None is all of them."""
    dice = random.Random(seed)
    report = Report(frames=frames)
    chosen = attacks or [*STRANGERS, *MEMBERS]
    for warm_up in chosen:
        attack(target, warm_up, dice)
    rss, space = target.rss_bytes(), target.address_space_peak_bytes()
    customer = Customer(target.port, report)
    slow: list[socket.socket] = []
    for index in range(frames):
        attack(target, dice.choice(chosen), dice)
        if index % max(1, frames // 20) == 0:
            slow.append(slow_sender(target, dice))
        if index % 100 == 0:
            report.rss_growth_bytes = max(report.rss_growth_bytes, target.rss_bytes() - rss)
    report.slow_senders = len(slow)
    report.slow_senders_ended = sum(was_ended(sender) for sender in slow)
    customer.stop()
    report.rss_growth_bytes = max(report.rss_growth_bytes, target.rss_bytes() - rss)
    report.address_space_growth_bytes = target.address_space_peak_bytes() - space
    return report


def attack(target: Target, make: Callable[[random.Random], bytes], dice: random.Random) -> None:
    hostile = make(dice)
    with contextlib.suppress(OSError):
        if make in MEMBERS:
            with FrameSocket.connect("127.0.0.1", target.port, endpoint("client", "server"), tls=None) as member:
                send_and_look(member._socket, hostile, dice)
        else:
            with socket.create_connection(("127.0.0.1", target.port), timeout=ANSWER_SECONDS) as stranger:
                send_and_look(stranger, hostile, dice)


def send_and_look(attacker: socket.socket, hostile: Buffer, dice: random.Random) -> None:
    attacker.settimeout(0.2)
    cut = dice.randrange(1, len(hostile) + 1)
    attacker.sendall(hostile[:cut])
    attacker.sendall(hostile[cut:])
    if dice.random() < 0.5:  # the others leave at once
        attacker.shutdown(socket.SHUT_WR)
        while attacker.recv(2**16):
            pass
    attacker.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leave no TIME_WAIT behind


def slow_sender(target: Target, dice: random.Random) -> socket.socket:
    """Begin something and never go on."""
    sender = socket.create_connection(("127.0.0.1", target.port), timeout=ANSWER_SECONDS)
    begun = dice.choice([b"", MAGIC[:2], MAGIC, raw_header(WireType.hello, 100, 100), b"\0\0\0\x10abc"])
    with contextlib.suppress(OSError):
        sender.sendall(begun)
    return sender


def was_ended(sender: socket.socket) -> bool:
    with sender:
        try:
            while sender.recv(2**16):
                pass
        except TimeoutError:
            return False
        except OSError:
            pass
        return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--handshake-seconds", type=float, required=True)
    parser.add_argument("--allocate-first", action="store_true")
    arguments = parser.parse_args()
    if arguments.allocate_first:
        allocate_first(FrameReader)
    asyncio.run(serve(arguments.handshake_seconds))
