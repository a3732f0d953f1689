"""Hostile peers at a shard: without the key, and with it frames that make no sense; a client goes on beside them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lab.wire.faults import PeerRefused, WrongKey
from lab.wire.frame_socket import FrameSocket
from split.chain.messages import Ask, Attach, send
from split.inference.messages import Close
from split.inference.stage import InferenceStage
from tests.split.chains import as_engine, inprocess, saved_model, shards
from tests.split.inference.hostile import KEY, attack
from tests.split.inference.texts import greedy
from tests.split.processes import Process, chain, endpoint

FRAMES = 1500


@pytest.fixture
def two(tmp_path: Path) -> Iterator[list[Process]]:
    torch.set_num_threads(1)
    keyed = endpoint("shard", key=KEY)
    first, last = shards(saved_model("llama", tmp_path), (0, 2, 4))
    with Process(first, ours=keyed) as one, Process(last, ours=keyed) as other:
        yield [one, other]


def test_hostile_frames_hurt_nobody_else(two: list[Process], tmp_path: Path) -> None:
    engine = as_engine(chain([process.address for process in two], key=KEY))

    def expected(count: int) -> list[int]:
        return greedy(inprocess(saved_model("llama", tmp_path), (0, 4)), [1, 2, 3], count)

    ports = [process.address.port for process in two]
    came = attack(ports, endpoint("client", KEY), engine, expected, frames=FRAMES, seed=4)
    assert came.same_tokens
    assert came.tokens > 10
    assert came.refused > 0
    deadline = time.monotonic() + 10
    while len(two[0].server.clients) > 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(two[0].server.clients) == 1, "hostile clients are still there"
    engine.shutdown()


def test_a_peer_without_the_key_reaches_no_shard(two: list[Process], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a message nor a tensor of theirs is looked at; with the key both are."""
    taken: list[Any] = []
    take = InferenceStage.take
    monkeypatch.setattr(InferenceStage, "take", lambda *arguments: taken.append(arguments) or take(*arguments))
    port = two[1].address.port
    for key in (b"", b"w" * 32):
        with pytest.raises((WrongKey, PeerRefused)):
            FrameSocket.connect("127.0.0.1", port, endpoint("client", key), tls=None)
    assert not taken
    assert not two[1].server.clients
    with FrameSocket.connect("127.0.0.1", port, endpoint("client", KEY), tls=None) as peer:
        for head in (Attach(client=1, next=[], next_instance=0), Close(), Ask()):
            send(peer, 0, head)
        assert peer.poll(5) is not None
        assert peer.poll(5) is not None
        deadline = time.monotonic() + 5
        while not taken and time.monotonic() < deadline:
            time.sleep(0.01)
    assert taken
