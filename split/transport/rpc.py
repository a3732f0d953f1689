"""Messages over torch.distributed.rpc: Linux and macOS, trusted networks only.

torch's RPC is pickle: anyone who can reach one of its ports can run code on the machine. So a master address off
loopback is refused unless the settings declare a trusted link. The client is rank 0 and holds an RRef to every
shard; shards hold RRefs to their neighbours. A lost process cannot be replaced in a running group.

RPC hands calls to threads, which loses their order: a sender numbers its messages to each receiver.
"""

import contextlib
import logging
import os
import queue
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
import torch.distributed.rpc as torch_rpc
from typing_extensions import override

from lab.settings import NetworkSettings, UserError
from lab.wire.frames import Head
from lab.wire.listener import is_loopback
from split.chain.messages import Fault, FaultCode, ShardFigures, Welcome
from split.transport.base import (
    REPORTED_PASSES,
    ChainLost,
    Hop,
    Message,
    ShardLost,
    ShardReport,
    Stage,
    To,
    Transport,
    ask_figures,
    check_layers,
    check_link,
    welcome_of,
)

log = logging.getLogger(__name__)

Packed = bytes | torch.Tensor
"""A body in transit."""

CLIENT = "client"
DOZE_SECONDS = 50e-6
WORKER_THREADS = 4
"""Threads of each process's agent: no call waits for another one."""
INLINE_BYTES = 2**16
"""Bodies up to this size travel inside the pickled call: one message; a separate tensor takes several."""


def check_master(network: NetworkSettings) -> None:
    """Refuse a system without torch's RPC, and a master address that strangers can reach. Raises UserError."""
    if not torch.distributed.rpc.is_available():
        raise UserError(f"project.transport must be tcp on {sys.platform}: this torch is built without rpc, got rpc")
    if not (is_loopback(network.host) or network.trusted_link):
        raise UserError(
            "network.host must be loopback for transport=rpc (it is pickle: anyone who reaches the port can run code), "
            f"or network.trusted_link=true if a VPN or a cable keeps strangers out, got {network.host!r}"
        )


def join_group(
    name: str,
    rank: int,
    world_size: int,
    network: NetworkSettings,
    port: int,
    worker_threads: int,
    start_seconds: float | None = None,
) -> None:
    """Join the group that the client opens at `network.host`:`port`. Raises UserError when it is not complete in time.

    Its default transport polls a whole core even when idle; libuv's does not.
    """
    check_master(network)
    if is_loopback(network.host):  # otherwise the machine's name decides which interface the agents use
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
    joined: Future[None] = Future()

    def join() -> None:
        try:
            torch_rpc.init_rpc(name, rank=rank, world_size=world_size, rpc_backend_options=options)
            joined.set_result(None)
        except Exception as error:
            joined.set_exception(error)

    # Not here: torch would wait for half an hour, and hear no signal meanwhile.
    threading.Thread(target=join, name="rpc group", daemon=True).start()
    try:
        joined.result(start_seconds)
    except TimeoutError:
        raise UserError(
            f"project.start_seconds must be long enough for the shards, rank 1 to {world_size - 1}, to come to "
            f"{network.host}:{port}, got {start_seconds:g}"
        ) from None
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"network.host and port must be those of this group's client: {name} of {world_size} could not join "
            f"{network.host}:{port} ({reason})"
        ) from None


def leave_group() -> None:
    """Leave the group without waiting for other members."""
    torch_rpc.shutdown(graceful=False)


class InOrderReceiver:
    """The messages of one sender, in the order in which it sent them."""

    def __init__(self) -> None:
        self._due = 1
        self._early: dict[int, Any] = {}

    def take(self, serial: int, what: Any) -> Iterator[Any]:
        """Take message number `serial`, from 1; yield those that are next in order."""
        self._early[serial] = what
        while self._due in self._early:
            yield self._early.pop(self._due)
            self._due += 1


class RpcShard:
    """A shard's member of the group: gives its stage the messages of each sender in order, on a separate thread.

    Args:
        stage: The shard's stage. Only our thread uses it.
        name: Name of the shard, for people.
        model_layers: Layers of the whole model.
        fingerprints: Of the model; the client must have the same.
        awake_seconds: Time after a message in which the thread only dozes until the next one comes.
    """

    worker_threads = WORKER_THREADS
    """Threads of the agent in its process."""

    def __init__(
        self, stage: Stage, name: str, model_layers: int, fingerprints: dict[str, str], awake_seconds: float = 0.0
    ) -> None:
        self.stage = stage
        self.left = threading.Event()
        """Set when the client has left."""
        self._name, self._model_layers, self._fingerprints = name, model_layers, fingerprints
        self._awake_seconds = awake_seconds
        self._neighbours: dict[To, Any] = {}
        self._sent = dict.fromkeys(To, 0)
        self.arrived: queue.SimpleQueue[tuple[To, int, float, Message]] = queue.SimpleQueue()
        """Messages with sender, serial number and time of arrival."""
        self._hops: deque[bytes] = deque(maxlen=REPORTED_PASSES)
        self._thread = threading.Thread(target=self._work, name="stage", daemon=True)

    def describe(self) -> tuple[Welcome, dict[str, str]]:
        """Layers and fingerprints, for the client to check."""
        return welcome_of(self.stage, self._model_layers), self._fingerprints

    def join(self, previous: Any, behind: Any) -> None:
        """Set our neighbours once the client has found all of them: their RRefs, None at the ends of the chain."""
        self._neighbours = {To.previous: previous, To.next: behind}
        self._thread.start()

    def report(self) -> tuple[ShardFigures, bytes]:
        """Our figures, and our last passes."""
        return self.stage.figures(self._name), b"".join(tuple(self._hops))

    def _work(self) -> None:
        senders = {origin: InOrderReceiver() for origin in To}
        while True:
            origin, serial, arrived, message = self._await_message()
            for moment, due in senders[origin].take(serial, (arrived, message)):
                self._do(moment, due)

    def _await_message(self) -> tuple[To, int, float, Message]:
        """The next message. Waits awake at first: a sleeping core takes tenths of a millisecond to work again."""
        until = time.monotonic() + self._awake_seconds
        while time.monotonic() < until:
            with contextlib.suppress(queue.Empty):
                return self.arrived.get(timeout=DOZE_SECONDS)
        return self.arrived.get()

    def _do(self, arrived: float, message: Message) -> None:
        began = time.monotonic()
        for to, result in self.stage.take(message):
            computed = time.monotonic()
            hop = Hop(arrived, began, computed, computed, self.stage.coding_seconds, len(result.body))
            self._hops.append(hop.pack(message.number))  # before a client with the answer can ask for it
            try:
                self._hand_on(to, result)
            except Exception as error:  # one result could not be sent; the next one may be
                log.exception("%s lost a message by a fault of ours", self._name)
                fault = Fault(code=FaultCode.failed, text=f"{type(error).__name__}: {error}"[:1024])
                self._hand_on(to, Message(result.number, fault))

    def _hand_on(self, to: To, message: Message) -> None:
        body, serial = pack(message.body), self._sent[to] + 1
        if to is To.client:
            name = torch_rpc.get_worker_info().name
            torch_rpc.rpc_async(CLIENT, _answer, args=(name, serial, message.number, message.head, body))
        else:
            self.stage.boundary_bytes += len(message.body)
            origin = To.previous if to is To.next else To.next
            future = deliver(self._neighbours[to], origin, serial, message.number, message.head, body)
            future.add_done_callback(_report_loss)
        self._sent[to] = serial  # not if that raised: the receiver would wait for it


def deliver(member: Any, origin: To, serial: int, number: int, head: Head, body: Packed) -> Any:
    """Send a message to the owner of an RRef; the future of its delivery. The RRef itself is not sent: torch
    counts each one that is, which takes messages of its own."""
    return torch_rpc.rpc_async(member.owner(), _deliver, args=(origin, serial, number, head, body))


def _report_loss(done: Any) -> None:
    """Tell the client if a neighbour could not be sent a message."""
    try:
        done.value()
    except RuntimeError as error:  # all of torch's RPC errors are
        torch_rpc.rpc_async(CLIENT, _note_lost, args=(f"a neighbour is gone ({_first_line(error)})",))


_RPC_SHARDS: list[RpcShard] = []
"""The shard of this process, for the client's RRef."""
INBOX: queue.SimpleQueue[tuple[str, int, Message] | ShardLost] = queue.SimpleQueue()
"""Answers to the client of this process. Remote calls find functions by name, so both of these must be global."""


def _own_rpc_shard() -> RpcShard:
    return _RPC_SHARDS[0]


def _deliver(origin: To, serial: int, number: int, head: Head, body: Packed) -> None:
    _RPC_SHARDS[0].arrived.put((origin, serial, time.monotonic(), Message(number, head, unpack(body))))


def _answer(name: str, serial: int, number: int, head: Head, body: Packed) -> None:
    INBOX.put((name, serial, Message(number, head, unpack(body))))


def _note_lost(text: str) -> None:
    INBOX.put(ShardLost(text))


def serve_rpc_shard(member: RpcShard, rank: int, world_size: int, network: NetworkSettings) -> None:
    """Serve one shard of a group until the client leaves or is lost. Raises UserError, KeyboardInterrupt."""
    _RPC_SHARDS[:] = [member]
    join_group(f"shard{rank}", rank, world_size, network, network.port, member.worker_threads)
    try:
        while not member.left.wait(network.heartbeat_seconds):
            try:
                torch_rpc.rpc_sync(CLIENT, _ping_client, timeout=network.dead_after_seconds)
            except RuntimeError as error:
                log.warning("the client is gone (%s)", _first_line(error))
                return
    finally:
        leave_group()


def _ping_client() -> None:
    pass


class RpcChain(Transport):
    """The client's end of a group: RRefs to all shards.

    Args:
        world_size: Processes of the group, this one included.
        network: Where the group meets, and the deadlines.
        port: The group's port; `network.port` unless that is 0.
        fingerprints: Of the model; every shard must have the same.
        worker_threads: Threads of this process's agent.
        start_seconds: How long the shards may take to come.

    Raises:
        UserError: a group that is refused or not complete, or holds other models.
        ChainMismatch: their layers do not make up the model.
    """

    def __init__(
        self,
        world_size: int,
        network: NetworkSettings,
        port: int,
        fingerprints: dict[str, str],
        worker_threads: int = WORKER_THREADS,
        *,
        start_seconds: float,
    ) -> None:
        self._network = network
        self._answers: deque[Message] = deque()
        self._lost: ShardLost | None = None
        self._closing = threading.Event()
        join_group(CLIENT, 0, world_size, network, port, worker_threads, start_seconds)
        names = [f"shard{rank}" for rank in range(1, world_size)]
        self._senders = {name: InOrderReceiver() for name in names}
        self._sent = [0 for _ in names]
        self.members: list[Any] = [torch_rpc.remote(name, _own_rpc_shard) for name in names]
        """RRefs, first to last."""
        try:
            described: list[tuple[Welcome, dict[str, str]]] = [member.rpc_sync().describe() for member in self.members]
            for _, theirs in described:
                _check_fingerprints(theirs, fingerprints)
            welcomes = [welcome for welcome, _ in described]
            check_layers(welcomes, names)
            for previous, member, behind in zip([None, *self.members], self.members, [*self.members[1:], None]):
                member.rpc_sync().join(previous, behind)
        except BaseException:
            self.shutdown()
            raise
        self.layers = [range(welcome.first, welcome.last) for welcome in welcomes]
        self.context = min(welcome.context for welcome in welcomes)
        threading.Thread(target=self._watch, name="rpc heartbeats", daemon=True).start()

    @override
    def send(self, shard: int, message: Message) -> None:
        if self._lost is not None:
            raise self._lost
        member = self.members[shard]
        self._sent[shard] += 1
        try:
            future = deliver(member, To.client, self._sent[shard], message.number, message.head, pack(message.body))
        except RuntimeError as error:
            raise self.lost(error) from None
        future.add_done_callback(lambda done: self._check_sent(member, done))

    @override
    def collect(self, wait_seconds: float | None = None) -> Message:
        seconds = self._network.request_timeout_seconds if wait_seconds is None else wait_seconds
        deadline = time.monotonic() + seconds
        while not self._answers:
            try:
                found = INBOX.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                if wait_seconds is not None:
                    raise TimeoutError from None
                raise ShardLost(f"no answer came within {seconds:g} s") from None
            if isinstance(found, ShardLost):
                raise found
            name, serial, answer = found
            self._answers.extend(self._senders[name].take(serial, answer))
        return check_link(self._answers.popleft())

    @override
    def restore(self, deadline: float) -> None:
        # A process that was lost cannot be replaced in a group of torch's RPC.
        raise ChainLost(f"{self._lost or 'a shard is lost'}; transport=rpc cannot replace it, transport=tcp can")

    @override
    def reports(self) -> list[ShardReport[ShardFigures]]:
        return [
            ask_figures(layers, partial(self._ask, member))
            for layers, member in zip(self.layers, self.members, strict=True)
        ]

    @override
    def shutdown(self) -> None:
        self._closing.set()
        for member in self.members:
            try:
                torch_rpc.rpc_sync(member.owner(), _leave_here, timeout=self._network.dead_after_seconds)
            except RuntimeError as error:
                # One that has heard it may be gone before its answer is here; one that has not misses our heartbeat.
                log.debug("%s did not answer that we leave (%s)", member.owner().name, _first_line(error))
        self.members.clear()
        leave_group()

    def lost(self, error: RuntimeError) -> ShardLost:
        """The loss that one of torch's errors reports."""
        reason = " ".join(str(error).split())[:300]  # the member, then its exception
        self._lost = self._lost or ShardLost(f"a shard is gone ({reason})")
        return self._lost

    def _ask(self, member: Any) -> tuple[ShardFigures, bytes, float]:
        try:
            figures, hops = member.rpc_sync().report()
        except RuntimeError as error:
            raise ShardLost(f"{member.owner().name} is gone ({_first_line(error)})") from None
        return figures, hops, time.monotonic()

    def _check_sent(self, member: Any, done: Any) -> None:
        try:
            done.value()
        except RuntimeError as error:
            self._lose(member, error)

    def _watch(self) -> None:
        """Notice a dead shard even while no answer is awaited."""
        while not self._closing.wait(self._network.heartbeat_seconds):
            for member in list(self.members):
                try:
                    torch_rpc.rpc_sync(member.owner(), _ping_client, timeout=self._network.dead_after_seconds)
                except RuntimeError as error:
                    self._lose(member, error)
                    return

    def _lose(self, member: Any, error: RuntimeError) -> None:
        if not self._closing.is_set():
            self._lost = self._lost or ShardLost(f"{member.owner().name} is gone ({_first_line(error)})")
            INBOX.put(self._lost)


def _leave_here() -> None:
    _RPC_SHARDS[0].left.set()


def _check_fingerprints(theirs: dict[str, str], fingerprints: dict[str, str]) -> None:
    for name, ours in fingerprints.items():
        if theirs[name] != ours:
            raise UserError(f"every shard must have our {name} {ours}, got {theirs[name]}")


def pack(body: bytes | memoryview) -> Packed:
    """A body for the wire."""
    return bytes(body) if len(body) <= INLINE_BYTES else as_tensor(body)


def unpack(body: Packed) -> memoryview:
    """The original body."""
    return memoryview(body) if isinstance(body, bytes) else body.numpy().data


def as_tensor(body: bytes | memoryview) -> torch.Tensor:
    """A tensor for the wire: tensors travel next to the pickled call, bytes inside it."""
    tensor = torch.empty(len(body), dtype=torch.uint8)
    tensor.numpy().data[:] = body
    return tensor


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
