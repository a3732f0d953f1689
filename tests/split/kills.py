"""Shards taken away at random points of a text: one function for 4 kills in `test` and 50 in `soak`."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests.split.chains import SAMPLED, as_engine, inprocess, saved_model, shards, some_ids
from tests.split.processes import Process, chain

CUTS = (0, 1, 3, 4)
TOKENS_PER_KILL = 12


@dataclass(frozen=True)
class Kills:
    """What came of it."""

    kills: int
    recoveries: int
    same_tokens: bool
    slowest_recovery_seconds: float


def kill_at_random(kills: int, seed: int, folder: Path) -> Kills:
    """One text over three shards; so many times one of them goes, with all its connections, and another comes at its
    address a moment later. The text must be that of all layers in one place."""
    generator = random.Random(seed)
    settings = saved_model("llama", folder)
    count = kills * TOKENS_PER_KILL
    points = set(generator.sample(range(1, count), kills))
    expected = _texts(inprocess(settings, (0, 4)), count)
    with contextlib.ExitStack() as stack:
        living = [stack.enter_context(Process(shard)) for shard in shards(settings, CUTS)]
        helpers: list[threading.Thread] = []

        def kill() -> None:
            for helper in helpers:
                helper.join()
            place = generator.randrange(len(living))
            port = living[place].address.port
            pause = generator.uniform(0, 0.3)
            living[place].stop()

            def replace_it() -> None:
                time.sleep(pause)
                living[place] = stack.enter_context(Process(shards(settings, CUTS)[place], port=port))

            helpers.append(threading.Thread(target=replace_it))
            helpers[-1].start()

        engine = as_engine(chain([process.address for process in living]), recovery_seconds=30.0)
        try:
            found = _texts(engine, count, points, kill)
        finally:
            engine.shutdown()
            for helper in helpers:
                helper.join()
        return Kills(kills, engine.recoveries, found == expected, max(engine.recovery_times))


def _texts(engine, count, points=frozenset(), kill=lambda: None):  # type: ignore[no-untyped-def]
    """Tokens of one text, begun anew when its context is full."""
    ids: list[int] = []
    while len(ids) < count:
        with engine.open(some_ids(11, len(ids)), SAMPLED) as text:
            for _ in range(min(150, count - len(ids))):
                ids.append(text.step.next_ids[-1])
                if len(ids) in points:
                    kill()
                engine.extend([(text, ids[-1:])], "last")
    return ids
