"""Shard processes killed at random points of a text: one function for 4 kills in `test` and 50 in `soak`."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from lab.command.entry import compose_settings
from lab.engine.sampling import Sampling
from lab.text.logit_rules import LogitRules
from split.chain.address import Address
from split.inference.open import join_shards, load_stage
from split.inference.sharded_model import ShardedModel
from split.settings import SplitSettings
from split.transport.inproc import InProcess

LAYERS = (range(0, 1), range(1, 3), range(3, 4))
TOKENS_PER_KILL = 12
TEXT_TOKENS = 150
"""Of one text; then another begins."""
SAMPLED = Sampling(seed=21, temperature=0.8, top_k=40, top_p=0.95)
RULED = replace(
    SAMPLED,
    logit_rules=LogitRules(
        prompt_tokens=3,
        repetition_penalty=1.3,
        frequency_penalty=0.2,
        logit_bias=((70, 0.5),),
        bad_words=((101,), (97, 98)),
    ),
)
"""Of every second text: what is rebuilt must know the text so far to go on."""
WORDS = ("model=random", "tracking=none", "device.threads=1", "project.context=256")


class Processes(Protocol):
    """Shard processes of `LAYERS`, each of which comes up again at its address when it ends."""

    addresses: Sequence[Address]

    def kill(self, place: int) -> None:
        """SIGKILL."""


@dataclass(frozen=True)
class Kills:
    """What came of it. The time without the text is detection + start + prefill."""

    kills: int
    recoveries: int
    same_tokens: bool
    slowest_detection_seconds: float
    """From the SIGKILL until the client knew."""
    median_start_seconds: float
    """From then until all shards were there."""
    median_prefill_seconds: float
    """From then until they held the text."""


def settings_of(cache: str) -> SplitSettings:
    """The model of the text and its shards."""
    return compose_settings("split_inf", " ".join((*WORDS, f"model.cache_dir={cache}")), SplitSettings)


def kill_at_random(kills: int, seed: int, settings: SplitSettings, processes: Processes) -> Kills:
    """Texts over three shards; so many times one of them is killed, in the middle of whatever it does. The tokens must
    be those of all layers in one place."""
    generator = random.Random(seed)
    count = kills * TOKENS_PER_KILL
    points = set(generator.sample(range(1, count), kills))
    expected = _texts(_whole(settings), count)
    killed: list[float] = []

    def kill() -> None:
        place, delay = generator.randrange(len(LAYERS)), generator.uniform(0, 0.01)

        def now() -> None:
            time.sleep(delay)
            killed.append(time.monotonic())
            processes.kill(place)

        threading.Thread(target=now).start()

    engine = _join(settings, processes.addresses)
    try:
        found = _texts(engine, count, points, kill)
    finally:
        engine.shutdown()
    losses = engine.recoveries
    return Kills(
        kills=len(killed),
        recoveries=len(losses),
        same_tokens=found == expected,
        slowest_detection_seconds=max(loss.lost - moment for loss, moment in zip(losses, killed)),
        median_start_seconds=statistics.median(loss.start_seconds for loss in losses),
        median_prefill_seconds=statistics.median(loss.prefill_seconds for loss in losses),
    )


def _join(settings: SplitSettings, addresses: Sequence[Address]) -> ShardedModel:
    return join_shards(
        settings.model,
        settings.network,
        shards=[str(address) for address in addresses],
        spares=[],
        boundary=settings.project.boundary.name,
        context=settings.project.context,
        prefill_chunk=settings.project.prefill_chunk,
        start_seconds=60.0,
        recovery_seconds=120.0,
    )


def _whole(settings: SplitSettings) -> ShardedModel:
    return ShardedModel(
        InProcess([load_stage(settings, torch.device("cpu"), range(4))]),
        vocabulary_size=settings.model.architecture.vocabulary,
        context=settings.project.context,
        prefill_chunk=settings.project.prefill_chunk,
        recovery_seconds=0.0,
    )


def _texts(engine: ShardedModel, count: int, points: Any = frozenset(), kill: Any = lambda: None) -> list[int]:
    """Tokens of texts in turn. After a kill the text waits until it was noticed, so that each is a loss of its own."""
    ids: list[int] = []
    losses = 0
    while len(ids) < count:
        sampling = RULED if len(ids) // TEXT_TOKENS % 2 == 0 else SAMPLED
        with engine.open([len(ids) % 256, 7, 9], sampling) as text:
            for _ in range(min(TEXT_TOKENS, count - len(ids))):
                assert text.step is not None
                ids.append(text.step.next_ids[-1])
                if len(ids) in points:
                    kill()
                    losses += 1
                engine.extend([(text, ids[-1:])], "last")
                while len(engine.recoveries) < losses:
                    text.position -= 1
                    engine.extend([(text, ids[-1:])], "last")
    return ids
