"""The runs of `tests.split.inference.crowd` against two shards, as `soak` wants them: with figures and a verdict."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

from lab.command.entry import compose_settings
from lab.network import client_side_tls
from split.chain.boundary import Boundary
from split.chain.local_shards import LocalShards
from split.inference.open import INFERENCE, fingerprints, join_shards, load_stage
from split.inference.sharded_model import ShardedModel
from split.settings import SplitSettings
from split.transport.tcp import TcpChain
from tests.split.chains import LIMITS, saved_model, shards
from tests.split.inference import crowd, texts
from tests.split.processes import Process, chain

LAYERS = (range(0, 2), range(2, 4))
WORDS = ("model=random", "tracking=none", "device.threads=1", "project.max_connections=128")
START_SECONDS = 120.0
WAIT_SECONDS = 600.0
LARGEST_GROWTH_BYTES = 10_000_000
POSITIONS = 1000
"""Of the cache that is crowded."""


@dataclass(frozen=True)
class Two:
    """Two shard processes."""

    settings: SplitSettings
    shards: LocalShards

    def connect(self) -> ShardedModel:
        """A client that waits in line."""
        project = self.settings.project
        return join_shards(
            self.settings.model, self.settings.network, shards=[str(address) for address in self.shards.addresses],
            spares=[], boundary="float32", context=project.context, prefill_chunk=project.prefill_chunk,
            start_seconds=START_SECONDS, recovery_seconds=0.0, line_seconds=WAIT_SECONDS,
        )  # fmt: skip

    def rss_bytes(self) -> list[int]:
        """Of each."""
        return [psutil.Process(process.pid).memory_info().rss for process in self.shards.processes]

    def pids(self) -> list[int]:
        """They are others when one was started again."""
        return [process.pid for process in self.shards.processes]


@contextmanager
def _two(*words: str) -> Iterator[Two]:
    with tempfile.TemporaryDirectory() as folder:
        own = [*WORDS, f"model.cache_dir={folder}/models", *words]
        settings = compose_settings("split_inf", " ".join(own), SplitSettings)
        with LocalShards(LAYERS, Path(folder), START_SECONDS, own) as processes:
            yield Two(settings, processes)


def _whole(settings: SplitSettings) -> crowd.Expected:
    """The text of all layers in one place, which has room enough."""
    project = replace(settings.project, cache_limit_bytes=2**28, sessions=2)
    engine = texts.inprocess(replace(settings, project=project), (0, 4))
    lock = threading.Lock()

    @cache
    def known(prompt: tuple[int, ...], new_tokens: int) -> list[int]:
        with lock:
            return crowd.text_of(engine, prompt, new_tokens)

    return lambda prompt, new_tokens: known(tuple(prompt), new_tokens)


def misused(requests: int) -> dict[str, Any]:
    """Wrong requests of every kind at two shards, beside 4 good texts."""
    with _two("project.context=256", "project.sessions=16") as two:
        expected = _whole(two.settings)
        network, model = two.settings.network, two.settings.model
        side = INFERENCE.endpoint(network, fingerprints(model, Boundary.float32), "client")
        joined = TcpChain(
            two.shards.addresses, [], side, tls=client_side_tls(network), answer_seconds=60.0, start_seconds=60.0
        )
        sizes = model.architecture
        last = two.shards.addresses[-1]
        wrongdoer = crowd.Wrongdoer(joined, last, side, sizes.vocabulary, sizes.hidden_size)
        crowd.misuse(
            wrongdoer, two.connect, expected, requests=len(wrongdoer.kinds())
        )  # memory that stays is taken now
        before, pids = two.rss_bytes(), two.pids()
        came = crowd.misuse(wrongdoer, two.connect, expected, requests=requests)
        growth = max(b - a for a, b in zip(before, two.rss_bytes(), strict=True))
        lived = pids == two.pids()
        joined.shutdown()
    ok = not (came.unanswered or came.differing) and lived and growth <= LARGEST_GROWTH_BYTES
    return {"ok": ok, **asdict(came), "shards_lived": lived, "rss_growth_bytes": growth}


def crowded(count: int) -> dict[str, Any]:
    """Texts of 100 to 900 tokens that come at random, where the cache has room for 1,000."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*WORDS, f"model.cache_dir={folder}/models", "project.context=1000"]
        probe = compose_settings("split_inf", " ".join(words), SplitSettings)
        stage = load_stage(probe, torch.device("cpu"), LAYERS[0])
        limit = POSITIONS * stage.shard.cache.bytes_per_position
    with _two(
        "project.context=1000", "project.sessions=8", "project.cache_bucket=8", f"project.cache_limit_bytes={limit}"
    ) as two:
        expected, pids = _whole(two.settings), two.pids()
        came = crowd.crowd(
            two.connect, expected, texts=count, shortest=100, longest=900, new_tokens=20, arrival_seconds=2.0, seed=1
        )
        lived = pids == two.pids()
    ok = not (came.died or came.differing) and came.finished + came.told_at_once == count and lived
    return {"ok": ok, **asdict(came), "shards_lived": lived, "cache_positions": POSITIONS}


def left(clients: int) -> dict[str, Any]:
    """Clients that leave at random moments, whichever of their connections and however."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        made = shards(saved_model("llama", Path(folder)), (0, 2, 4), replace(LIMITS, sessions=32))
        served = [stack.enter_context(Process(shard, most_waiting=64)) for shard in made]
        came = crowd.leave_at_random(
            lambda: chain([process.address for process in served]), made, clients=clients, at_once=4, seed=1
        )
        forgotten = _forgotten(served)
        counts = [asdict(process.server.stage.counts) for process in served]
    ok = came.clients == clients and not came.later_passes_after and forgotten
    return {"ok": ok, **asdict(came), "all_forgotten": forgotten, "counts": counts}


def _forgotten(served: Sequence[Process]) -> bool:
    """Whether nothing of any client is left, soon."""
    deadline = time.monotonic() + 10
    while any(process.server.clients or process.server.stage.shard._requests for process in served):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
