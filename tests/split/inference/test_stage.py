"""A stage against messages that no client of ours sends: always an answer, never an exception, and life goes on."""

from __future__ import annotations

import random
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from lab.engine.sampling import Sampling
from lab.engine.sampling_head import sampling_fields
from lab.models.conversion import BYTE_EOS, byte_tokenizer
from lab.text.grammars import Grammars
from lab.text.logit_rules import LogitRules
from lab.wire.tokens import pack_tokens
from split.chain.boundary import Boundary
from split.chain.messages import Fault, FaultCode
from split.inference.coding import decode, encode
from split.inference.messages import Open, Pass, Piece, Steps, pack_steps, unpack_steps
from split.inference.shard import load_shard
from split.inference.stage import InferenceStage
from split.transport.base import Message
from tests.split.chains import CONTEXT, LIMITS, VOCABULARY, saved_model, shards, some_ids

OPEN = Open(tokens=100, seed=1, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, logit_rules=None, top_tokens=0)


def _pass(*pieces: tuple[int, int, int], read_all: bool = False) -> Pass:
    return Pass(
        read_all=read_all,
        pieces=[Piece(session=s, position=p, count=c, is_first=True, is_last=True) for s, p, c in pieces],
    )


def _stages(tmp_path: Path) -> list[InferenceStage]:
    return [InferenceStage(shard, Boundary.float32) for shard in shards(saved_model("llama", tmp_path), (0, 2, 4))]


def _taken(stage: InferenceStage, message: Message, client: Hashable = 0) -> Message | None:
    """What came of a message."""
    return next((result for _, result in stage.take(message, client)), None)


def _code(answer: Message | None) -> FaultCode:
    """Of a message that came to nothing, or of the one text of a pass that stopped."""
    assert answer is not None
    if isinstance(answer.head, Fault):
        return answer.head.code
    assert isinstance(answer.head, (Pass, Steps))
    [stopped] = answer.head.stopped
    return stopped.code


def test_each_wrong_message_has_its_fault(tmp_path: Path) -> None:
    first, last = _stages(tmp_path)
    ids = pack_tokens([1, 2, 3])
    assert _code(_taken(first, Message(1, _pass((7, 0, 3)), ids))) is FaultCode.lost
    _taken(first, Message(7, OPEN))
    assert _code(_taken(first, Message(7, OPEN))) is FaultCode.refused
    assert _code(_taken(first, Message(1, _pass((7, 5, 3)), ids))) is FaultCode.lost
    assert _code(_taken(first, Message(1, _pass((7, 0, 3)), ids), 1)) is FaultCode.lost, "another client's text"
    for head, body in (
        (_pass((7, 0, 3)), ids[:-1]),
        (_pass((7, 0, 3)), ids + b"1234"),
        (_pass((7, 0, 2), (7, 2, 1)), ids),
        (_pass((7, 0, CONTEXT + 1)), pack_tokens([0] * (CONTEXT + 1))),
        (_pass((7, 0, 3)), pack_tokens([1, 2, VOCABULARY])),
        (_pass((7, 0, 3)), pack_tokens([1, 2, -1])),
    ):
        assert _code(_taken(first, Message(1, head, body))) is FaultCode.refused
    _taken(last, Message(7, OPEN))
    assert _code(_taken(last, Message(1, _pass((7, 0, 3)), bytes(3 * 32 * 4 - 1)))) is FaultCode.refused
    fault = Message(1, Fault(code=FaultCode.failed, text="of an earlier shard"))
    assert _taken(last, fault) == fault
    good = _taken(first, Message(2, _pass((7, 0, 3)), ids))
    assert good is not None
    answer = _taken(last, good)
    assert answer is not None
    assert isinstance(answer.head, Steps)


def test_random_messages_never_raise(tmp_path: Path) -> None:
    """Positions, counts, texts and bodies at random; a text of another client goes on to the same tokens."""
    generator = random.Random(0)
    stages = _stages(tmp_path)
    expected = _greedy(_stages(tmp_path), 0)
    for number in range(400):
        head: Any = generator.choice([OPEN, _random_pass(generator), _random_pass(generator)])
        body = generator.randbytes(generator.choice([0, 4, 12, 128, 384])) if isinstance(head, Pass) else b""
        for stage in stages:
            answers = list(stage.take(Message(number % 3, head, body), "hostile"))
            assert [type(answer) for _, answer in answers] in ([], [Message])
    for stage in stages:
        stage.forget("hostile")
    assert _greedy(stages, 0) == expected


def _random_pass(generator: random.Random) -> Pass:
    pieces = [
        (generator.randrange(3), generator.choice([0, 0, 1, 5, 2**31 - 1]), generator.choice([1, 3, 2**20 - 1]))
        for _ in range(generator.randrange(1, 3))
    ]
    return _pass(*pieces, read_all=generator.random() < 0.5)


def _greedy(stages: list[InferenceStage], client: Hashable) -> list[int]:
    for stage in stages:
        _taken(stage, Message(1, OPEN), client)
    ids, said = some_ids(6, 1), []
    position = 0
    for number in range(8):
        run = _pass((1, position, len(ids)))
        message: Message | None = Message(number, run, pack_tokens(ids))
        for stage in stages:
            assert message is not None
            message = _taken(stage, message, client)
        assert message is not None
        position += len(ids)
        ids = unpack_steps(run, message.body, [0])[0].next_ids
        said += ids
    return said


def test_steps_travel_as_they_are() -> None:
    from lab.engine.base import TargetStep

    run = _pass((1, 0, 2), (2, 4, 1), read_all=True)
    steps = [TargetStep([5, 6], [0.5, 1.5], [2.0, float("inf")], [0.25, 0.75]), TargetStep([7], [0.1], [0.2], [0.3])]
    assert unpack_steps(run, pack_steps(steps), [0, 0]) == steps
    with pytest.raises(ValueError, match="must be"):
        unpack_steps(run, pack_steps(steps)[:-1], [0, 0])
    steps[0] = replace(steps[0], top=[[(9, 0.1), (5, 0.5)], [(6, 1.5), (8, 1.5)]])
    assert unpack_steps(run, pack_steps(steps), [2, 0]) == steps
    for tops in ([0, 0], [1, 0], [2, 1], [20, 20]):
        with pytest.raises(ValueError, match="steps of 3 rows must be"):
            unpack_steps(run, pack_steps(steps), tops)


@pytest.mark.parametrize("boundary", Boundary)
def test_hidden_states_come_back_within_their_encoding(boundary: Boundary) -> None:
    hidden_NH = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-3], [1], [10], [0], [1e4]]
    )
    body = encode(hidden_NH, boundary)
    assert len(body) == 5 * boundary.row_bytes(48)
    back_NH = decode(body, 5, 48, boundary, dtype=torch.float32, device=torch.device("cpu"))
    largest_N1 = hidden_NH.abs().amax(-1, keepdim=True)
    worst = {"float32": 0.0, "bfloat16": 2.0**-8, "int8": 0.5001 / 127}[boundary.name]
    assert bool(((back_NH - hidden_NH).abs() <= worst * largest_N1).all())
    with pytest.raises(ValueError, match="must be"):
        decode(body[:-1], 5, 48, boundary, dtype=torch.float32, device=torch.device("cpu"))


def test_a_pass_of_one_token_fits_its_budget() -> None:
    """Header 16 bytes and head together at most 64, at any position."""
    head = _pass((2**31, 2**30, 1))
    assert 16 + len(msgspec.msgpack.encode(head)) <= 64


def test_a_pass_that_does_not_tell_the_last_shard_the_text_is_refused(tmp_path: Path) -> None:
    """Words need the ids; and ids from a client are looked at before anything is counted by them."""
    last = _stages(tmp_path)[-1]
    words = LogitRules(prompt_tokens=2, presence_penalty=1.0)
    opened = Open(tokens=CONTEXT, **sampling_fields(replace(Sampling.greedy(), logit_rules=words)))
    _taken(last, Message(7, opened))
    hidden = bytes(3 * 32 * 4)
    run = _pass((7, 0, 3))
    assert _code(_taken(last, Message(1, run, hidden))) is FaultCode.refused
    told = msgspec.structs.replace(run, for_logit_rules=True)
    assert _code(_taken(last, Message(1, told, pack_tokens([1, 2, VOCABULARY]) + hidden))) is FaultCode.refused
    answer = _taken(last, Message(1, told, pack_tokens([1, 2, 3]) + hidden))
    assert answer is not None
    assert isinstance(answer.head, Steps)
    unknown = LogitRules(prompt_tokens=2, logit_bias=((VOCABULARY, 1.0),))
    opened = Open(tokens=CONTEXT, **sampling_fields(replace(Sampling.greedy(), logit_rules=unknown)))
    assert _code(_taken(last, Message(8, opened))) is FaultCode.refused


def test_a_schema_that_the_last_shard_cannot_follow_is_refused_there(tmp_path: Path) -> None:
    settings = saved_model("llama", tmp_path)
    grammars = Grammars(lambda: (byte_tokenizer(), (BYTE_EOS,)))
    first, last, without = (
        InferenceStage(load_shard(settings, torch.device("cpu"), layers, LIMITS, None, given), Boundary.float32)
        for layers, given in ((range(2), None), (range(2, 4), grammars), (range(2, 4), None))
    )
    codes = []
    for number, schema in enumerate(("{}", '{"type": "zzz"}')):
        rules = LogitRules(prompt_tokens=2, schema=schema)
        opened = Open(tokens=CONTEXT, **sampling_fields(replace(Sampling.greedy(), logit_rules=rules)))
        handed_on = _taken(first, Message(number, opened))
        assert handed_on is not None
        assert handed_on.head == opened
        answers = [_taken(stage, handed_on) for stage in (last, without)]
        codes.append([answer and isinstance(answer.head, Fault) and answer.head.code for answer in answers])
    assert codes == [[False, FaultCode.refused], [FaultCode.refused, FaultCode.refused]]
