"""From settings to a chain of shards, whatever they do: the client's way to all of them, and one that serves."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from lab.command.processes import own_words
from lab.models.shape import ModelShape
from lab.models.sources import load_config
from lab.network import client_side_tls, listener_tls, make_endpoint
from lab.settings import ModelSettings, NetworkSettings, UserError
from lab.wire import Endpoint, MessageTable, WireError
from split.chain.address import Address
from split.chain.local_shards import LocalShards
from split.chain.process import check_rank, layers_to_serve, serve_port, serve_rank
from split.chain.server import ChainServer, Place
from split.settings import ChainSettings, TransportKind, parse_layers
from split.transport.base import ChainMismatch, ShardLost, Stage, Transport
from split.transport.inproc import InProcess
from split.transport.tcp import TcpChain

if TYPE_CHECKING:
    from split.transport.rpc import Seat  # some systems lack it

NOT_FOR_SHARDS = ("prompt", "project.local_shards=", "project.shards=", "project.cuts=", "network.port=", "hydra.")
"""Beginnings of the words of a client's command line that its shards do not get."""
StageT = TypeVar("StageT", bound=Stage)


class ChainOwner(Protocol):
    """Settings with a chain in them."""

    model: ModelSettings
    network: NetworkSettings

    @property
    def project(self) -> ChainSettings:
        """Where the shards are."""
        ...


@dataclass(frozen=True, kw_only=True)
class ChainKind:
    """Roles, process and protocol of the chains of one pillar."""

    client: str
    """Role of the client, on the wire and for people."""
    shard: str
    """Role of the shards."""
    module: str
    """Command of a shard's process."""
    protocol: range
    table: Callable[[int], MessageTable]
    """Frames of both roles, by the most bytes of a body."""
    worker_threads: int
    """Threads of each process's agent in a group of torch's RPC."""

    def endpoint(self, network: NetworkSettings, fingerprints: dict[str, str], role: str) -> Endpoint:
        """One side of the wire: a client talks to shards, a shard to both. UserError for what makes no sense."""
        return make_endpoint(
            network,
            role=role,
            peer_roles=frozenset({self.shard} if role == self.client else {self.client, self.shard}),
            table=self.table(network.max_frame_bytes),
            protocol=self.protocol,
            fingerprints=fingerprints,
        )


def cut_layers(model: ModelSettings, cuts: Sequence[int], count: int) -> list[range]:
    """The layers of `count` shards: between `cuts`, or even without any. UserError for cuts that do not fit."""
    total = ModelShape.of(load_config(model)).layers
    if not 1 <= count <= total:
        raise UserError(f"project.local_shards must be in [1, {total}] for this model, got {count}")
    if not cuts:
        cuts = [round(total * index / count) for index in range(1, count)]
    if len(cuts) != count - 1 or (cuts and cuts[-1] >= total):
        raise UserError(f"project.cuts must be {count - 1} numbers below the model's {total} layers, got {cuts}")
    return [range(first, last) for first, last in zip([0, *cuts], [*cuts, total])]


def free_port() -> int:
    """A port that was free just now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


# The client's side


@dataclass(frozen=True)
class LocalPlaces:
    """Settings of the shards that a client starts on this machine."""

    folder: Path
    """Where they log."""
    words: Sequence[str] | None = None
    """Their command line, but for their places; None: our own."""
    more_words: Sequence[str] = ()
    pin_cores: bool = False

    def all_words(self) -> list[str]:
        """The command line of each, but for its place."""
        words = own_words(NOT_FOR_SHARDS) if self.words is None else self.words
        return [*words, *self.more_words]


def open_chain(
    kind: ChainKind,
    settings: ChainOwner,
    fingerprints: dict[str, str],
    local: LocalPlaces,
    make_stage: Callable[[range], Stage],
    stack: ExitStack,
) -> Transport:
    """The way to the shards that the settings name, start or meet; `stack` leaves them, and ends those it started.

    Args:
        kind: The pillar.
        settings: The model, and where its shards are.
        fingerprints: Of the model; every shard must have the same.
        local: For shards that are started on this machine.
        make_stage: A shard in this process, by its layers.
        stack: Closes what this opens.

    Raises:
        UserError: shards that are not there, or are not this model from its first layer to its last.
    """
    project = settings.project
    if project.shards and project.local_shards:
        raise UserError(f"project.local_shards must be 0 where project.shards is given, got {project.local_shards}")
    if project.transport is TransportKind.rpc:
        transport = _meet(kind, settings, fingerprints, local, stack)
    else:
        transport = _reach(kind, settings, fingerprints, local, make_stage, stack)
    stack.callback(transport.shutdown)  # before the processes end
    return transport


def _reach(
    kind: ChainKind,
    settings: ChainOwner,
    fingerprints: dict[str, str],
    local: LocalPlaces,
    make_stage: Callable[[range], Stage],
    stack: ExitStack,
) -> Transport:
    project, addresses = settings.project, settings.project.shards
    count = len(addresses) or project.local_shards
    if not count:
        raise UserError("project.shards must name at least one shard (or set project.local_shards), got []")
    if project.transport is TransportKind.inproc:
        return InProcess([make_stage(layers) for layers in cut_layers(settings.model, project.cuts, count)])
    if not addresses:
        layers = cut_layers(settings.model, project.cuts, count)
        shards = LocalShards(
            layers, local.folder, project.start_seconds, local.all_words(), module=kind.module, pin=local.pin_cores
        )
        addresses = [str(address) for address in stack.enter_context(shards).addresses]
    return connect(kind, settings.network, fingerprints, addresses, project.spares, project.start_seconds)


def connect(
    kind: ChainKind,
    network: NetworkSettings,
    fingerprints: dict[str, str],
    addresses: Sequence[str],
    spares: Sequence[str],
    start_seconds: float,
) -> TcpChain:
    """The way to shards that listen at `addresses`, `host:port` each. UserError as `open_chain`."""
    try:
        return TcpChain(
            [Address.parse(text) for text in addresses],
            [Address.parse(text) for text in spares],
            kind.endpoint(network, fingerprints, kind.client),
            tls=client_side_tls(network),
            answer_seconds=network.request_timeout_seconds,
            start_seconds=start_seconds,
        )
    except ChainMismatch as error:
        raise UserError(f"project.shards: {error}") from None
    except (ShardLost, WireError) as error:
        raise UserError(f"project.shards must be reachable and hold this model: {error}") from None


def _meet(
    kind: ChainKind, settings: ChainOwner, fingerprints: dict[str, str], local: LocalPlaces, stack: ExitStack
) -> Transport:
    """A group of torch's RPC, of shards that come to us."""
    from split.transport.rpc import RpcChain, check_master  # some systems lack it

    check_master(settings.network)
    project, port, world_size = settings.project, settings.network.port, settings.project.world_size
    if project.local_shards:
        port, world_size = free_port(), project.local_shards + 1
        layers = cut_layers(settings.model, project.cuts, project.local_shards)
        stack.enter_context(
            LocalShards.of_group(layers, local.folder, port, local.all_words(), module=kind.module, pin=local.pin_cores)
        )
    elif project.shards or not world_size:
        raise UserError(
            f"project.world_size must be set for transport=rpc, where shards come to the {kind.client}, "
            f"got {world_size}"
        )
    try:
        return RpcChain(world_size, settings.network, port, fingerprints, kind.worker_threads)
    except ChainMismatch as error:
        raise UserError(str(error)) from None


# A shard's side


def serve_shard(
    kind: ChainKind,
    settings: ChainOwner,
    fingerprints: dict[str, str],
    load: Callable[[range], StageT],
    make_server: Callable[[StageT, Place], ChainServer],
    make_seat: Callable[[StageT, str, int, dict[str, str]], Seat],
) -> tuple[StageT, int]:
    """Load a stage and serve it until Ctrl+C; the stage, and how many clients there were.

    Args:
        kind: The pillar.
        settings: The model, the layers, and where the shard listens.
        fingerprints: Of the model; every client must have the same.
        load: Makes the stage of these layers; called once the rest is known to be right.
        make_server: Makes its server, over tcp.
        make_seat: Makes its seat, in a group: from the stage, its name, the model's layers and the fingerprints.

    Raises:
        UserError: what cannot be served.
    """
    project, network = settings.project, settings.network
    text = layers_to_serve(project)
    name, layers = f"{settings.model.name} {text}", parse_layers(text)
    if project.transport is TransportKind.rpc:
        from split.transport.rpc import check_master  # some systems lack it

        check_master(network)
        check_rank(project)
        stage = load(layers)
        seat = make_seat(stage, name, ModelShape.of(load_config(settings.model)).layers, fingerprints)
        serve_rank(seat, project, network)
        return stage, 1
    tls = listener_tls(network)
    stage = load(layers)
    place = Place(
        name=name,
        model_layers=ModelShape.of(load_config(settings.model)).layers,
        endpoint=kind.endpoint(network, fingerprints, kind.shard),
        next_addresses=[Address.parse(project.next)] if project.next else [],
        client_tls=client_side_tls(network),
    )
    server = make_server(stage, place)
    serve_port(server, project, network, tls, role=kind.shard, peer_role=kind.client)
    return stage, server.attached
