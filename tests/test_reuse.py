"""A text that goes on from another one's session: the same tokens and the same bits on every engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typing_extensions import override

from lab.engine.base import Engine, SessionLost
from lab.engine.history import History
from lab.engine.kv import CacheFull, LayerShape, SlotCache
from lab.engine.local import LocalEngine
from lab.engine.sampling import Sampling
from lab.engine.synthetic import SyntheticEngine
from split.inference.messages import SetAside
from split.inference.sharded_model import ShardedModel, ShardFault
from split.transport.base import Message, ShardLost
from split.transport.inproc import InProcess
from tests.random_models import random_model
from tests.reuse import CHUNK, MOST, NEW_TOKENS, PLAIN, SECOND_TOKENS, SHARED, again, anew, first_turn, prompts, sampled
from tests.split.chains import as_engine, inprocess, saved_model

pytestmark = pytest.mark.usefixtures("one_thread")


def local(*, exact_rows: int | None = None, dtype: torch.dtype = torch.float32, limit: int = 10**8) -> LocalEngine:
    return LocalEngine(
        random_model("llama", dtype), sessions=3, context=MOST, bucket=16, kv_limit_bytes=limit, prefill_chunk=CHUNK,
        exact_rows=exact_rows,
    )  # fmt: skip


def split(folder: Path, *cuts: int, **limits: Any) -> ShardedModel:
    engine = inprocess(saved_model("llama", folder), cuts, **limits)
    engine._chunk = CHUNK
    return engine


ENGINES: dict[str, Callable[[Path], Engine]] = {
    "local": lambda folder: local(),
    "bfloat16": lambda folder: local(dtype=torch.bfloat16),
    "exact shapes": lambda folder: local(exact_rows=CHUNK),
    "two shards": lambda folder: split(folder, 0, 2, 4),
    "three shards": lambda folder: split(folder, 0, 1, 3, 4),
}


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("among_others", [False, True])
def test_the_second_turn_is_the_same_to_the_bit(name: str, among_others: bool, tmp_path: Path) -> None:
    """With rules that count tokens behind a turn without any, and the other way round."""
    engine = ENGINES[name](tmp_path)
    rules = sampled(SECOND_TOKENS)
    for before, sampling in ((PLAIN, rules), (sampled(9, seed=1), rules), (rules, PLAIN)):
        found = again(engine, before, sampling, among_others=among_others)
        assert len(found.steps) > NEW_TOKENS
        assert found == anew(ENGINES[name](tmp_path), sampling, among_others=among_others)


@pytest.mark.parametrize("name", ["local", "two shards"])
def test_one_token_too_many_is_seen_by_the_same_comparison(name: str, tmp_path: Path) -> None:
    """Positions of the last, shorter chunk, and of another cut."""
    for beyond in (1, 18):
        found = again(ENGINES[name](tmp_path), PLAIN, PLAIN, beyond=beyond)
        expected = anew(ENGINES[name](tmp_path), PLAIN)
        assert not all(one.equal(other) for one, other in zip(found.held, expected.held, strict=True))


def test_rules_that_forget_the_first_tokens_are_seen_by_the_same_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = sampled(SECOND_TOKENS)
    hold = History.hold

    def forgetful(history: History, position: int, ids: Sequence[int]) -> None:
        hold(history, position, [3] * SHARED if (position, len(ids)) == (0, SHARED) else ids)

    for engine in (local(), split(tmp_path, 0, 2, 4)):
        expected = anew(local(), rules)
        with monkeypatch.context() as patch:
            patch.setattr(History, "hold", forgetful)
            found = again(engine, PLAIN, rules)
        assert [step.margin for step in found.steps] != [step.margin for step in expected.steps]


def test_a_synthetic_text_depends_on_its_own_seed() -> None:
    def engine() -> SyntheticEngine:
        return SyntheticEngine(
            vocabulary_size=97, context=MOST, sessions=2, step_seconds=0, row_seconds=0, agreement=1.0
        )

    seeded = Sampling(seed=9, temperature=1.0, top_k=0, top_p=1.0)
    assert again(engine(), Sampling.greedy(), seeded) == anew(engine(), seeded)


# Room


def test_a_slot_is_promised_more_or_less_in_its_place() -> None:
    shapes = {0: LayerShape(heads=1, key_size=4, value_size=4)}
    cache = SlotCache(
        shapes, slots=3, bucket=8, limit_bytes=2 * 32 * 32, dtype=torch.float32, device=torch.device("cpu"), exact=None
    )
    first = cache.acquire(20)
    cache.begin_rows([first], [20])
    cache.commit()
    for stored in cache.stored(0):
        stored.fill_(1.0)
    cache.reserve(first, 8)
    assert cache.lengths[first] == 8
    keys, _ = cache.stored(0)
    assert bool((keys[first, :, :8] == 1).all())
    assert not bool(keys[first, :, 8:20].any()), "the next text could inherit it"
    second = cache.acquire(32)
    with pytest.raises(CacheFull, match="got 40"):
        cache.reserve(first, 40)
    assert (cache.lengths[first], cache._promised[first]) == (8, 8)
    cache.reserve(first, 32)
    cache.release(second)
    cache.reserve(first, 64)
    with pytest.raises(ValueError, match="at least 1 position"):
        cache.reserve(first, 0)


@pytest.mark.parametrize("is_split", [False, True])
def test_a_session_for_which_there_is_no_room_is_as_it_was(is_split: bool, tmp_path: Path) -> None:
    limit = 4 * 2 * 2 * 8 * 4 * 224  # two sequences of 112 tokens
    engine: Engine = split(tmp_path, 0, 2, 4, kv_limit_bytes=limit // 2) if is_split else local(limit=limit)
    _, second = prompts(engine.vocabulary_size)
    kept = first_turn(engine, sampled(9))
    other = engine.open([], PLAIN, 112)
    for _ in range(2):
        with pytest.raises(CacheFull):
            engine.reopen(kept, second[:SHARED], PLAIN, MOST)
    assert (kept.closed, kept.position, kept.most_tokens) == (False, SHARED, SHARED)
    other.close()
    with engine.reopen(kept, second[:SHARED], PLAIN, MOST) as text:
        engine.extend([(text, [5])], "last")
    with engine.open([], PLAIN, MOST):
        pass


@pytest.mark.parametrize("name", ["local", "two shards"])
def test_what_cannot_be_reopened_is_refused(name: str, tmp_path: Path) -> None:
    engine = ENGINES[name](tmp_path)
    _, second = prompts(engine.vocabulary_size)
    with engine.open([], PLAIN, MOST) as empty, pytest.raises(ValueError, match="must hold a token to be set aside"):
        engine.set_aside(empty)
    kept = first_turn(engine, PLAIN)
    for count in (0, SHARED + 1):
        with pytest.raises(ValueError, match=f"ids must be 1 to {SHARED} of those that the session holds, got {count}"):
            engine.reopen(kept, second[:count], PLAIN, MOST)
    with pytest.raises(ValueError, match="most_tokens must be in"):
        engine.reopen(kept, second[:SHARED], PLAIN, SHARED - 1)
    kept.fault = "NaN"
    with pytest.raises(ValueError, match="session must be sound"):
        engine.reopen(kept, second[:SHARED], PLAIN, MOST)
    kept.fault = ""
    kept.close()
    with pytest.raises(ValueError, match="session must be open"):
        engine.reopen(kept, second[:SHARED], PLAIN, MOST)


# Shards


def test_shards_give_the_room_of_a_session_that_is_set_aside_to_anybody(tmp_path: Path) -> None:
    """Nothing is idle for 1000 s, and still no request waits."""
    engine = split(tmp_path, 0, 2, 4, sessions=1)
    kept = first_turn(engine, PLAIN)
    with engine.open([1, 2], PLAIN, MOST):
        pass
    _, second = prompts(engine.vocabulary_size)
    with pytest.raises(SessionLost, match=f"a request is reopened at {SHARED}, but 0 tokens are held"):
        engine.reopen(kept, second[:SHARED], PLAIN, MOST)
    kept.close()
    assert not engine._journals
    assert again(engine, PLAIN, PLAIN) == anew(split(tmp_path, 0, 2, 4), PLAIN)


def test_a_session_in_use_keeps_its_room(tmp_path: Path) -> None:
    """The negative control: it is reopened, and no longer anybody's."""
    engine = split(tmp_path, 0, 2, 4, sessions=1)
    _, second = prompts(engine.vocabulary_size)
    text = engine.reopen(first_turn(engine, PLAIN), second[:SHARED], PLAIN, MOST)
    with pytest.raises(CacheFull):
        engine.open([1, 2], PLAIN, MOST)
    text.close()


class Losing(InProcess):
    """Loses a shard, with all that it holds, before its next message."""

    is_lost = False
    restored = 0

    @override
    def send(self, shard: int, message: Message) -> None:
        if self.is_lost:
            raise ShardLost("a shard is gone")
        super().send(shard, message)

    @override
    def restore(self, deadline: float) -> None:
        super().restore(deadline)
        self.is_lost = False
        self.restored += 1


def losing(folder: Path) -> tuple[ShardedModel, Losing]:
    made = split(folder, 0, 2, 4)._transport
    assert isinstance(made, InProcess)
    transport = Losing(made._stages)
    engine = as_engine(transport, recovery_seconds=30.0)
    engine._chunk = CHUNK
    return engine, transport


def test_a_lost_shard_forgets_what_is_set_aside_and_nothing_else(tmp_path: Path) -> None:
    engine, transport = losing(tmp_path)
    _, second = prompts(engine.vocabulary_size)
    with engine.open([5, 6], PLAIN, MOST) as other:
        kept = first_turn(engine, PLAIN)
        transport.is_lost = True
        with pytest.raises(SessionLost):
            engine.reopen(kept, second[:SHARED], PLAIN, MOST)
        kept.close()
        assert engine.extend([(other, [7])], "last")[0].next_ids
        assert transport.restored == 1


@pytest.mark.parametrize("sampling", [PLAIN, sampled(SECOND_TOKENS)])
def test_a_text_that_was_reopened_is_rebuilt_to_the_same_bits(sampling: Sampling, tmp_path: Path) -> None:
    """A shard is lost right behind it, before a new token was computed, and again in the middle."""
    engine, transport = losing(tmp_path)
    _, second = prompts(engine.vocabulary_size)
    text = engine.reopen(first_turn(engine, sampled(9)), second[:SHARED], sampling, MOST)
    text.prompt_tokens = len(second)
    steps = []
    for start, end in ((SHARED, SHARED + CHUNK), (SHARED + CHUNK, SECOND_TOKENS)):
        transport.is_lost = True
        steps += engine.extend([(text, second[start:end])], "last")
    expected = anew(split(tmp_path, 0, 2, 4), sampling).steps[:2]
    assert [(one.next_ids, one.next_nll, one.top) for one in steps] == [
        (one.next_ids, one.next_nll, one.top) for one in expected
    ]
    assert transport.restored == 2


def test_a_session_that_is_set_aside_while_a_shard_is_gone_is_lost_quietly(tmp_path: Path) -> None:
    engine, transport = losing(tmp_path)
    first, second = prompts(engine.vocabulary_size)
    session = engine.open(first, PLAIN, MOST)
    session.position = SHARED
    transport.is_lost = True
    engine.set_aside(session)
    with pytest.raises(SessionLost):
        engine.reopen(session, second[:SHARED], PLAIN, MOST)


def test_a_client_that_reopens_nonsense_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = split(tmp_path, 0, 2, 4)
    _, second = prompts(engine.vocabulary_size)
    text = engine.open([], sampled(9), MOST)
    engine.extend([(text, second[:SHARED])], "last")
    with monkeypatch.context() as patch:
        patch.setattr("split.inference.sharded_model.pack_tokens", lambda ids: b"")
        with pytest.raises(ShardFault, match="must bring 256 bytes of ids, got 0"):
            engine.reopen(text, second[:SHARED], sampled(9), MOST)
        patch.setattr("split.inference.sharded_model.check_reopen", lambda *_: None)
        with pytest.raises(ShardFault, match="tokens must be at most"):
            engine.reopen(text, second[:SHARED], PLAIN, 10**6)
        with pytest.raises(SessionLost, match=f"a request is reopened at {SHARED + 5}, but {SHARED} tokens are held"):
            engine.reopen(text, second[: SHARED + 5], PLAIN, MOST)
        with pytest.raises(ShardFault, match=f"tokens must be at least the {SHARED} that are held, got 5"):
            engine.reopen(text, second[:SHARED], PLAIN, 5)
    engine._transport.send(0, Message(77, SetAside(tokens=2**31 - 1)))  # of nobody
    engine.extend([(text, [5])], "last")
