"""The second turn of a chat on one engine, from the session of the first turn or from its beginning."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lab.engine.base import Engine, Session, TargetStep
from lab.engine.local import LocalEngine
from lab.engine.sampling import Sampling
from lab.text.logit_rules import LogitRules
from split.inference.sharded_model import ShardedModel
from split.transport.inproc import InProcess

CHUNK = 32
"""Of a prompt: longer than what compiled layers compute row by row."""
SHARED = 2 * CHUNK
"""Tokens of the second prompt that are whole chunks of the first one."""
FIRST_TOKENS, SECOND_TOKENS = SHARED + 21, SHARED + CHUNK + 17
NEW_TOKENS = 6
MOST = 160


def sampled(prompt_tokens: int, seed: int = 5) -> Sampling:
    """Draws from everything that depends on the tokens before."""
    rules = LogitRules(
        prompt_tokens=prompt_tokens, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2,
        logit_bias=((11, 1.5),), bad_words=((12,), (13, 14)),
    )  # fmt: skip
    return Sampling(seed=seed, temperature=0.9, top_k=50, top_p=0.95, logit_rules=rules, top_tokens=4)


PLAIN = replace(Sampling.greedy(), top_tokens=2)


def prompts(vocabulary: int) -> tuple[list[int], list[int]]:
    """Those of two turns, and they differ from where the first one's question ends."""
    draw = random.Random(3)
    first = [draw.randrange(3, vocabulary) for _ in range(FIRST_TOKENS)]
    return first, [*first[:-2], *(draw.randrange(3, vocabulary) for _ in range(SECOND_TOKENS - FIRST_TOKENS + 2))]


@dataclass
class Turn:
    """What an engine said of a text from position `SHARED` on, and what it holds of all of it."""

    steps: list[TargetStep]
    held: list[Tensor]

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Turn)
        mine, theirs = ([_known(step) for step in one.steps] for one in (self, other))
        return mine == theirs and all(one.equal(another) for one, another in zip(self.held, other.held, strict=True))


def _known(step: TargetStep) -> TargetStep:
    return replace(step, nll=[-1.0 if math.isnan(value) else value for value in step.nll])


def fed(engine: Engine, session: Session, ids: Sequence[int], other: Session | None) -> list[TargetStep]:
    """A prompt in chunks as a scheduler feeds it, then some tokens; another text goes on beside it."""
    steps = []
    text = list(ids)
    session.prompt_tokens = len(ids)
    while session.position < len(text) and len(text) < len(ids) + NEW_TOKENS:
        chunk = text[session.position : session.position + CHUNK]
        requests = [(session, chunk), *([(other, [7])] if other else [])]
        steps.append(engine.extend(requests, "all" if len(chunk) == 1 else "last")[0])
        if session.position == len(text):
            text.append(steps[-1].next_ids[-1])
    return steps


def held(engine: Engine, session: Session) -> list[Tensor]:
    """Keys and values of a session's tokens, of all layers."""
    caches = []
    if isinstance(engine, LocalEngine):
        caches = [(engine.cache, session.key)]
    elif isinstance(engine, ShardedModel):
        assert isinstance(engine._transport, InProcess)
        found = [stage.shard for stage in engine._transport._stages]  # type: ignore[attr-defined]
        caches = [(shard.cache, shard._requests[(0, session.key)].slot) for shard in found]
    return [
        tensor[slot, :, : session.position].clone() for cache, slot in caches for tensor in cache.tensors().values()
    ]


def anew(engine: Engine, sampling: Sampling, *, among_others: bool = False) -> Turn:
    """The second turn, from its beginning."""
    _, second = prompts(engine.vocabulary_size)
    session = engine.open([], sampling, MOST)
    other = engine.open([5, 6], Sampling.greedy(), MOST) if among_others else None
    steps = fed(engine, session, second, other)
    turn = Turn(steps[SHARED // CHUNK :], held(engine, session))
    for one in (session, other):
        if one is not None:
            one.close()
    return turn


def first_turn(engine: Engine, sampling: Sampling, other: Session | None = None) -> Session:
    """A session that has ended its first turn, and is set aside."""
    first, _ = prompts(engine.vocabulary_size)
    session = engine.open([], sampling, len(first) + NEW_TOKENS)
    fed(engine, session, first, other)
    session.position = SHARED
    engine.set_aside(session)
    return session


def again(engine: Engine, before: Sampling, sampling: Sampling, *, among_others: bool = False, beyond: int = 0) -> Turn:
    """The second turn, from what the first one left, and `beyond` tokens more than may be taken."""
    _, second = prompts(engine.vocabulary_size)
    other = None
    if beyond:
        first, _ = prompts(engine.vocabulary_size)
        session = engine.open([], before, MOST)
        fed(engine, session, first, None)
    else:
        session = first_turn(engine, before)
    if among_others:
        other = engine.open([5, 6], Sampling.greedy(), MOST)
        engine.extend([(other, [7] * (SHARED // CHUNK))], "last")
        other.position = 2 + SHARED // CHUNK
    reopened = engine.reopen(session, second[: SHARED + beyond], sampling, MOST)
    assert session.closed
    assert (reopened.position, reopened.step, reopened.most_tokens) == (SHARED + beyond, None, MOST)
    steps = fed(engine, reopened, second, other)
    turn = Turn(steps, held(engine, reopened))
    for one in (reopened, other):
        if one is not None:
            one.close()
    return turn
