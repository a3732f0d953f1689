"""Hostile peers at shard processes: one function for a few frames in `test` and 100,000 in `soak`."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lab.engine.sampling import Sampling
from lab.engine.sampling_head import sampling_fields
from lab.wire.endpoint import Endpoint
from lab.wire.faults import WireError
from lab.wire.frame_socket import FrameSocket
from lab.wire.frames import HEADER, MAGIC, Head
from split.chain.messages import Ask, Attach, Join, send
from split.inference.messages import Close, Open, Pass, Piece
from split.inference.sharded_model import ShardedModel

KEY = b"k" * 32
GREEDY = Sampling.greedy()
TEXT_TOKENS = 120


@dataclass(frozen=True)
class Attacked:
    """What hostile peers did."""

    frames: int
    connections: int
    refused: int
    """Connections with a wrong key that were refused."""
    tokens: int
    """Of a text that a client with the key went on with between attacks."""
    same_tokens: bool


def attack(
    ports: list[int],
    ours: Endpoint,
    engine: ShardedModel,
    expected: Callable[[int], list[int]],
    *,
    frames: int,
    seed: int,
) -> Attacked:
    """Attack shards in turn until `frames` frames went there, and let a client go on all the time.

    Args:
        ports: Where the shards listen.
        ours: A client's side of the wire, with the right key and fingerprints.
        engine: A client of the same shards.
        expected: The first n tokens of the text [1, 2, 3], greedy.
        frames: At least so many.
        seed: Of everything drawn.
    """
    generator = random.Random(seed)
    sent = connections = refused = 0
    said: list[int] = []
    text = engine.open([1, 2, 3], GREEDY)
    wrong = replace(ours, key=b"w" * 32)
    while sent < frames:
        port = generator.choice(ports)
        kind = generator.random()
        if kind < 0.1:
            with contextlib.suppress(OSError):
                _raw_bytes(port, generator)
            sent += 1
        elif kind < 0.2:
            try:
                FrameSocket.connect("127.0.0.1", port, wrong, tls=None).close()
            except WireError:
                refused += 1
            sent += 1
        else:
            sent += _with_the_key(port, ours, generator)
        connections += 1
        assert text.step is not None
        if connections % 3 == 0:
            if said and len(said) % TEXT_TOKENS == 0:
                text.close()
                text = engine.open([1, 2, 3], GREEDY)
                assert text.step is not None
            said += text.step.next_ids
            engine.extend([(text, text.step.next_ids)], "last")
    text.close()
    whole = expected(TEXT_TOKENS)
    begins = range(0, len(said), TEXT_TOKENS)
    same = all(said[begin : begin + TEXT_TOKENS] == whole[: len(said) - begin] for begin in begins)
    return Attacked(sent, connections, refused, len(said), same)


def _raw_bytes(port: int, generator: random.Random) -> None:
    """Bytes without a handshake: noise, or a header with a length bomb."""
    header = HEADER.pack(MAGIC, 1, generator.randrange(256), 0, 0, generator.choice([0, 2**32 - 1]))
    with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
        raw.sendall(generator.choice([generator.randbytes(64), header + generator.randbytes(32)]))


def _with_the_key(port: int, ours: Endpoint, generator: random.Random) -> int:
    """A peer that has the key and makes no sense; returns how many frames it got rid of."""
    sent = 0
    with contextlib.suppress(WireError), FrameSocket.connect("127.0.0.1", port, ours, tls=None) as peer:
        first: Head = Attach(client=generator.randrange(2**40), next=[], next_instance=0)
        if generator.random() < 0.3:
            first = _random_head(generator)
        for head in [first, *(_random_head(generator) for _ in range(generator.randrange(1, 60)))]:
            body = generator.randbytes(generator.choice([0, 8, 256])) if isinstance(head, Pass) else b""
            send(peer, generator.randrange(4), head, body)
            sent += 1
        peer.poll(0.002)
    return sent


def _random_head(generator: random.Random) -> Head:
    number = generator.randrange(2**31)
    piece = Piece(
        session=generator.randrange(3), position=generator.choice([0, number]), count=2, is_first=True, is_last=True
    )
    if generator.random() < 0.02:  # what ends a connection
        address: Any = ["127.0.0.1:1"]
        return generator.choice([Join(client=number), Attach(client=number, next=address, next_instance=0)])
    return generator.choice(
        [
            Open(tokens=1 + number % 2048, **sampling_fields(GREEDY)),
            Close(),
            Pass(read_all=generator.random() < 0.5, pieces=[piece] * generator.randrange(1, 3)),
            Ask(),
        ]
    )
