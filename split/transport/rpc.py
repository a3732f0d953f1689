"""Messages over torch.distributed.rpc: Linux and macOS, trusted networks only.

torch's RPC is pickle: whoever reaches one of its ports runs code on the machine. So a master address off loopback is
refused unless the settings say that strangers are kept out. The client is rank 0 and holds an RRef to the seat of every
shard; seats hold RRefs to the next seat. A process that is lost cannot be replaced in a running group.

RPC hands out calls to threads, so that their order is lost: every message has a serial number, and is done in its turn.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.rpc as torch_rpc

from lab.settings import NetworkSettings, UserError
from lab.wire import Head, is_loopback
from split.chain.messages import Fault, FaultCode
from split.inference.messages import Close, Pass
from split.inference.stage import Stage
from split.transport.base import ChainLost, Hop, Message, ShardLost, ShardReport
from split.transport.inproc import report_of

log = logging.getLogger(__name__)

Packed = bytes | torch.Tensor
"""A body on its way."""

CLIENT = "client"
HOPS_KEPT = 4096
DOZE_SECONDS = 50e-6
WORKER_THREADS = 4
"""Of each process's agent: no call waits for another one here."""
INLINE_BYTES = 2**16
"""Bodies up to here travel inside the pickled call: one message, where a tensor beside it takes several."""


def check_master(network: NetworkSettings) -> None:
    """Refuse a system without torch's RPC, and a master address that strangers could reach. Raises UserError."""
    if not torch.distributed.rpc.is_available():
        raise UserError(f"project.transport must be tcp on {sys.platform}: this torch is built without rpc, got rpc")
    if not (is_loopback(network.host) or network.trusted_link):
        raise UserError(
            "network.host must be loopback for transport=rpc (it is pickle: whoever reaches the port runs code here), "
            f"or network.trusted_link=true where a VPN or a cable keeps strangers out, got {network.host!r}"
        )


def join_group(name: str, rank: int, world_size: int, network: NetworkSettings, port: int, worker_threads: int) -> None:
    """Join the group that the client opens at `network.host`:`port`. Raises UserError when it is not complete in time.

    Its default transport polls a whole core even when idle; libuv's does not.
    """
    check_master(network)
    if is_loopback(network.host):  # else the machine's name decides on which interface the agents listen
        loopback = "lo" if sys.platform == "linux" else "lo0"
        os.environ.setdefault("TP_SOCKET_IFNAME", loopback)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    warnings.filterwarnings("ignore", message="You are using a Backend")
    options = torch_rpc.TensorPipeRpcBackendOptions(
        num_worker_threads=worker_threads,
        init_method=f"tcp://{network.host}:{port}",
        rpc_timeout=network.request_timeout_seconds,
        _transports=["uv"],
    )
    try:
        torch_rpc.init_rpc(name, rank=rank, world_size=world_size, rpc_backend_options=options)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"network.host and port must be where the client of this group is: {name} of {world_size} could not join "
            f"{network.host}:{port} ({reason})"
        ) from None


def leave_group() -> None:
    """End our part, without waiting for anyone."""
    torch_rpc.shutdown(graceful=False)


@dataclass(frozen=True)
class Place:
    """What a seat holds, for the client to check."""

    name: str
    layers: range
    model_layers: int
    context: int
    fingerprints: dict[str, str]


class Member:
    """What every seat of a group can be asked."""

    worker_threads = WORKER_THREADS
    """Of its process's agent."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.left = threading.Event()
        """Set when the client has said goodbye."""

    def describe(self) -> Place:
        """For the client."""
        return self.place

    def leave(self) -> None:
        """The client has gone."""
        self.left.set()


class Seat(Member):
    """A stage in a group: takes messages in the order of their serial numbers, on one thread of its own.

    Args:
        stage: The shard. Its thread is the seat's.
        place: What it holds.
        awake_seconds: For so long after a message the thread only dozes until the next one comes.
    """

    def __init__(self, stage: Stage, place: Place, awake_seconds: float) -> None:
        super().__init__(place)
        self._stage = stage
        self._awake_seconds = awake_seconds
        self._next: Any = None
        self._arrived: queue.SimpleQueue[tuple[int, float, Message]] = queue.SimpleQueue()
        self._hops: dict[int, Hop] = {}
        self._thread = threading.Thread(target=self._work, name="forward", daemon=True)

    def join(self, next_seat: Any) -> None:
        """The client has found all seats; `next_seat` is the RRef of the one behind us, None at the last."""
        self._next = next_seat
        self._thread.start()

    def deliver(self, serial: int, number: int, head: Head, body: Packed) -> None:
        """Take a message; it is done in its turn."""
        self._arrived.put((serial, time.monotonic(), Message(number, head, unpack(body))))

    def report(self) -> tuple[float, ShardReport]:
        """Our clock, and our figures by it."""
        return time.monotonic(), report_of(self._stage, self.place.name, dict(self._hops))

    def _work(self) -> None:
        due = 1
        early: dict[int, tuple[float, Message]] = {}
        while True:
            serial, arrived, message = self._await_message()
            early[serial] = arrived, message
            while due in early:
                self._surely_do(due, *early.pop(due))
                due += 1

    def _surely_do(self, serial: int, arrived: float, message: Message) -> None:
        try:
            self._do(serial, arrived, message)
        except Exception as error:  # what came of one message could not be handed on; the next one's may
            log.exception("%s lost a message by a fault of ours", self.place.name)
            fault = Fault(code=FaultCode.failed, text=f"{type(error).__name__}: {error}"[:1024])
            tell_client(serial, message.number, fault, b"")

    def _await_message(self) -> tuple[int, float, Message]:
        """A core that sleeps until the next pass takes tenths of a millisecond to be at work again."""
        until = time.monotonic() + self._awake_seconds
        while time.monotonic() < until:
            with contextlib.suppress(queue.Empty):
                return self._arrived.get(timeout=DOZE_SECONDS)
        return self._arrived.get()

    def _do(self, serial: int, arrived: float, message: Message) -> None:
        began = time.monotonic()
        result = self._stage.take(0, message)
        computed = sent = time.monotonic()
        if result is not None:
            body = pack(result.body)
            sent = time.monotonic()
            if self._next is None:
                tell_client(serial, result.number, result.head, body)
            else:
                future = deliver(self._next, serial, result.number, result.head, body)
                future.add_done_callback(lambda done: check_delivered(done, serial, result.number))
        if isinstance(message.head, Pass):
            size = len(result.body) if result else 0
            self._hops[message.number] = Hop(arrived, began, computed, sent, self._stage.coding_seconds, size)
            self._hops.pop(message.number - HOPS_KEPT, None)


def deliver(seat: Any, serial: int, number: int, head: Head, body: Packed) -> Any:
    """Send the owner of an RRef a message for its seat; the future of its delivery. The RRef itself stays here: each
    one that travels is counted, which takes messages of its own."""
    return torch_rpc.rpc_async(seat.owner(), _deliver, args=(serial, number, head, body))


def check_delivered(done: Any, serial: int, number: int) -> None:
    """Tell the client when a neighbour could not be given a message."""
    try:
        done.value()
    except RuntimeError as error:  # all of torch's RPC errors are
        fault = Fault(code=FaultCode.link, text=f"the next shard is gone ({_first_line(error)})")
        tell_client(serial, number, fault, b"")


def tell_client(serial: int, number: int, head: Head, body: Packed) -> None:
    """Send the client an answer."""
    torch_rpc.rpc_async(CLIENT, _answer, args=(serial, number, head, body))


_SEATS: list[Member] = []
"""The seat of this process, for the client's RRef."""
INBOX: queue.SimpleQueue[tuple[int, Message | ShardLost]] = queue.SimpleQueue()
"""Answers to the client of this process. Remote calls find functions by name, so that both must be global."""


def _seat_here() -> Member:
    return _SEATS[0]


def _deliver(serial: int, number: int, head: Head, body: Packed) -> None:
    seat = _SEATS[0]
    assert isinstance(seat, Seat)
    seat.deliver(serial, number, head, body)


def _answer(serial: int, number: int, head: Head, body: Packed) -> None:
    INBOX.put((serial, Message(number, head, unpack(body))))


def serve_seat(seat: Member, rank: int, world_size: int, network: NetworkSettings) -> None:
    """Be one shard of a group until the client leaves or is lost. Raises UserError, KeyboardInterrupt."""
    _SEATS[:] = [seat]
    join_group(f"shard{rank}", rank, world_size, network, network.port, seat.worker_threads)
    try:
        while not seat.left.wait(network.heartbeat_seconds):
            try:
                torch_rpc.rpc_sync(CLIENT, _ping_client, timeout=network.dead_after_seconds)
            except RuntimeError as error:
                log.warning("the client is gone (%s)", _first_line(error))
                return
    finally:
        leave_group()


def _ping_client() -> None:
    pass


class RpcChain:
    """The client's end of a group: RRefs to the seats of all shards.

    Args:
        world_size: Processes of the group, this one included.
        network: Where the group meets, and the deadlines.
        port: The group's port; `network.port` unless that is 0.
        fingerprints: What every shard must have alike with us.

    Raises:
        UserError: a group that is refused or not complete, other models, layers that do not make up the model.
    """

    worker_threads = WORKER_THREADS
    """Of this process's agent."""

    def __init__(self, world_size: int, network: NetworkSettings, port: int, fingerprints: dict[str, str]) -> None:
        self._network = network
        self._serial = 0
        self._awaited: list[int] = []
        self._early: dict[int, Message] = {}
        self._lost: ShardLost | None = None
        self._closing = threading.Event()
        join_group(CLIENT, 0, world_size, network, port, self.worker_threads)
        names = [f"shard{rank}" for rank in range(1, world_size)]
        self._seats: list[Any] = [torch_rpc.remote(name, _seat_here) for name in names]
        try:
            self._places: list[Place] = [seat.rpc_sync().describe() for seat in self._seats]
            _check_places(self._places, fingerprints)
            self._link()
        except BaseException:
            self.shutdown()
            raise
        threading.Thread(target=self._watch, name="rpc heartbeats", daemon=True).start()

    def _link(self) -> None:
        """Tell every seat who comes behind it."""
        for seat, behind in zip(self._seats, [*self._seats[1:], None], strict=True):
            seat.rpc_sync().join(behind)

    @property
    def layers(self) -> list[range]:
        """Of each shard."""
        return [place.layers for place in self._places]

    @property
    def context(self) -> int:
        """The most tokens of a text that every shard takes."""
        return min(place.context for place in self._places)

    def submit(self, message: Message) -> None:
        """See `Transport.submit`."""
        if self._lost is not None:
            raise self._lost
        self._serial += 1
        if not isinstance(message.head, Close):
            self._awaited.append(self._serial)
        future = deliver(self._seats[0], self._serial, message.number, message.head, pack(message.body))
        future.add_done_callback(self._check_submitted)

    def collect(self, wait_seconds: float | None = None) -> Message:
        """See `Transport.collect`; a group has one client, whose OPENs wait for nobody."""
        serial = self._awaited.pop(0)
        deadline = time.monotonic() + self._network.request_timeout_seconds
        while serial not in self._early:
            try:
                found, answer = INBOX.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                seconds = self._network.request_timeout_seconds
                raise ShardLost(f"no answer came within {seconds:g} s") from None
            if isinstance(answer, ShardLost):
                raise answer
            self._early[found] = answer
        answer = self._early.pop(serial)
        if isinstance(answer.head, Fault) and answer.head.code is FaultCode.link:
            raise ShardLost(answer.head.text)
        return answer

    def restore(self, deadline: float) -> None:
        """See `Transport.restore`: a process that was lost cannot be replaced in a group of torch's RPC."""
        raise ChainLost(f"{self._lost or 'a shard is lost'}; transport=rpc cannot replace it, transport=tcp can")

    def reports(self) -> list[ShardReport]:
        """See `Transport.reports`."""
        return [self._report(seat) for seat in self._seats]

    def shutdown(self) -> None:
        """See `Transport.shutdown`. Returns when every shard that lives has been told."""
        self._closing.set()
        for seat in self._seats:
            try:
                torch_rpc.rpc_sync(seat.owner(), _leave_here, timeout=self._network.dead_after_seconds)
            except RuntimeError as error:
                log.info("%s did not hear that we leave (%s)", seat.owner().name, _first_line(error))
        self._seats.clear()
        leave_group()

    def _report(self, seat: Any) -> ShardReport:
        asked = time.monotonic()
        try:
            clock, report = seat.rpc_sync().report()
        except RuntimeError as error:
            raise ShardLost(f"{seat.owner().name} is gone ({_first_line(error)})") from None
        offset = (asked + time.monotonic()) / 2 - clock
        hops = {
            number: hop._replace(
                arrived=hop.arrived + offset,
                began=hop.began + offset,
                computed=hop.computed + offset,
                sent=hop.sent + offset,
            )
            for number, hop in report.hops.items()
        }
        return ShardReport(**{**vars(report), "hops": hops})

    def _check_submitted(self, done: Any) -> None:
        try:
            done.value()
        except RuntimeError as error:
            self._lose(ShardLost(f"shard1 is gone ({_first_line(error)})"))

    def _watch(self) -> None:
        """A dead shard is noticed although nobody waits for it just now."""
        while not self._closing.wait(self._network.heartbeat_seconds):
            for seat in list(self._seats):
                try:
                    torch_rpc.rpc_sync(seat.owner(), _ping_client, timeout=self._network.dead_after_seconds)
                except RuntimeError as error:
                    if not self._closing.is_set():
                        self._lose(ShardLost(f"{seat.owner().name} is gone ({_first_line(error)})"))
                    return

    def _lose(self, lost: ShardLost) -> None:
        self._lost = self._lost or lost
        INBOX.put((0, lost))


def _leave_here() -> None:
    _SEATS[0].leave()


def _check_places(places: Sequence[Place], fingerprints: dict[str, str]) -> None:
    expected = 0
    for place in places:
        for name, ours in fingerprints.items():
            if place.fingerprints[name] != ours:
                raise UserError(f"every shard must have our {name} {ours}, got {place.fingerprints[name]}")
        if place.layers.start != expected:
            raise UserError(
                f"layers of the shards must go on at {expected}, got {place.layers.start}:{place.layers.stop}"
            )
        expected = place.layers.stop
    if expected != places[-1].model_layers:
        raise UserError(f"layers of the shards must end at the model's {places[-1].model_layers}, got {expected}")


def pack(body: bytes | memoryview) -> Packed:
    """A body as it travels."""
    return bytes(body) if len(body) <= INLINE_BYTES else as_tensor(body)


def unpack(body: Packed) -> memoryview:
    """A body as it was."""
    return memoryview(body) if isinstance(body, bytes) else body.numpy().data


def as_tensor(body: bytes | memoryview) -> torch.Tensor:
    """Tensors travel beside the pickled call, bytes inside it."""
    tensor = torch.empty(len(body), dtype=torch.uint8)
    tensor.numpy().data[:] = body
    return tensor


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
