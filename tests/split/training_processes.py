"""Shards that learn behind real sockets, each on an event loop of its own thread."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from lab.settings import ModelSettings
from lab.wire import Deadlines, Endpoint, Limits
from split.address import Address
from split.training_messages import PROTOCOL, training_table
from split.training_server import TrainingServer
from split.transport.training_tcp import TcpTraining
from tests.split.unsplit import Load, load_plain, stage

FINGERPRINTS = {"model": "tests:1", "dtype": "float32"}
MAX_BYTES = 2**22


def endpoint(role: str, key: bytes = b"", fingerprints: Mapping[str, str] = FINGERPRINTS) -> Endpoint:
    return Endpoint(
        role=role,
        peer_roles=frozenset({"learner"} if role == "trainer" else {"trainer", "learner"}),
        key=key,
        table=training_table(MAX_BYTES),
        protocol=PROTOCOL,
        limits=Limits(
            handshake_bytes=4096, payload_bytes=MAX_BYTES, backlog_bytes=MAX_BYTES, outgoing_bytes=4 * MAX_BYTES
        ),
        deadlines=Deadlines(connect_seconds=5, handshake_seconds=5, send_seconds=5, ping_seconds=0.3, dead_seconds=3.0),
        fingerprints=fingerprints,
    )


class Learner:
    """A shard that serves; `stop` takes it away with all its connections, as a kill does."""

    def __init__(
        self,
        settings: ModelSettings,
        layers: range,
        checkpoints: Path,
        *,
        port: int = 0,
        key: bytes = b"",
        load: Load = load_plain,
    ) -> None:
        self._server_of = lambda: TrainingServer(
            stage(settings, layers, checkpoints, load),
            layers=layers,
            model_layers=4,
            endpoint=endpoint("learner", key),
            next_addresses=[],
            client_tls=None,
        )
        self._port = port
        self._listening = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self.address: Address

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        server = self._server_of()
        self._task = self._loop.create_task(
            server.serve(host="127.0.0.1", port=self._port, max_connections=8, tls=None, announce=self._announced)
        )
        await asyncio.wait([self._task])

    def _announced(self, port: int) -> None:
        self.address = Address("127.0.0.1", port)
        self._listening.set()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._listening.wait(10), "the shard does not listen"
        return self

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._task.cancel)
            self._thread.join(10)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


@contextmanager
def over_tcp(
    settings: ModelSettings, cuts: Sequence[int], checkpoints: Path, load: Load = load_plain
) -> Iterator[TcpTraining]:
    """A chain of learners, and the trainer's end of it."""
    with ExitStack() as stack:
        learners = [
            stack.enter_context(Learner(settings, range(first, last), checkpoints, load=load))
            for first, last in itertools.pairwise(cuts)
        ]
        transport = connect([learner.address for learner in learners])
        stack.callback(transport.shutdown)
        yield transport


def connect(addresses: Sequence[Address], *, key: bytes = b"", start_seconds: float = 5.0) -> TcpTraining:
    return TcpTraining(
        addresses, [], endpoint("trainer", key), tls=None, answer_seconds=20.0, start_seconds=start_seconds
    )
