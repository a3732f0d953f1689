"""Shards that learn behind real sockets."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lab.settings import ModelSettings
from lab.wire.endpoint import Endpoint
from split.chain.address import Address
from split.chain.server import Place
from split.training.messages import PROTOCOL, table
from split.training.open import TrainingServer
from split.transport.tcp import TcpChain
from tests.split.listening import MAX_BYTES, Listening, endpoint_for_tests
from tests.split.training.unsplit import stage

FINGERPRINTS = {"model": "tests:1", "dtype": "float32"}


def endpoint(role: str, key: bytes = b"", fingerprints: Mapping[str, str] = FINGERPRINTS) -> Endpoint:
    return endpoint_for_tests(
        role, {"learner"} if role == "trainer" else {"trainer", "learner"}, table(MAX_BYTES), PROTOCOL,
        key=key, fingerprints=fingerprints, ping_seconds=0.3, dead_seconds=3.0,
    )  # fmt: skip


class Learner(Listening[TrainingServer]):
    """A shard that learns."""

    def __init__(
        self,
        settings: ModelSettings,
        layers: range,
        checkpoints: Path,
        *,
        port: int = 0,
        key: bytes = b"",
    ) -> None:
        super().__init__(port)
        self.stage = stage(settings, layers, checkpoints)
        self._endpoint = endpoint("learner", key)

    def make_server(self) -> TrainingServer:
        place = Place(name="", model_layers=4, endpoint=self._endpoint, next_addresses=[], client_tls=None)
        return TrainingServer(self.stage, place)


@contextmanager
def learners_of(settings: ModelSettings, cuts: Sequence[int], checkpoints: Path) -> Iterator[list[Learner]]:
    """A shard between every two cuts."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(Learner(settings, range(first, last), checkpoints))
            for first, last in itertools.pairwise(cuts)
        ]


@contextmanager
def connected(learners: Sequence[Learner]) -> Iterator[TcpChain]:
    """The trainer's end of their chain."""
    transport = connect([learner.address for learner in learners])
    try:
        yield transport
    finally:
        transport.shutdown()


@contextmanager
def over_tcp(settings: ModelSettings, cuts: Sequence[int], checkpoints: Path) -> Iterator[TcpChain]:
    """A chain of learners, and the trainer's end of it."""
    with learners_of(settings, cuts, checkpoints) as learners, connected(learners) as transport:
        yield transport


def connect(addresses: Sequence[Address], *, key: bytes = b"", start_seconds: float = 5.0) -> TcpChain:
    return TcpChain(addresses, [], endpoint("trainer", key), tls=None, answer_seconds=20.0, start_seconds=start_seconds)
