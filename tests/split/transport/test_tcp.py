"""Shards behind real sockets: the same bits as the whole model, losses and spares, and who is refused."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from lab.engine.sampling import Sampling
from lab.link import CutKind, Link, LinkSettings
from lab.wire.faults import PeerMismatch, PeerRefused, WrongKey
from lab.wire.frame_socket import FrameSocket
from split.chain.address import Address
from split.chain.boundary import Boundary
from split.chain.messages import Attach, Fault, FaultCode, send
from split.inference import server as serving
from split.inference.coding import encode
from split.inference.sharded_model import ShardedModel
from split.inference.times import take_apart
from split.transport.base import ChainMismatch, ShardLost
from tests.logit_rules import samplings
from tests.shared import one_way
from tests.split.chains import SAMPLED, as_engine, inprocess, local, saved_model, shards, some_ids
from tests.split.inference.test_sharded_model import conversation
from tests.split.processes import Process, chain, endpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@contextlib.contextmanager
def _serving(tmp_path: Path, cuts: Sequence[int]) -> Iterator[list[Process]]:
    settings = saved_model("llama", tmp_path)
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Process(shard)) for shard in shards(settings, cuts)]


@contextlib.contextmanager
def _engine(*arguments: object, recovery_seconds: float = 0.0, **options: object) -> Iterator[ShardedModel]:
    engine = as_engine(chain(*arguments, **options), recovery_seconds)  # type: ignore[arg-type]
    try:
        yield engine
    finally:
        engine.shutdown()


@pytest.mark.parametrize("cuts", [(0, 4), (0, 1, 4), (0, 1, 2, 3, 4)])
def test_split_over_tcp_is_whole_bit_by_bit(cuts: tuple[int, ...], tmp_path: Path) -> None:
    with _serving(tmp_path, cuts) as processes, _engine([p.address for p in processes]) as engine:
        assert conversation(engine) == conversation(local(saved_model("llama", tmp_path)))


def test_two_clients_do_not_meet(tmp_path: Path) -> None:
    whole = local(saved_model("llama", tmp_path))
    with _serving(tmp_path, (0, 2, 4)) as processes:
        addresses = [p.address for p in processes]
        with _engine(addresses) as one, _engine(addresses) as other:
            texts = [engine.open(some_ids(9, seed), SAMPLED) for seed, engine in ((1, one), (2, other))]
            expected = [whole.open(some_ids(9, seed), SAMPLED) for seed in (1, 2)]
            for _ in range(4):
                for engine, text, right in zip((one, other), texts, expected, strict=True):
                    assert text.step == right.step
                    assert text.step is not None
                    engine.extend([(text, text.step.next_ids)], "last")
                    whole.extend([(right, text.step.next_ids[:0] or right.step.next_ids)], "last")  # type: ignore[union-attr]
        deadline = time.monotonic() + 5
        while any(p.server.stage._requests for p in processes) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not any(p.server.stage._requests for p in processes), "texts outlive their clients"


def _greedy(
    engine: ShardedModel, count: int, at: dict[int, object] | None = None, sampling: Sampling = SAMPLED
) -> list[int]:
    """Tokens of one text; `at[n]` is called before the n-th."""
    ids = []
    with engine.open(some_ids(11, 5), sampling) as text:
        for number in range(count):
            assert text.step is not None
            ids.append(text.step.next_ids[-1])
            if at and number in at:
                at[number]()  # type: ignore[operator]
            engine.extend([(text, ids[-1:])], "last")
    return ids


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_shard_that_is_replaced_at_its_address_changes_nothing(victim: int, tmp_path: Path) -> None:
    settings = saved_model("llama", tmp_path)
    expected = _greedy(inprocess(settings, (0, 4)), 20)
    with _serving(tmp_path, (0, 1, 3, 4)) as processes, contextlib.ExitStack() as stack:

        def restart() -> None:
            """Take it away, and bring up another in its place half a second later."""
            processes[victim].stop()
            port = processes[victim].address.port

            def begin() -> None:
                time.sleep(0.5)
                stack.enter_context(Process(shards(settings, (0, 1, 3, 4))[victim], port=port))

            threading.Thread(target=begin).start()

        with _engine([p.address for p in processes], recovery_seconds=20.0) as engine:
            assert _greedy(engine, 20, {9: restart}) == expected
            assert len(engine.recoveries) == 1


@pytest.mark.parametrize("sampling", [SAMPLED, samplings("all")[1]], ids=["plain", "words"])
def test_a_spare_takes_the_place_of_a_lost_shard(sampling: Sampling, tmp_path: Path) -> None:
    """With words the new last shard has to know the text, too."""
    settings = saved_model("llama", tmp_path)
    expected = _greedy(inprocess(settings, (0, 4)), 12, sampling=sampling)
    cuts = (0, 2, 4)
    with _serving(tmp_path, cuts) as processes, Process(shards(settings, cuts)[0]) as other, Process(
        shards(settings, cuts)[1]
    ) as spare:  # fmt: skip
        addresses = [p.address for p in processes]
        with _engine(addresses, spares=[other.address, spare.address], recovery_seconds=20.0) as engine:
            assert _greedy(engine, 12, {4: processes[1].stop}, sampling) == expected
            assert len(engine.recoveries) == 1


def test_without_recovery_a_loss_is_raised_and_says_who(tmp_path: Path) -> None:
    with _serving(tmp_path, (0, 2, 4)) as processes, _engine([p.address for p in processes]) as engine:
        lost = str(processes[1].address)
        with pytest.raises(ShardLost, match="layers 2:4") as raised:
            _greedy(engine, 12, {4: processes[1].stop})
        assert lost in str(raised.value)


def test_shards_that_stay_away_are_waited_for_and_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with _serving(tmp_path, (0, 2, 4)) as processes:
        addresses = [process.address for process in processes]
        with _engine(addresses, recovery_seconds=0.5) as engine, pytest.raises(ShardLost):
            _greedy(engine, 12, {4: processes[1].stop})
    assert caplog.text.count("bringing the shards back") == 1


def test_a_link_between_two_shards_that_breaks_is_mended(tmp_path: Path) -> None:
    settings = saved_model("llama", tmp_path)
    expected = _greedy(inprocess(settings, (0, 4)), 12)
    first, last = shards(settings, (0, 2, 4))
    no_delay = LinkSettings(up=one_way(), down=one_way(), buffer_bytes=2**20, seed=0)
    with contextlib.ExitStack() as stack:
        second = stack.enter_context(Process(last))
        target = ("127.0.0.1", second.address.port)
        link = stack.enter_context(Link(target, no_delay, host="127.0.0.1", port=0))
        one = stack.enter_context(Process(first, next_addresses=[Address("127.0.0.1", link.port)]))
        with _engine([one.address, second.address], recovery_seconds=20.0) as engine:
            assert _greedy(engine, 12, {4: lambda: link.cut(CutKind.reset, duration_seconds=0.0)}) == expected
            assert len(engine.recoveries) == 1


def test_wrong_keys_models_and_layers_are_refused(tmp_path: Path) -> None:
    settings = saved_model("llama", tmp_path)
    first = shards(settings, (0, 2, 4))[0]
    after_a_gap = shards(settings, (0, 3, 4))[1]
    keyed = endpoint("shard", key=b"k" * 32)
    with Process(first, ours=keyed) as one, pytest.raises((WrongKey, PeerRefused)):
        chain([one.address], key=b"w" * 32)
    with Process(first) as one, Process(after_a_gap) as three, Process(shards(settings, (0, 1, 4))[1]) as early:
        with pytest.raises((PeerMismatch, PeerRefused), match="model"):
            chain([one.address], fingerprints={"model": "tests:2"})
        with pytest.raises(ChainMismatch, match="leave a gap"):
            chain([one.address, three.address])
        with pytest.raises(ChainMismatch, match="overlap"):
            chain([one.address, early.address])
        with pytest.raises(ShardLost, match="could not be reached"):
            chain([one.address, Address("127.0.0.1", 1)], start_seconds=0.3)


def test_a_next_shard_that_hangs_up_on_join_is_passed_over_and_its_reason_told(tmp_path: Path) -> None:
    """A stale `project.next`: a shard to which the client is not attached."""
    settings = saved_model("llama", tmp_path)
    expected = _greedy(inprocess(settings, (0, 4)), 6)
    first, last = shards(settings, (0, 2, 4))
    with Process(shards(settings, (0, 2, 4))[1]) as stale, Process(last) as second, Process(
        first, next_addresses=[stale.address]
    ) as one:  # fmt: skip
        with _engine([one.address, second.address]) as engine:
            assert _greedy(engine, 6) == expected
        with FrameSocket.connect(one.address.host, one.address.port, endpoint("client"), tls=None) as peer:
            send(peer, 0, Attach(client=1, next=["127.0.0.1:1"], next_instance=1))
            frame = peer.poll(5)
    assert frame is not None
    assert isinstance(frame.head, Fault)
    assert frame.head.code is FaultCode.link
    assert "the next shard is not there: " in frame.head.text
    assert f"{stale.address}" in frame.head.text
    assert "joined for a client that is not attached" in frame.head.text
    assert "127.0.0.1:1" in frame.head.text


def test_bytes_and_times_of_a_token(tmp_path: Path) -> None:
    with _serving(tmp_path, (0, 2, 4)) as processes, _engine([p.address for p in processes]) as engine:
        walls = []
        with engine.open(some_ids(20, 1), Sampling.greedy()) as text:
            for _ in range(30):
                began = time.monotonic()
                engine.extend([(text, [3])], "last")
                walls.append(time.monotonic() - began)
            reports = engine.reports()
        apart = [parts for parts in take_apart(list(engine.passes), reports) if parts.rows == 1]
        assert len(apart) >= 30
        assert sum(parts.total_seconds for parts in apart[-30:]) == pytest.approx(sum(walls), rel=0.05)
        number = apart[-1].number
        assert reports[0].hops[number].sent_bytes <= 4 * 32 + 64
        assert reports[1].hops[number].sent_bytes <= 48
        assert [report.layers for report in reports] == [range(0, 2), range(2, 4)]


@pytest.mark.parametrize("awake_seconds", [0.0, 0.2])
def test_a_shard_looks_for_the_next_pass_and_then_sleeps(
    awake_seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[float] = []
    monkeypatch.setattr(serving, "_yield_core", lambda: looks.append(time.monotonic()))
    [shard] = shards(saved_model("llama", tmp_path), (0, 4))
    with Process(shard, awake_seconds=awake_seconds) as process, _engine([process.address]) as engine:
        with engine.open(some_ids(5, 1), SAMPLED) as text:
            engine.extend([(text, [1])], "last")
        time.sleep(awake_seconds + 0.3)
        before = len(looks)
        time.sleep(0.2)
        assert len(looks) == before, "nobody asks for anything, and it does not sleep"
    assert bool(looks) == (awake_seconds > 0)


def test_an_int8_boundary_is_half_of_bfloat16_plus_4() -> None:
    for hidden in (32, 576, 4096, 8192):
        rows_NH = torch.randn(3, hidden)
        int8, bfloat16 = (len(encode(rows_NH, kind)) for kind in (Boundary.int8, Boundary.bfloat16))
        assert int8 == bfloat16 / 2 + 3 * 4
        assert Boundary.int8.row_bytes(hidden) == int8 / 3


def test_a_shard_that_falls_silent_is_found_in_time(tmp_path: Path) -> None:
    """Nobody resets a connection to a machine without power: heartbeats find it, here after 1 s."""
    no_delay = LinkSettings(up=one_way(), down=one_way(), buffer_bytes=2**20, seed=0)
    with _serving(tmp_path, (0, 2, 4)) as (one, two), Link(
        ("127.0.0.1", two.address.port), no_delay, host="127.0.0.1", port=0
    ) as link, _engine([one.address, Address("127.0.0.1", link.port)]) as engine:  # fmt: skip
        text = engine.open(some_ids(9, 1), SAMPLED)
        link.cut(CutKind.blackhole, duration_seconds=60.0)
        began = time.monotonic()
        with pytest.raises(ShardLost):
            engine.extend([(text, [3])], "last")
        assert time.monotonic() - began < 2.0
        link.heal()
