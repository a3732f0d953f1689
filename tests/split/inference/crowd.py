"""Clients in numbers at two shards: wrong requests beside good texts, more texts than there is room for, clients that
leave. One function each, for a few in `test` and many in `soak`."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from lab.engine.kv import CacheFull
from lab.engine.sampling import Sampling
from lab.wire.endpoint import Endpoint
from lab.wire.frame_socket import FrameSocket
from lab.wire.tokens import pack_tokens
from split.chain.address import Address
from split.chain.messages import Attach, Fault, FaultCode, Welcome, send
from split.inference.messages import Close, Open, Opened, Pass, Piece, Steps, unpack_steps
from split.inference.shard import Shard
from split.inference.sharded_model import ShardedModel
from split.transport.base import Message, ShardLost
from split.transport.tcp import TcpChain

GREEDY = Sampling.greedy()
GOOD_CLIENTS = 4
GOOD_TOKENS = 24
"""Of each text of a good client; then it begins another one."""
Connect = Callable[[], ShardedModel]
Expected = Callable[[Sequence[int], int], list[int]]
"""The greedy text behind a prompt, by a model that nobody else asks."""


def text_of(engine: ShardedModel, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """A greedy text, token by token, in a place of its own size."""
    said: list[int] = []
    with engine.open(prompt, GREEDY, len(prompt) + new_tokens) as text:
        while True:
            assert text.step is not None
            said.append(text.step.next_ids[-1])
            if len(said) == new_tokens:
                return said
            engine.extend([(text, said[-1:])], "last")


# Wrong requests


@dataclass(frozen=True)
class Misused:
    """What came of wrong requests."""

    requests: dict[str, int]
    """By what was wrong with them."""
    unanswered: list[str]
    """Those that were not told what was wrong, or took others with them."""
    good_texts: int
    differing: int
    """Good texts with a token that is not the model's own."""


class Wrongdoer:
    """A client that sends what no client of ours does; in the same passes goes a text of its own that is good."""

    def __init__(self, chain: TcpChain, last: Address, ours: Endpoint, vocabulary: int, hidden: int) -> None:
        self._chain, self._last, self._ours = chain, last, ours
        self._vocabulary, self._hidden = vocabulary, hidden
        self._numbered = 1
        assert isinstance(self._ask(1, _open(8)).head, Opened)
        self._first = self._next_of_good()

    def kinds(self) -> dict[str, Callable[[], bool]]:
        """What can be wrong; each returns whether it was dealt with as it should be."""
        size = self._vocabulary
        return {
            "an id without a row": lambda: self._beside_good([0, size], FaultCode.refused),
            "a negative id": lambda: self._beside_good([0, -1], FaultCode.refused),
            "a position that is not held": lambda: self._beside_good([1], FaultCode.lost, position=5),
            "more tokens than it asked for": lambda: self._beside_good([1] * 9, FaultCode.refused),
            "a text that was never opened": lambda: self._beside_good([1], FaultCode.lost, tokens=0),
            "a position beyond everything": lambda: self._beside_good([1], FaultCode.lost, position=2**31 - 1),
            "a text twice": self._twice,
            "a body that is too short": lambda: self._body(pack_tokens([1])),
            "a body that is too long": lambda: self._body(pack_tokens([1] * 5)),
            "a count that lies": lambda: self._body(pack_tokens([1] * 4), count=2**20 - 1),
            "more tokens than fit": lambda: self._refused(_open(2**31 - 1)),
            "an endless temperature": lambda: self._refused(_open(4, temperature=float("inf"))),
            "a sampling at its limits": self._limits,
            "a text that is open already": self._again,
            "hidden states that are none": lambda: self._at_last(struct.pack("<f", float("nan")), FaultCode.unfit),
            "infinite hidden states": lambda: self._at_last(struct.pack("<f", float("inf")), FaultCode.unfit),
            "hidden states of another size": lambda: self._at_last(b"", None),
            "an id without a row at the last shard": lambda: self._at_last(bytes(4), FaultCode.refused, [size + 7]),
        }

    def _number(self) -> int:
        self._numbered += 1
        return self._numbered

    def _ask(self, number: int, head: Open | Pass, body: bytes = b"") -> Message:
        self._chain.send(0, Message(number, head, body))
        return self._chain.collect()

    def _next_of_good(self) -> list[int]:
        run = Pass(read_all=False, pieces=[_piece(1, 0, 3)])
        return unpack_steps(run, self._ask(self._number(), run, pack_tokens([1, 2, 3])).body, [0])[0].next_ids

    def _beside_good(self, ids: list[int], code: FaultCode, *, position: int = 0, tokens: int = 8) -> bool:
        wrong = self._number()
        if tokens:
            self._ask(wrong, _open(tokens))
        run = Pass(read_all=False, pieces=[_piece(wrong, position, len(ids)), _piece(1, 0, 3)])
        answer = self._ask(self._number(), run, pack_tokens([*ids, 1, 2, 3]))
        self._chain.send(0, Message(wrong, Close()))
        assert isinstance(answer.head, Steps)
        stopped = [(one.session, one.code) for one in answer.head.stopped]
        return stopped == [(wrong, code)] and unpack_steps(run, answer.body, [0, 0])[1].next_ids == self._first

    def _is_fault(self, answer: Message, code: FaultCode = FaultCode.refused) -> bool:
        return isinstance(answer.head, Fault) and answer.head.code is code and self._next_of_good() == self._first

    def _twice(self) -> bool:
        run = Pass(read_all=False, pieces=[_piece(1, 0, 1), _piece(1, 1, 1)])
        return self._is_fault(self._ask(self._number(), run, pack_tokens([1, 2])))

    def _body(self, body: bytes, count: int = 3) -> bool:
        return self._is_fault(self._ask(self._number(), Pass(read_all=False, pieces=[_piece(1, 0, count)]), body))

    def _refused(self, head: Open) -> bool:
        return self._is_fault(self._ask(self._number(), head))

    def _again(self) -> bool:
        return self._is_fault(self._ask(1, _open(4)))

    def _limits(self) -> bool:
        """Odd but allowed: it is a text like others."""
        number = self._number()
        answer = self._ask(number, _open(8, temperature=1e300, top_k=2**32 - 1, top_p=1e-300))
        if not isinstance(answer.head, Opened):
            return False
        answer = self._ask(self._number(), Pass(read_all=True, pieces=[_piece(number, 0, 2)]), pack_tokens([1, 2]))
        self._chain.send(0, Message(number, Close()))
        return isinstance(answer.head, Steps) and not answer.head.stopped and self._next_of_good() == self._first

    def _at_last(self, number: bytes, code: FaultCode | None, ids: Sequence[int] = (1,)) -> bool:
        """Straight to the last shard, as its only one."""
        with FrameSocket.connect(self._last.host, self._last.port, self._ours, tls=None) as peer:
            run = Pass(read_all=True, pieces=[_piece(1, 0, 1)])
            body = pack_tokens(ids) + number * self._hidden
            said: list[Any] = []
            attach = Attach(client=random.getrandbits(62), next=[], next_instance=0)
            for session, head, own in ((0, attach, b""), (1, _open(4), b""), (2, run, body)):
                send(peer, session, head, own)
                frame = peer.poll(30)
                assert frame is not None
                said.append(frame.head)
        assert isinstance(said[0], Welcome)
        assert isinstance(said[1], Opened)
        if code is None:
            return isinstance(said[2], Fault) and said[2].code is FaultCode.refused
        return isinstance(said[2], Steps) and [one.code for one in said[2].stopped] == [code]


def _piece(session: int, position: int, count: int) -> Piece:
    return Piece(session=session, position=position, count=count, is_first=True, is_last=True)


def _open(tokens: int, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> Open:
    return Open(
        tokens=tokens,
        seed=1,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=0.0,
        logit_rules=None,
        top_tokens=0,
    )


def misuse(
    wrongdoer: Wrongdoer, connect: Connect, expected: Expected, *, requests: int, good: int = GOOD_CLIENTS
) -> Misused:
    """Wrong requests in turn, of every kind, beside texts that go on all the time."""
    kinds = wrongdoer.kinds()
    is_over = threading.Event()
    asked: Counter[str] = Counter()
    unanswered = []
    with ThreadPoolExecutor(good) as pool:
        texts = [pool.submit(_good_texts, connect, expected, place, is_over) for place in range(good)]
        try:
            for place in range(requests):
                name = list(kinds)[place % len(kinds)]
                asked[name] += 1
                if not kinds[name]():
                    unanswered.append(name)
        finally:
            is_over.set()
        same = [one for text in texts for one in text.result()]
    return Misused(dict(asked), unanswered, len(same), same.count(False))


def _good_texts(connect: Connect, expected: Expected, place: int, is_over: threading.Event) -> list[bool]:
    engine = connect()
    prompt = [1 + place, 7, 9 + place]
    try:
        same = []
        while not (same and is_over.is_set()):
            same.append(text_of(engine, prompt, GOOD_TOKENS) == expected(prompt, GOOD_TOKENS))
        return same
    finally:
        engine.shutdown()


# More texts than there is room for


@dataclass(frozen=True)
class Crowded:
    """What became of texts that came at random."""

    texts: int
    finished: int
    differing: int
    told_at_once: int
    """That there was no room for them, and no place in line."""
    died: list[str]
    """In the middle, or after they were given a place."""
    longest_wait_seconds: float


def crowd(
    connect: Connect, expected: Expected, *, texts: int, shortest: int, longest: int, new_tokens: int,
    arrival_seconds: float, seed: int,
) -> Crowded:  # fmt: skip
    """Texts of random lengths, each from a client of its own, that come within `arrival_seconds`."""
    generator = random.Random(seed)
    asked = [(generator.uniform(0, arrival_seconds), generator.randint(shortest, longest)) for _ in range(texts)]
    began = time.monotonic()

    def run(place: int, delay: float, length: int) -> tuple[str, bool, float]:
        time.sleep(max(0.0, began + delay - time.monotonic()))
        prompt = [(place * 31 + step * 7) % 250 for step in range(length - new_tokens)]
        engine = connect()
        came = time.monotonic()
        try:
            with engine.open([], GREEDY, length) as text:
                waited = time.monotonic() - came
                said: list[int] = []
                step = engine.extend([(text, prompt)], "last")[0]
                while len(said) < new_tokens:
                    said.append(step.next_ids[-1])
                    if len(said) < new_tokens:
                        step = engine.extend([(text, said[-1:])], "last")[0]
            return "", said == expected(prompt, new_tokens), waited
        except CacheFull as full:
            return ("full" if "already wait in line" in str(full) else f"{length} tokens: {full}"), True, 0.0
        except Exception as error:
            return f"{length} tokens: {type(error).__name__}: {error}", True, 0.0
        finally:
            engine.shutdown()

    with ThreadPoolExecutor(texts) as pool:
        came = [pool.submit(run, place, *one) for place, one in enumerate(asked)]
        ends = [one.result() for one in came]
    return Crowded(
        texts=texts,
        finished=sum(not end for end, _, _ in ends),
        differing=sum(not same for _, same, _ in ends),
        told_at_once=sum(end == "full" for end, _, _ in ends),
        died=[end for end, _, _ in ends if end not in ("", "full")],
        longest_wait_seconds=max(waited for _, _, waited in ends),
    )


# Clients that leave


@dataclass(frozen=True)
class Left:
    """What was computed for clients that had left."""

    clients: int
    ways: dict[str, int]
    passes: int
    """Of all shards."""
    first_passes_after: int
    """Passes that were begun next after a client had left, and had a row of it."""
    later_passes_after: int
    """Passes that came after those, and had a row of it: none may."""


@dataclass
class Watch:
    """Every pass of a shard: when it began, and for whom."""

    passes: list[tuple[float, set[Hashable]]] = field(default_factory=list)

    @contextlib.contextmanager
    def over(self, shard: Shard) -> Iterator[None]:
        forward = shard.forward

        def watched(keys: Sequence[Any], entering: Any) -> Any:
            self.passes.append((time.monotonic(), {client for client, _ in keys}))
            return forward(keys, entering)

        shard.forward = watched  # type: ignore[method-assign]
        try:
            yield
        finally:
            del shard.forward  # type: ignore[method-assign]

    def after(self, client: int, left: float) -> tuple[int, int]:
        """Of the passes begun after that moment: whether the first has a row of the client, and how many later ones."""
        later = [client in clients for began, clients in self.passes if began > left]
        return sum(later[:1]), sum(later[1:])


WAYS = ("all closed", "all reset", "all half-closed", "one closed", "one reset", "one half-closed")


def leave(chain: TcpChain, way: str, generator: random.Random) -> tuple[float, list[int]]:
    """End a client's connections; when that was done, and at which shards."""
    places = list(range(len(chain._lines)))
    if way.startswith("one"):
        places = [generator.choice(places)]
    for place in places:
        connected = chain._lines[place].socket._socket
        with contextlib.suppress(OSError):  # the shards have ended it before
            if way.endswith("half-closed"):
                connected.shutdown(socket.SHUT_WR)
                continue
            if way.endswith("reset"):
                connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            chain._lines[place].close()
    return time.monotonic(), places


def leave_at_random(
    connect: Callable[[], TcpChain], shards: Sequence[Shard], *, clients: int, at_once: int, seed: int
) -> Left:
    """Clients that ask for many passes and leave at a random moment, some of them always at work."""
    watches = [Watch() for _ in shards]
    leaves: list[tuple[int, float, list[int]]] = []
    ways: Counter[str] = Counter()

    def run(place: int) -> None:
        generator = random.Random(seed * 1000 + place)
        way = WAYS[place % len(WAYS)]
        chain = connect()
        try:
            chain.send(0, Message(1, _open(64)))
            until = time.monotonic() + generator.uniform(0.0, 0.05)
            _flood(chain, until, generator)
            moment, places = leave(chain, way, generator)
            leaves.append((chain.client, moment, places))
            ways[way] += 1
            time.sleep(0.02)  # half-closed ones are still there, and say nothing
        except ShardLost as error:
            raise AssertionError("a client was lost before it left") from error
        finally:
            chain.shutdown()

    with contextlib.ExitStack() as stack:
        for watch, shard in zip(watches, shards, strict=True):
            stack.enter_context(watch.over(shard))
        with ThreadPoolExecutor(at_once) as pool:
            for done in [pool.submit(run, place) for place in range(clients)]:
                done.result()
        time.sleep(0.1)
    found = [watches[place].after(client, moment) for client, moment, places in leaves for place in places]
    return Left(
        clients=len(leaves),
        ways=dict(ways),
        passes=sum(len(watch.passes) for watch in watches),
        first_passes_after=sum(first for first, _ in found),
        later_passes_after=sum(later for _, later in found),
    )


def _flood(chain: TcpChain, until: float, generator: random.Random) -> None:
    """Passes one after the other without waiting for their steps."""
    number, position = 2, 0
    while time.monotonic() < until:
        count = generator.randint(1, 6)
        position = position if position + count <= 64 else 0
        run = Pass(read_all=False, pieces=[_piece(1, position, count)])
        chain.send(0, Message(number, run, pack_tokens([generator.randrange(200) for _ in range(count)])))
        number, position = number + 1, position + count
        time.sleep(0.0005)
