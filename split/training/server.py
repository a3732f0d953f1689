"""The process of a shard that learns: hidden states go to the next shard, gradients to the one before it.

One trainer at a time. The link between two neighbours is one connection, both ways. When the trainer's connection
ends, the run ends here, and the links with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import ssl
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from lab.wire import BadFrame, Endpoint, Frame, FrameConnection, WireError
from split.chain.address import Address
from split.chain.next_shard import Behind, first_head, join_next, link_fault, say
from split.inference.messages import Attach, Join, Welcome
from split.training.messages import MAX_MICRO_BATCHES, training_type
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


class TrainingServer:
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
        self._stage, self._layers, self._model_layers = stage, layers, model_layers
        self.endpoint = endpoint
        to_next = replace(endpoint, peer_roles=frozenset({endpoint.role}))
        self._behind = Behind(layers, model_layers, list(next_addresses), to_next, client_tls)
        self._instance = secrets.randbits(32)
        self._run: _Run | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stage")

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Its thread works as long as the block lasts."""
        try:
            yield
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def handle(self, connection: FrameConnection) -> None:
        """One connection, until it ends."""
        head = await first_head(connection)
        if isinstance(head, Attach):
            await self._serve_trainer(connection, head)
        elif isinstance(head, Join):
            await self._serve_previous(connection, head)
        else:
            raise BadFrame(connection.peer, f"began with {type(head).__name__.upper()}, not with ATTACH or JOIN")

    # The chain

    async def _serve_trainer(self, connection: FrameConnection, attach: Attach) -> None:
        connection.peer.phase = "ATTACH"
        if self._run is not None:
            say(connection, link_fault("this shard learns for another trainer"))
            raise BadFrame(connection.peer, "attached while another trainer is")
        run = self._run = _Run(attach.client, {To.trainer: connection})
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(self._work(run))]
        try:
            if self._layers.stop < self._model_layers:
                run.connections[To.next] = await join_next(self._behind, connection, attach)
                tasks.append(loop.create_task(self._take_neighbours(run, run.connections[To.next])))
            say(connection, self._welcome())
            connection.peer.phase = "training"
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

    async def _serve_previous(self, connection: FrameConnection, join: Join) -> None:
        run = self._run
        if run is None or run.trainer != join.client or To.previous in run.connections:
            raise BadFrame(connection.peer, "joined for a trainer that is not attached")
        run.connections[To.previous] = connection
        say(connection, self._welcome())
        connection.peer.phase = "training"
        await self._take_neighbours(run, connection)

    async def _take_neighbours(self, run: _Run, connection: FrameConnection) -> None:
        """When a neighbour is lost the trainer is to know which one, and why."""
        try:
            await self._take_all(run, connection)
        except WireError as error:
            trainer = run.connections[To.trainer]
            if trainer.fault is None:
                log.warning("%s", error)
                say(trainer, link_fault(str(error)))

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
            log.exception("layers %s lost the trainer by a fault of ours", self._layers)
            run.connections[To.trainer].close()

    async def _send(self, to: To, connection: FrameConnection, message: Message) -> None:
        await connection.drain()  # before, not after: the next operation runs while this travels
        before = connection.bytes_sent
        connection.send(training_type(message.head), message.number, message.head, message.body)
        if to is not To.trainer:
            self._stage.boundary_bytes += connection.bytes_sent - before

    def _welcome(self) -> Welcome:
        return Welcome(
            instance=self._instance,
            first=self._layers.start,
            last=self._layers.stop,
            model_layers=self._model_layers,
            context=0,
            sessions=1,
        )
