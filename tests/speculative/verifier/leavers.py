"""Clients that leave at random moments, in every way, of both protocols: for whom does the verifier still compute?

Every client's prompt begins with its number, so that the engine can tell whose rows a pass holds.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from lab.engine.base import Engine, Request, Session, TargetStep, Want
from lab.engine.sampling import Sampling
from lab.engine.synthetic import SyntheticEngine
from lab.wire.endpoint import Endpoint
from lab.wire.tokens import pack_tokens
from speculative.messages import CloseFrame, MessageType, OpenFrame, Reason
from speculative.settings import Mode
from tests.speculative.in_process import decoded_alone
from tests.speculative.serving_here import Here, client_endpoint, connected, first_protocol, serving_here

NEW_TOKENS = 300
WORDS = (
    *("model=random", "project.engine=synthetic", "project.synthetic.row_seconds=0", "project.max_waiting=200"),
    *("project.max_connections=200", "project.prefill_chunk=32", "project.synthetic.step_seconds=0.02"),
    *(f"project.max_new_tokens={NEW_TOKENS}", "project.context=0"),
    *("network.dead_after_seconds=60", "network.handshake_timeout_seconds=60"),  # a machine may be busy
)
DIGITS = 5
LOOP_TURNS = 10
"""From the end of a connection to its text: a few callbacks and tasks that wake each other."""
LONGEST_PROMPT = 400
LONGEST_STAY_SECONDS = 1.0
ALLOWED_PASSES = 2
"""Those that begin after a client has left and may hold a row of it: one that was about to begin, and the next."""
WAYS = ("closed", "reset", "half-closed", "goodbye")


@dataclass
class Passes:
    """An engine that notes whose rows each pass holds. Its passes last until the verifier's event loop has looked at
    its sockets: on a busy machine a loop can be late by any time."""

    engine: Engine
    loop: asyncio.AbstractEventLoop
    passes: list[tuple[float, set[int]]] = field(default_factory=list)
    """When each began, and the numbers of the clients in it."""
    _numbers: dict[int, int] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def open(self, prompt_ids: Sequence[int], sampling: Sampling, most_tokens: int | None = None) -> Session:
        return self.engine.open(prompt_ids, sampling, most_tokens)

    def extend(self, requests: Sequence[Request], want: Want) -> list[TargetStep]:
        for session, ids in requests:
            if session.position == 0:
                self._numbers[id(session)] = int(bytes(ids[:DIGITS]))
        self.passes.append((time.monotonic(), {self._numbers[id(session)] for session, _ in requests}))
        steps = self.engine.extend(requests, want)
        self._let_look()
        return steps

    def _let_look(self) -> None:
        looked = threading.Event()

        def turn(left: int) -> None:
            if left:
                self.loop.call_soon(turn, left - 1)
            else:
                looked.set()

        self.loop.call_soon_threadsafe(turn, LOOP_TURNS)
        looked.wait(5.0)  # a loop that has ended does not turn


@dataclass
class Left:
    """What came of it."""

    clients: int = 0
    ways: dict[str, int] = field(default_factory=dict)
    passes: int = 0
    computed: int = 0
    """Clients that had at least one row."""
    late_rows: int = 0
    """Of clients that had left more than `ALLOWED_PASSES` passes ago."""
    most_passes_late: int = 0
    """Passes that began after a client had left, the last one with a row of it included."""
    served: dict[str, int] = field(default_factory=dict)
    stayed_text: bool = False
    """Whether the one that stayed has its own text."""


def leave_at_random(clients: int, at_once: int, seed: int) -> Left:
    """So many clients, at most `at_once` of them together, with room for half of them; each leaves within a second."""
    watched: list[Passes] = []

    def wrap(engine: Engine, loop: asyncio.AbstractEventLoop) -> Engine:
        watched.append(Passes(engine, loop))
        return watched[0]  # type: ignore[return-value]

    came = Left(clients=clients)
    left_at: dict[int, float] = {}
    halves: list[socket.socket] = []
    with serving_here(*WORDS, f"project.sessions={at_once // 2}", wrap=wrap) as here:
        endpoint = client_endpoint(here.settings)
        numbers = [random.Random(seed * 1_000_003 + number) for number in range(clients)]

        def one(number: int) -> None:
            way = _stay_and_leave(here, endpoint, number, numbers[number], halves)
            left_at[number] = time.monotonic()
            came.ways[way] = came.ways.get(way, 0) + 1

        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(one, range(clients)))
        came.stayed_text = _stays(here, clients)
        for half in halves:
            half.close()
    came.passes = len(watched[0].passes)
    seen: set[int] = set()
    for number, at in left_at.items():
        after = [who for when, who in watched[0].passes if when > at]
        rows = [index for index, who in enumerate(after) if number in who]
        came.late_rows += sum(index >= ALLOWED_PASSES for index in rows)
        came.most_passes_late = max([came.most_passes_late, *(index + 1 for index in rows)])
    for _, who in watched[0].passes:
        seen |= who
    came.computed = len(seen)
    came.served = {name: count for name, count in vars(here.served).items() if count}
    return came


def _prompt(number: int, length: int) -> str:
    return f"{number:0{DIGITS}d}" + "x" * length


def _stay_and_leave(
    here: Here, endpoint: Endpoint, number: int, draws: random.Random, halves: list[socket.socket]
) -> str:
    prompt = _prompt(number, draws.choice([1, draws.randrange(LONGEST_PROMPT)]))
    way = draws.choice(WAYS)
    stay = draws.choice([0.0, draws.random() * LONGEST_STAY_SECONDS])
    if draws.random() < 0.5:
        client = socket.create_connection(("127.0.0.1", here.port))
        client.sendall(first_protocol(prompt))
        time.sleep(stay)
        return "first protocol " + _leave(client, way, client.close, halves)
    frames = connected(here.port, endpoint)
    frames.send(MessageType.open, 1, _open(number, draws), pack_tokens(list(prompt.encode())))
    time.sleep(stay)
    if way == "goodbye":
        frames.send(MessageType.close, 1, CloseFrame(reason=Reason.left, text=""))
        frames.close()
        return way
    return _leave(frames._socket, way, frames.close, halves)


def _leave(client: socket.socket, way: str, close: Callable[[], None], halves: list[socket.socket]) -> str:
    if way == "reset":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        return way
    if way == "half-closed":
        client.shutdown(socket.SHUT_WR)
        halves.append(client)
        return way
    close()
    return "closed"


def _open(number: int, draws: random.Random) -> OpenFrame:
    return OpenFrame(
        name=number,
        owner=bytes(16),
        seed=0,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        logit_rules=None,
        top_tokens=0,
        max_new_tokens=NEW_TOKENS,
        mode=draws.choice([Mode["async"], Mode.target_only]),
        draft_length=0,
        threshold=None,
        report=False,
        logprobs=False,
    )


def _stays(here: Here, number: int) -> bool:
    """One that waits for its answer, behind all the others: their places are free again."""
    with socket.create_connection(("127.0.0.1", here.port)) as client:
        client.settimeout(120.0)
        client.sendall(first_protocol(_prompt(number, 1)))
        stream = client.makefile("rb")
        (count,) = struct.unpack("!I", stream.read(4))
        ids = list(struct.unpack(f"!{count}i", stream.read(4 * count)))
    alone = SyntheticEngine(
        vocabulary_size=here.engine.vocabulary_size,
        context=1000,
        sessions=1,
        step_seconds=0,
        row_seconds=0,
        agreement=1,
    )
    return ids == decoded_alone(alone, list(_prompt(number, 1).encode()), Sampling.greedy(), NEW_TOKENS)
