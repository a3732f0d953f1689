"""Shards behind real sockets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lab.wire.endpoint import Endpoint
from split.chain.address import Address
from split.chain.boundary import Boundary
from split.chain.server import Place
from split.inference.messages import PROTOCOL, table
from split.inference.server import ShardServer
from split.inference.shard import Shard
from split.inference.stage import InferenceStage
from split.transport.tcp import TcpChain
from tests.split.listening import MAX_BYTES, Listening, endpoint_for_tests

FINGERPRINTS = {"model": "tests:1", "dtype": "float32", "boundary": "float32"}


def endpoint(role: str, key: bytes = b"", fingerprints: Mapping[str, str] = FINGERPRINTS) -> Endpoint:
    return endpoint_for_tests(
        role, {"shard"} if role == "client" else {"client", "shard"}, table(MAX_BYTES), PROTOCOL,
        key=key, fingerprints=fingerprints, ping_seconds=0.2, dead_seconds=1.0,
    )  # fmt: skip


class Process(Listening[ShardServer]):
    """A shard that runs."""

    def __init__(
        self,
        shard: Shard,
        *,
        port: int = 0,
        next_addresses: Sequence[Address] = (),
        boundary: Boundary = Boundary.float32,
        ours: Endpoint | None = None,
        awake_seconds: float = 0.02,
        most_waiting: int = 8,
    ) -> None:
        super().__init__(port)
        self._shard, self._next_addresses, self._boundary = shard, next_addresses, boundary
        self._endpoint = ours or endpoint("shard")
        self._awake_seconds, self._most_waiting = awake_seconds, most_waiting

    def make_server(self) -> ShardServer:
        layers = self._shard.layers
        place = Place(
            name=f"layers {layers.start}:{layers.stop}",
            model_layers=4,
            endpoint=self._endpoint,
            next_addresses=self._next_addresses,
            client_tls=None,
        )
        stage = InferenceStage(self._shard, self._boundary)
        return ShardServer(stage, place, awake_seconds=self._awake_seconds, most_waiting=self._most_waiting)


def chain(
    addresses: Sequence[Address], *, spares: Sequence[Address] = (), key: bytes = b"",
    fingerprints: Mapping[str, str] = FINGERPRINTS, start_seconds: float = 5.0,
) -> TcpChain:  # fmt: skip
    return TcpChain(
        addresses,
        spares,
        endpoint("client", key, fingerprints),
        tls=None,
        answer_seconds=20.0,
        start_seconds=start_seconds,
    )
