"""Hostile peers at a shard: without the key, and with it frames that make no sense; a client goes on beside them."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from pathlib import Path

import torch

from lab.wire import Fingerprints, FrameSocket, Head, WireError
from lab.wire.frames import HEADER, MAGIC
from split.messages import Ask, Attach, Close, Join, Open, Pass, Piece, message_type
from tests.split.chains import SAMPLED, as_engine, inprocess, saved_model, shards, some_ids
from tests.split.processes import FINGERPRINTS, Process, chain, endpoint

KEY = b"k" * 32
FRAMES = 150


def _random_head(generator: random.Random) -> Head:
    number = generator.randrange(2**31)
    piece = Piece(
        session=generator.randrange(3), position=generator.choice([0, number]), count=2, is_first=True, is_last=True
    )
    return generator.choice(
        [
            Open(seed=number, temperature=0.0, top_k=0, top_p=1.0),
            Close(),
            Pass(read_all=generator.random() < 0.5, pieces=[piece] * generator.randrange(1, 3)),
            Join(client=number),
            Attach(client=generator.randrange(3), next=["127.0.0.1:1"], next_instance=0),
            Ask(),
        ]
    )


def _attack(port: int, generator: random.Random, names: Fingerprints) -> int:
    """One hostile connection; returns how many frames it got rid of."""
    if generator.random() < 0.4:  # bytes without a handshake
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
            header = HEADER.pack(MAGIC, 1, generator.randrange(256), 0, 0, generator.choice([0, 2**32 - 1]))
            raw.sendall(generator.choice([generator.randbytes(64), header + generator.randbytes(32)]))
        return 1
    sent = 0
    with contextlib.suppress(WireError), FrameSocket.connect(
        "127.0.0.1", port, endpoint("client", KEY, names), tls=None
    ) as peer:  # fmt: skip
        first = Attach(client=generator.randrange(3), next=[], next_instance=0)
        for head in [first, *(_random_head(generator) for _ in range(generator.randrange(1, 8)))]:
            body = generator.randbytes(generator.choice([0, 8, 256])) if isinstance(head, Pass) else b""
            peer.send(message_type(head), generator.randrange(4), head, body)
            sent += 1
        peer.poll(0.02)
    return sent


def test_hostile_frames_hurt_nobody_else(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    settings = saved_model("llama", tmp_path)
    generator = random.Random(4)
    whole = inprocess(settings, (0, 4))
    keyed = endpoint("shard", key=KEY)
    made = shards(settings, (0, 2, 4))
    with Process(made[0], ours=keyed) as one, Process(made[1], ours=keyed) as two:
        engine = as_engine(chain([one.address, two.address], key=KEY))
        with engine.open(some_ids(9, 1), SAMPLED) as text, whole.open(some_ids(9, 1), SAMPLED) as right:
            sent = 0
            while sent < FRAMES:
                sent += _attack(generator.choice([one, two]).address.port, generator, FINGERPRINTS)
                assert text.step == right.step
                if text.position < 150 and text.step is not None:
                    ids = text.step.next_ids
                    engine.extend([(text, ids)], "last")
                    whole.extend([(right, ids)], "last")
        deadline = time.monotonic() + 10
        while len(one.server._clients) > 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(one.server._clients) == 1, "hostile clients are still there"
        engine.shutdown()
