"""Clients in numbers at two shards: a fault has one owner, room that is promised is there, who left is not served."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lab.command.entry import compose_settings
from lab.engine.kv import CacheFull
from lab.engine.not_finite import NotFinite
from lab.settings import ModelSettings, UserError
from lab.wire.faults import PeerRefused
from lab.wire.frame_socket import FrameSocket
from lab.wire.frames import encode
from lab.wire.tokens import pack_tokens
from split.chain.boundary import Boundary
from split.chain.messages import Attach, Join, send
from split.inference.messages import MAX_PIECES, Pass, Piece, table
from split.inference.open import load_stage
from split.inference.shard import Shard
from split.inference.sharded_model import ShardedModel, _PendingOpen
from split.inference.stage import InferenceStage
from split.settings import SplitSettings
from split.transport.base import Message, ShardLost, To
from tests.split.chains import CONTEXT, LIMITS, SAMPLED, VOCABULARY, inprocess, saved_model, shards, some_ids
from tests.split.inference.crowd import (
    GREEDY,
    WAYS,
    Expected,
    Wrongdoer,
    crowd,
    leave,
    leave_at_random,
    misuse,
    text_of,
)
from tests.split.processes import Process, chain, endpoint

CUTS = (0, 2, 4)
BYTES_PER_POSITION = 2 * 2 * 2 * 8 * 4
"""Of two layers."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> ModelSettings:
    return saved_model("llama", tmp_path_factory.mktemp("model"))


@contextmanager
def two(settings: ModelSettings, *, most_waiting: int = 8, **limits: Any) -> Iterator[list[Process]]:
    made = shards(settings, CUTS, replace(LIMITS, **limits))
    with ExitStack() as stack:
        yield [stack.enter_context(Process(shard, most_waiting=most_waiting)) for shard in made]


def engine_of(two: Sequence[Process], line_seconds: float = 0.0) -> ShardedModel:
    return ShardedModel(
        chain([process.address for process in two]), vocabulary_size=VOCABULARY, context=CONTEXT, prefill_chunk=7,
        recovery_seconds=0.0, line_seconds=line_seconds,
    )  # fmt: skip


def model(settings: ModelSettings) -> Expected:
    lock = threading.Lock()
    engine = inprocess(settings, (0, 4))

    @cache
    def known(prompt: tuple[int, ...], new_tokens: int) -> list[int]:
        with lock:
            return text_of(engine, prompt, new_tokens)

    return lambda prompt, new_tokens: known(tuple(prompt), new_tokens)


def eventually(what: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert what()


def is_empty(process: Process) -> bool:
    stage = process.server.stage
    return not (process.server.clients or stage._requests or stage.shard._requests or process.server._line)


# A fault has one owner


def test_every_wrong_request_ends_itself_only(settings: ModelSettings) -> None:
    with two(settings, sessions=8) as both:
        joined = chain([process.address for process in both])
        wrongdoer = Wrongdoer(joined, both[1].address, endpoint("client"), VOCABULARY, 32)
        kinds = len(wrongdoer.kinds())
        came = misuse(wrongdoer, lambda: engine_of(both), model(settings), requests=2 * kinds, good=2)
        assert came.unanswered == []
        assert len(came.requests) == kinds
        assert came.good_texts >= 2
        assert came.differing == 0
        joined.shutdown()
        for process in both:
            eventually(lambda process=process: is_empty(process))  # type: ignore[misc]
        counts = [process.server.stage.counts for process in both]
    assert all(count.failed and count.tokens for count in counts)
    assert counts[0].refused == 2 * 3


MARKED = 251


def _fail_at(shard: Shard, error: Exception) -> None:
    """Let the first layer of a shard raise where a hidden state stands that only the marked id gives."""

    def fail(module: Any, given: tuple[Tensor, ...]) -> None:
        if bool((given[0].abs() > 1e6).any()):
            raise error

    shard._model.get_decoder().layers[shard.layers.start].register_forward_pre_hook(fail)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("error", [RuntimeError("of torch"), MemoryError()])
def test_an_exception_of_the_model_ends_the_text_that_caused_it(
    settings: ModelSettings, place: int, error: Exception
) -> None:
    made = shards(settings, CUTS, replace(LIMITS, sessions=8))
    with torch.no_grad():
        made[0]._model.get_input_embeddings().weight[MARKED] = 1e8
    _fail_at(made[place], error)
    with Process(made[0]) as one, Process(made[1]) as other:
        engine, neighbour = engine_of([one, other]), engine_of([one, other])
        clean = [neighbour.open(some_ids(9, seed), SAMPLED) for seed in (1, 2)]
        said = [neighbour.extend([(text, [3])], "last")[0] for text in clean]
        texts = [engine.open(some_ids(9, seed), SAMPLED) for seed in (1, 2, 5)]
        with pytest.raises(
            NotFinite, match=f"{type(error).__name__}: .* in the shard of layers {made[place].layers.start}"
        ):
            engine.extend([(texts[0], [3]), (texts[2], [4, MARKED]), (texts[1], [3])], "last")
        assert [text.step and text.step.next_ids for text in texts[:2]] == [step.next_ids for step in said]
        assert (texts[0].fault, texts[1].fault) == ("", "")
        with pytest.raises(ValueError, match="session must be sound"):
            engine.extend([(texts[2], [1])], "last")
        texts[2].close()
        after = engine.extend([(texts[0], [5]), (texts[1], [6])], "last")
        alone = [neighbour.extend([(text, [token])], "last")[0] for text, token in zip(clean, (5, 6), strict=True)]
        assert [step.next_ids for step in after] == [step.next_ids for step in alone]
        engine.shutdown()
        neighbour.shutdown()


def test_hundreds_of_texts_that_stop_in_one_pass_fit_its_head(
    settings: ModelSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their reasons get shorter; a frame that is too large would end the client."""
    monkeypatch.setattr("split.inference.stage._one_line", lambda error: "\N{SNOWMAN}" * 300)
    stage = InferenceStage(shards(settings, CUTS)[0], Boundary.float32)
    last = 2**32 - 1
    pieces = [
        Piece(session=last - place, position=2**31 - 1, count=1, is_first=True, is_last=True)
        for place in range(MAX_PIECES)
    ]
    [(_, answer)] = stage.take(Message(1, Pass(read_all=False, pieces=pieces), pack_tokens([1] * MAX_PIECES)))
    assert isinstance(answer.head, Pass)
    assert len(answer.head.stopped) == MAX_PIECES
    frames = table(2**26)
    assert encode(frames, frames.number(answer.head), 1, answer.head, answer.body)


def test_a_result_that_no_frame_holds_is_told_to_its_client_only(settings: ModelSettings) -> None:
    with two(settings) as both:
        for process in both:
            object.__setattr__(process.server.endpoint.limits, "payload_bytes", 2000)
        engine, neighbour = engine_of(both), engine_of(both)
        engine._chunk = 64
        text = neighbour.open([1, 2, 3], GREEDY)
        with pytest.raises(RuntimeError, match=r"network.max_frame_bytes must be at least .* 8064 bytes, got 2000"):
            engine.open([1] * 64, GREEDY)
        assert engine.open([1] * 5, GREEDY).step is not None
        assert neighbour.extend([(text, [1])], "last")
        engine.shutdown()
        neighbour.shutdown()


def test_a_model_that_cannot_run_is_refused_before_it_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = f"model=random 'model.cache_dir={tmp_path}' tracking=none project.context=64"
    split = compose_settings("split_inf", words, SplitSettings)
    stage = load_stage(split, torch.device("cpu"), range(0, 2))
    assert not stage.shard._requests
    assert stage.counts.texts == stage.counts.tokens == 0

    def fail(*given: Any) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(Shard, "_run_slice", fail)
    with pytest.raises(
        UserError, match=r"^model must run two tokens through the shard of layers 0:2: RuntimeError: no k"
    ):
        load_stage(split, torch.device("cpu"), range(0, 2))


# Room that is promised is there


def test_texts_that_do_not_fit_together_wait_and_none_dies(settings: ModelSettings) -> None:
    """A small place behind a large one: each shard sees the texts in an order of its own, and holds others than it."""
    made = [
        shards(settings, CUTS, replace(LIMITS, sessions=sessions, bucket=8, kv_limit_bytes=100 * BYTES_PER_POSITION))
        for sessions in (3, 2)
    ]
    with Process(made[0][0]) as one, Process(made[1][1]) as other:
        came = crowd(
            lambda: engine_of([one, other], line_seconds=60.0), model(settings), texts=8, shortest=10, longest=96,
            new_tokens=4, arrival_seconds=0.05, seed=3,
        )  # fmt: skip
    assert came.died == []
    assert came.finished + came.told_at_once == 8
    assert came.finished >= 4
    assert came.differing == 0
    assert came.longest_wait_seconds > 0


def test_a_line_has_an_end_and_an_order(
    settings: ModelSettings, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("split.inference.server.CHECK_SECONDS", 1000.0)
    with two(settings, sessions=1, most_waiting=2) as both:
        engines = [engine_of(both) for _ in range(4)]
        held = engines[0].open([1], GREEDY)
        for place, engine in enumerate(engines[1:3], start=1):
            with pytest.raises(CacheFull, match=f"no room for 200 tokens now: place {place} in line"):
                engine.open([1], GREEDY)
        with pytest.raises(CacheFull, match="2 requests already wait in line, which is the most"):
            engines[3].open([1], GREEDY)
        assert held.step is not None
        engines[0].extend([(held, held.step.next_ids)], "last")
        with pytest.raises(CacheFull, match="place 2 in line"):  # it has kept its place, and so has the other
            engines[2].open([1], GREEDY)
        held.close()
        eventually(lambda: _admitted(engines[1]))
        with pytest.raises(CacheFull, match="place 1 in line"):
            engines[2].open([1], GREEDY)
        second = engines[1].open([1], GREEDY)
        assert second.step is not None
        engines[1].shutdown()  # it leaves: its room is the next one's
        eventually(lambda: bool(engines[2]._journals) or _gets_room(engines[2]))
        for engine in (engines[0], engines[2], engines[3]):
            engine.shutdown()
        for process in both:
            eventually(lambda process=process: is_empty(process))  # type: ignore[misc]
    assert "place 1 in line" in caplog.text


def test_what_will_never_fit_is_refused_before_it_waits(settings: ModelSettings) -> None:
    """Our clients know what fits; others may ask for anything."""
    with two(settings, sessions=1) as both:
        engines = [engine_of(both) for _ in range(3)]
        engines[0].open([1], GREEDY)
        with pytest.raises(CacheFull, match="place 1 in line"):
            engines[1].open([1], GREEDY)
        asked = engines[2]._ask(_PendingOpen(1, GREEDY, 10**6, 0.0))
        engines[2]._await_room(asked, 0.0)
        assert asked.fault is not None
        assert asked.fault.text == "tokens must be at most the 200 that fit here, prompt included, got 1000000"
        for engine in engines:
            engine.shutdown()


def test_a_short_text_does_not_overtake_a_long_one(settings: ModelSettings) -> None:
    with two(settings, bucket=8, kv_limit_bytes=100 * BYTES_PER_POSITION) as both:
        engines = [engine_of(both) for _ in range(3)]
        held = engines[0].open([1], GREEDY, 40)
        for place, (engine, tokens) in enumerate(zip(engines[1:], (90, 8), strict=True), start=1):
            with pytest.raises(CacheFull, match=f"for {tokens} tokens now: place {place} in line"):
                engine.open([1], GREEDY, tokens)
        held.close()
        eventually(lambda: _admitted(engines[1]))
        engines[1].open([1], GREEDY, 90)
        for engine in engines:
            engine.shutdown()


def _admitted(engine: ShardedModel) -> bool:
    with suppress(TimeoutError):
        engine._note(engine._transport.collect(0.0))
    return any(asked.place == 0 for asked in engine._pending.values())


def _gets_room(engine: ShardedModel) -> bool:
    try:
        return engine.open([1], GREEDY).step is not None
    except CacheFull:
        return False


def test_who_holds_room_does_not_wait_for_more(settings: ModelSettings) -> None:
    """Two clients that each hold one of two places and want both would wait for ever."""
    with two(settings, sessions=2) as both:
        engines = [engine_of(both, line_seconds=60.0) for _ in range(2)]
        held = [engine.open([1], GREEDY) for engine in engines]
        for engine in engines:
            with pytest.raises(CacheFull, match="in line"):
                engine.open([2], GREEDY)
        for engine, text in zip(engines, held, strict=True):
            engine.extend([(text, [5])], "last")
            engine.shutdown()


def test_room_that_nobody_takes_up_goes_to_who_waits(settings: ModelSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("split.inference.shard.UNUSED_SECONDS", 0.2)
    monkeypatch.setattr("split.inference.server.CHECK_SECONDS", 0.05)
    with two(settings, sessions=1) as both:
        idle, waits = engine_of(both), engine_of(both, line_seconds=30.0)
        text = idle.open([], GREEDY)
        other = waits.open([1], GREEDY)
        assert other.step is not None
        other.close()
        assert idle.extend([(text, [1])], "last")[0].next_ids == other.step.next_ids  # rebuilt
        idle.shutdown()
        waits.shutdown()


def test_who_leaves_the_line_frees_its_places_however_it_leaves(settings: ModelSettings) -> None:
    """Each waits at the second shard and holds room at the first; all their requests have the same number."""
    made = [shards(settings, CUTS, replace(LIMITS, sessions=sessions))[place] for place, sessions in ((0, 8), (1, 1))]
    own, generator = model(settings), random.Random(3)
    with Process(made[0]) as one, Process(made[1]) as other, ThreadPoolExecutor(1) as pool:
        holder = engine_of([one, other])
        for way in WAYS:
            text = holder.open([5, 7], GREEDY)
            waiters = [engine_of([one, other]) for _ in range(5)]
            for engine in waiters:
                with pytest.raises(CacheFull, match="in line"):
                    engine.open([1], GREEDY)
                assert list(engine._pending) == [1]
            last = engine_of([one, other], line_seconds=60.0)
            expected = pool.submit(text_of, last, [9, 8], 6)
            eventually(lambda: len(other.server._line) == 6)
            for engine in waiters:
                leave(engine._transport, way, generator)  # type: ignore[arg-type]  # a TcpChain
            eventually(lambda: len(other.server._line) == 1 and len(made[0]._requests) == 2)
            assert text.step is not None
            assert holder.extend([(text, text.step.next_ids)], "last")[0].next_ids == own([5, 7], 2)[1:]
            text.close()
            assert expected.result(20) == own([9, 8], 6)
            for engine in (last, *waiters):
                engine.shutdown()
        holder.shutdown()
        for process in (one, other):
            eventually(lambda process=process: is_empty(process))  # type: ignore[misc]


@pytest.mark.parametrize("recovery_seconds", [60.0, 0.0])
def test_a_lost_text_waits_until_a_full_line_has_a_place(
    settings: ModelSettings, monkeypatch: pytest.MonkeyPatch, recovery_seconds: float
) -> None:
    """A new text is told at once that the line is full; one that has begun asks again as long as it may."""
    monkeypatch.setattr("split.inference.server.CHECK_SECONDS", 1000.0)
    monkeypatch.setattr("split.inference.sharded_model.REGAIN_SECONDS", 0.02)
    clock = [0.0]
    with two(settings, sessions=1, most_waiting=1) as both, ThreadPoolExecutor(1) as pool:
        for process in both:
            process._shard._clock = lambda: clock[0]
        loser, taker, waiter = (engine_of(both) for _ in range(3))
        loser._recovery_seconds = recovery_seconds
        text = loser.open([1, 2], GREEDY)
        clock[0] += 2 * LIMITS.idle_seconds
        taken = taker.open([1], GREEDY)  # in the room of the first, which is idle
        with pytest.raises(CacheFull, match="place 1 in line"):
            waiter.open([1], GREEDY)
        extended = pool.submit(loser.extend, [(text, [3])], "last")
        counts = both[0].server.stage.counts
        if recovery_seconds:
            eventually(lambda: counts.refused > 2)
        else:
            with pytest.raises(NotFinite, match=r"no room for it now .*1 requests already wait in line"):
                extended.result(20)
        taken.close()
        eventually(lambda: _admitted(waiter))
        waiter.open([1], GREEDY).close()
        if recovery_seconds:
            assert extended.result(20)[0].next_ids == text_of(inprocess(settings, (0, 4)), [1, 2, 3], 1)
        for engine in (loser, taker, waiter):
            engine.shutdown()


# Who left is not served


def test_nobody_computes_for_a_client_that_left(settings: ModelSettings) -> None:
    with two(settings, sessions=16) as both:
        addresses = [process.address for process in both]
        came = leave_at_random(
            lambda: chain(addresses), [process._shard for process in both], clients=24, at_once=4, seed=5
        )
        for process in both:
            eventually(lambda process=process: is_empty(process))  # type: ignore[misc]
            assert not any(process.server.stage.shard.cache.lengths)
            assert process.server.attached == 24
            assert process.server.stage.counts.left == process.server.stage.counts.texts
    assert came.later_passes_after == 0
    assert came.passes > 24
    assert len(came.ways) == 6


def test_a_client_whose_next_shard_never_answers_is_not_waited_for(settings: ModelSettings) -> None:
    """The listener behind takes the connection and says nothing; the client leaves."""
    with two(settings) as both, socket.create_server(("127.0.0.1", 0)) as silent:
        where = f"127.0.0.1:{silent.getsockname()[1]}"
        with FrameSocket.connect("127.0.0.1", both[0].address.port, endpoint("client"), tls=None) as peer:
            head = Attach(client=7, next=[where], next_instance=1)
            send(peer, 0, head)
            eventually(lambda: bool(both[0].server.clients))
        eventually(lambda: not both[0].server.clients, 4.0)  # less than the silent one may take for its handshake
        with FrameSocket.connect("127.0.0.1", both[0].address.port, endpoint("client"), tls=None) as peer:
            head = Attach(client=8, next=["nowhere"], next_instance=1)
            send(peer, 0, head)
            with pytest.raises(PeerRefused, match="an address that must be host:port, got 'nowhere'"):
                peer.recv()


def test_a_lost_link_ends_the_client_at_every_shard(settings: ModelSettings) -> None:
    """Between two shards only: its connections to both were sound."""
    with two(settings) as both:
        engine = engine_of(both)
        text = engine.open([1, 2], GREEDY)
        [client] = both[0].server.clients.values()
        both[0].server.loop.call_soon_threadsafe(client.connections[To.next].close)
        for process in both:
            eventually(lambda process=process: is_empty(process))  # type: ignore[misc]
        with pytest.raises(ShardLost):
            engine.extend([(text, [1])], "last")
        engine.shutdown()


def test_a_second_chain_for_the_same_client_is_refused(settings: ModelSettings) -> None:
    with two(settings) as both:
        engine = engine_of(both)
        text = engine.open([1, 2], GREEDY)
        [key] = both[1].server.clients
        with FrameSocket.connect("127.0.0.1", both[1].address.port, endpoint("client"), tls=None) as peer:
            send(peer, 0, Join(client=key))
            with pytest.raises(PeerRefused, match="joined already"):
                peer.recv()
        assert engine.extend([(text, [1])], "last")
        engine.shutdown()
