"""The process of a shard that learns: hidden states go to the next shard, gradients to the one before it.

One trainer at a time. The link between two neighbours is one connection, both ways. When the trainer's connection
ends, the run ends here, and the links with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from typing_extensions import override

from lab.wire import BadFrame, Endpoint, Frame, FrameConnection, WireError
from split.chain.address import Address
from split.chain.messages import Attach, Join, send
from split.chain.server import ChainServer, tell_lost
from split.training.settings import MAX_MICRO_BATCHES
from split.training.stage import To, TrainingStage
from split.transport.base import Message

log = logging.getLogger(__name__)

WAITING_MESSAGES = 4 * MAX_MICRO_BATCHES
"""Taken from the sockets and not yet done; a schedule never has more under way."""


@dataclass
class _Run:
    """A trainer and its chain, at this shard."""

    trainer: int
    """The number that it attached with."""
    connections: dict[To, FrameConnection]
    waiting: asyncio.Queue[Message] = field(default_factory=lambda: asyncio.Queue(WAITING_MESSAGES))


class TrainingServer(ChainServer):
    """Serves one stage. Belongs to its event loop; the stage's work is done on one thread of its own.

    Args:
        stage: The shard; its thread is the server's.
        layers: Which it holds.
        model_layers: Of the whole model.
        endpoint: Our side of the wire, role `learner`, talking to trainers and learners.
        next_addresses: Where the next shard may be found from here; goes before what the trainer says.
        client_tls: For the link to the next shard.
    """

    def __init__(
        self,
        stage: TrainingStage,
        *,
        layers: range,
        model_layers: int,
        endpoint: Endpoint,
        next_addresses: Sequence[Address],
        client_tls: ssl.SSLContext | None,
    ) -> None:
        super().__init__(
            layers=layers,
            model_layers=model_layers,
            endpoint=endpoint,
            next_addresses=next_addresses,
            client_tls=client_tls,
        )
        self._stage = stage
        self._run: _Run | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stage")

    @override
    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    # The chain

    @override
    async def serve_client(self, connection: FrameConnection, attach: Attach) -> None:
        if self._run is not None:
            tell_lost(connection, "this shard learns for another trainer")
            raise BadFrame(connection.peer, "attached while another trainer is")
        run = self._run = _Run(attach.client, {To.trainer: connection})
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(self._work(run))]
        try:
            if self.layers.stop < self._model_layers:
                run.connections[To.next] = await self.join_next(connection, attach)
                tasks.append(loop.create_task(self._take_neighbours(run, run.connections[To.next])))
            self._welcome(connection)
            await self._take_all(run, connection)
        finally:
            self._run = None
            for task in tasks:
                task.cancel()
            with contextlib.suppress(RuntimeError):  # the server has ended
                self._thread.submit(self._stage.forget)
            for to, other in run.connections.items():
                if to is not To.trainer:
                    other.close()

    @override
    async def serve_previous(self, connection: FrameConnection, join: Join) -> None:
        run = self._run
        if run is None or run.trainer != join.client or To.previous in run.connections:
            raise BadFrame(connection.peer, "joined for a trainer that is not attached")
        run.connections[To.previous] = connection
        self._welcome(connection)
        await self._take_neighbours(run, connection)

    async def _take_neighbours(self, run: _Run, connection: FrameConnection) -> None:
        """When a neighbour is lost the trainer is to know which one, and why."""
        try:
            await self._take_all(run, connection)
        except WireError as error:
            trainer = run.connections[To.trainer]
            if trainer.fault is None:
                log.warning("%s", error)
                tell_lost(trainer, str(error))

    async def _take_all(self, run: _Run, connection: FrameConnection) -> None:
        while True:
            frame: Frame = await connection.recv()
            try:
                run.waiting.put_nowait(Message(frame.session, frame.head, frame.body))
            except asyncio.QueueFull:
                raise BadFrame(connection.peer, f"sent more than {WAITING_MESSAGES} messages ahead") from None

    # The work

    async def _work(self, run: _Run) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                results = self._stage.take(await run.waiting.get())
                while (result := await loop.run_in_executor(self._thread, next, results, None)) is not None:
                    to, message = result
                    await self._send(to, run.connections[to], message)
        except WireError as error:
            log.info("%s", error)
            run.connections[To.trainer].close()
        except Exception:
            log.exception("layers %s lost the trainer by a fault of ours", self.layers)
            run.connections[To.trainer].close()

    async def _send(self, to: To, connection: FrameConnection, message: Message) -> None:
        await connection.drain()  # before, not after: the next operation runs while this travels
        before = connection.bytes_sent
        send(connection, message.number, message.head, message.body)
        if to is not To.trainer:
            self._stage.boundary_bytes += connection.bytes_sent - before

    def _welcome(self, connection: FrameConnection) -> None:
        self.welcome(connection, "training", context=0, sessions=1)
