"""Split training over real sockets: the steps are those in one process, a lost shard comes back, strangers stay out."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest
import torch

from lab.settings import Dtype
from lab.wire.faults import WrongKey
from lab.wire.frame_socket import FrameSocket
from lab.wire.tensors import TensorSpec, WireDtype
from split.chain.messages import Attach, Fault, send
from split.training.messages import Hidden, Start, Step, Tokens
from split.training.schedule import Schedule
from split.transport.base import Message, ShardLost
from tests.split.training.processes import Learner, connect, connected, endpoint, learners_of, over_tcp
from tests.split.training.unsplit import (
    ADAPTER,
    BANDS,
    Unsplit,
    gradients_of,
    in_process,
    model_settings,
    some_examples,
    trainer,
    worst,
)

CUTS = (0, 1, 3, 4)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("tied", [False, True])
def test_steps_are_those_in_one_process_to_the_bit(schedule: Schedule, tied: bool, tmp_path: Path) -> None:
    settings = model_settings(tmp_path, tied=tied)
    here = trainer(in_process(settings, CUTS, tmp_path / "a"), tmp_path / "a", micro_batches=4, schedule=schedule)
    with over_tcp(settings, CUTS, tmp_path / "b") as transport:
        there = trainer(transport, tmp_path / "b", micro_batches=4, schedule=schedule)
        for _ in range(5):
            one, other = here.train_step(), there.train_step()
            assert one.loss == other.loss
            assert one.gradient_norm == other.gradient_norm
            assert other.held == ([4, 4, 4] if schedule is Schedule.gpipe else [3, 2, 1])


@pytest.mark.parametrize("cuts", [(0, 2, 4), CUTS])
@pytest.mark.parametrize("dtype", BANDS)
def test_gradients_are_those_of_the_whole_model(cuts: Sequence[int], dtype: Dtype, tmp_path: Path) -> None:
    """Of every parameter: to the bit with one micro-batch, within the band with four."""
    settings = model_settings(tmp_path, dtype)
    with learners_of(settings, cuts, tmp_path) as learners, connected(learners) as transport:
        for micro_batches, band in ((1, 0.0), (4, BANDS[dtype])):
            made = trainer(transport, tmp_path, micro_batches=micro_batches, schedule=Schedule.one_f_one_b)
            found = gradients_of(made, [learner.stage for learner in learners])
            assert worst(found, Unsplit(settings, micro_batches=micro_batches).gradients()) <= band


def test_200_steps_are_those_of_the_whole_model_to_the_bit(tmp_path: Path) -> None:
    settings = model_settings(tmp_path)
    with over_tcp(settings, (0, 2, 4), tmp_path) as transport:
        made = trainer(transport, tmp_path, total_steps=200)
        assert [made.train_step().loss for _ in range(200)] == [f.loss for f in Unsplit(settings).train(200, 200)]


def test_what_crosses_is_little_more_than_activations_and_gradients(tmp_path: Path) -> None:
    settings = model_settings(tmp_path)
    with over_tcp(settings, (0, 2, 4), tmp_path) as transport:
        made = trainer(transport, tmp_path, examples=some_examples(equal=True))
        payload = 2 * 4 * 20 * 32 * 4  # both ways, B x T x H in float32
        assert payload < made.train_step().boundary_bytes <= 1.01 * payload


def test_a_shard_that_is_lost_comes_back_and_nothing_is_counted_twice(tmp_path: Path) -> None:
    """It goes in the middle of a step, after step 3 was taken and step 2 was saved."""
    settings = model_settings(tmp_path)
    whole = [figures.loss for figures in Unsplit(settings).train(8, 8)]
    with Learner(settings, range(0, 2), tmp_path) as first:
        second = Learner(settings, range(2, 4), tmp_path).__enter__()
        transport = connect([first.address, second.address])
        made = trainer(transport, tmp_path)
        taken = []
        for _ in range(3):
            taken.append(made.train_step().step)
            if made.step == 2:
                assert made.save() is not None
        port = second.address.port
        second.stop()

        def replace_it() -> None:
            time.sleep(0.3)
            replacements.append(Learner(settings, range(2, 4), tmp_path, port=port).__enter__())

        replacements: list[Learner] = []
        helper = threading.Thread(target=replace_it)
        helper.start()
        while made.step < 8:
            taken.append(made.train_step().step)
        helper.join()
        assert taken == [0, 1, 2, 2, 3, 4, 5, 6, 7], "it goes on after the last valid step"
        assert made.losses == whole
        assert made.recoveries == 1
        transport.shutdown()
        replacements[0].stop()


def test_a_shard_that_is_lost_before_it_has_begun_comes_back(tmp_path: Path) -> None:
    settings = model_settings(tmp_path)
    with Learner(settings, range(0, 2), tmp_path) as first:
        lost = Learner(settings, range(2, 4), tmp_path).__enter__()
        transport = connect([first.address, lost.address])
        lost.stop()
        with Learner(settings, range(2, 4), tmp_path, port=lost.address.port):
            made = trainer(transport, tmp_path)
            assert made.recoveries == 1
            assert made.train_step().loss == Unsplit(settings).train(1, 1)[0].loss
            transport.shutdown()


def test_a_shard_that_does_not_come_back_ends_the_run(tmp_path: Path) -> None:
    settings = model_settings(tmp_path)
    with Learner(settings, range(0, 2), tmp_path) as first, Learner(settings, range(2, 4), tmp_path) as second:
        transport = connect([first.address, second.address])
        made = trainer(transport, tmp_path, recovery_seconds=0.5)
        made.train_step()
        second.stop()
        with pytest.raises(ShardLost, match="127"):
            made.train_step()
        transport.shutdown()


def test_a_stranger_and_a_second_trainer_stay_out(tmp_path: Path) -> None:
    settings = model_settings(tmp_path)
    with Learner(settings, range(0, 4), tmp_path, key=b"k" * 32) as learner:
        with pytest.raises(WrongKey):
            connect([learner.address], key=b"x" * 32)
        mine = connect([learner.address], key=b"k" * 32)
        made = trainer(mine, tmp_path)
        with pytest.raises(ShardLost, match="learns for another trainer"):
            connect([learner.address], key=b"k" * 32, start_seconds=0.3)
        assert made.train_step().step == 0, "and the first one goes on"
        mine.shutdown()


def test_a_trainer_that_leaves_in_the_middle_leaves_nothing_behind(tmp_path: Path) -> None:
    """In a step; and while the shard waits for a next one that takes the connection and says nothing."""
    settings = model_settings(tmp_path)
    with Learner(settings, range(0, 2), tmp_path) as first, Learner(settings, range(2, 4), tmp_path) as second:
        addresses = [first.address, second.address]
        leaving = connect(addresses)
        trainer(leaving, tmp_path).train_step()
        leaving.send(0, Message(1, Step(schedule=Schedule.gpipe, micro_batches=2, turns=1, tokens=3)))
        leaving.send(0, Message(1, Tokens(micro_batch=0, lengths=[3], columns=3), b"\0" * 12))
        _eventually(lambda: bool(first.stage.shard.held))
        leaving.shutdown()
        _eventually(lambda: not (first.stage.shard.held or first.stage._waiting))
        with socket.create_server(("127.0.0.1", 0)) as silent:
            where = f"127.0.0.1:{silent.getsockname()[1]}"
            ours = endpoint("trainer")
            with FrameSocket.connect(first.address.host, first.address.port, ours, tls=None) as peer:
                head = Attach(client=1, next=[where], next_instance=1)
                send(peer, 0, head)
                _eventually(lambda: list(first.server.clients) == [1])
            _eventually(lambda: not first.server.clients)
        other = connect(addresses)
        assert trainer(other, tmp_path).train_step().step == 0
        other.shutdown()


def test_a_next_shard_that_hangs_up_on_join_is_passed_over_and_its_reason_told(tmp_path: Path) -> None:
    settings = model_settings(tmp_path)
    with Learner(settings, range(0, 2), tmp_path) as first, Learner(settings, range(2, 4), tmp_path) as stale:
        where = [str(stale.address), "127.0.0.1:1"]
        with FrameSocket.connect(first.address.host, first.address.port, endpoint("trainer"), tls=None) as peer:
            send(peer, 0, Attach(client=1, next=where, next_instance=1))
            frame = peer.poll(5)
    assert frame is not None
    assert isinstance(frame.head, Fault)
    assert all(text in frame.head.text for text in (*where, "joined for a client that is not attached"))


def _eventually(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not what() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert what()


def test_what_makes_no_sense_is_refused_and_said(tmp_path: Path) -> None:
    settings = model_settings(tmp_path)
    with over_tcp(settings, (0, 2, 4), tmp_path) as transport:
        step = Step(schedule=Schedule.gpipe, micro_batches=1, turns=1, tokens=3)
        transport.send(0, Message(0, step))
        assert "START must come first" in _refusal(transport)
        recipe = msgspec.structs.replace(ADAPTER, lora_rank=2**20 - 1)
        transport.send(0, Message(0, Start(shard=0, shards=1, run="0" * 16, digest="", recipe=recipe)))
        assert "project.lora.rank must be at most 32" in _refusal(transport)
        made = trainer(transport, tmp_path)
        endless = Step(schedule=Schedule.gpipe, micro_batches=4096, turns=4096, tokens=3)
        transport.send(0, Message(0, endless))
        assert "micro-batches of a step must be at most 4096" in _refusal(transport)
        transport.send(0, Message(0, step))
        transport.send(0, Message(0, Tokens(micro_batch=0, lengths=[3], columns=3), b"\0" * 8))
        assert "a batch must hold 1 x 1 x 3 ids" in _refusal(transport)
        transport.send(0, Message(0, step))
        transport.send(0, Message(0, Tokens(micro_batch=0, lengths=[3], columns=3), b"\xff" * 12))
        assert "ids must be in [0, 264)" in _refusal(transport)
        transport.send(1, Message(0, step))
        transport.send(1, Message(0, Tokens(micro_batch=0, lengths=[3], columns=3), b"\0" * 12))
        wide = TensorSpec(dtype=WireDtype.float32, shape=[1, 3, 33])
        transport.send(1, Message(0, Hidden(micro_batch=0, lengths=[3], tensor=wide), b"\0" * (3 * 33 * 4)))
        assert "hidden states must be 1 x T x 32" in _refusal(transport)
        assert made.train_step().step == 0, "the shards are as they were"


def _refusal(transport: object) -> str:
    answer = transport.collect()  # type: ignore[attr-defined]
    assert isinstance(answer.head, Fault)
    return answer.head.text
