"""From settings to a chain of shards, for inference and training: the client's end of it, and a shard that serves."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lab.command.ending import run_async
from lab.command.processes import own_overrides, say_listening, say_ready
from lab.models.shape import ModelShape
from lab.models.sources import load_config
from lab.network import address_for_peers, cannot_listen, client_side_tls, listener_tls, make_endpoint
from lab.settings import ModelSettings, NetworkSettings, UserError
from lab.wire.endpoint import Endpoint
from lab.wire.faults import WireError
from lab.wire.frames import MessageTable
from split.chain.address import Address
from split.chain.local_shards import LocalShards
from split.chain.process import serve, until_stopped
from split.chain.server import ChainServer, Place
from split.settings import ChainSettings, TransportKind, parse_layers
from split.transport.base import ChainMismatch, ShardLost, Stage, Transport
from split.transport.inproc import InProcess
from split.transport.tcp import TcpChain

if TYPE_CHECKING:
    from split.transport.rpc import RpcShard  # some systems lack it

NOT_FOR_SHARDS = ("prompt", "project.local_shards=", "project.shards=", "project.cuts=", "network.port=", "hydra.")
"""Overrides of the client that are not passed on to its shards begin with these."""
StageT = TypeVar("StageT", bound=Stage)


@dataclass(frozen=True)
class LocalPlaces:
    """Settings of the shards that a client starts on this machine."""

    folder: Path
    """Folder of their logs."""
    overrides: Sequence[str] | None = None
    """Their command line, without their layers; None: our own."""
    more_overrides: Sequence[str] = ()
    pin_cores: bool = False

    def all_overrides(self) -> list[str]:
        """The command line of each shard, without its layers."""
        overrides = own_overrides(NOT_FOR_SHARDS) if self.overrides is None else self.overrides
        return [*overrides, *self.more_overrides]


@dataclass(frozen=True, kw_only=True)
class ChainKind:
    """Roles, process and protocol of the chains of one pillar."""

    client: str
    """Role of the client, on the wire and in messages."""
    shard: str
    """Role of the shards."""
    module: str
    """Command of a shard's process."""
    protocol: range
    table: Callable[[int], MessageTable]
    """Frames of both roles, with the largest size of their bodies in bytes."""
    worker_threads: int
    """Threads of each process's agent in a group of torch's RPC."""

    def endpoint(self, network: NetworkSettings, fingerprints: dict[str, str], role: str) -> Endpoint:
        """One side of the wire: a client connects to shards, a shard to both. UserError for invalid settings."""
        return make_endpoint(
            network,
            role=role,
            peer_roles=frozenset({self.shard} if role == self.client else {self.client, self.shard}),
            table=self.table(network.max_frame_bytes),
            protocol=self.protocol,
            fingerprints=fingerprints,
        )

    def connect(
        self,
        network: NetworkSettings,
        fingerprints: dict[str, str],
        addresses: Sequence[str],
        spares: Sequence[str],
        start_seconds: float,
    ) -> TcpChain:
        """Connect to shards that listen at `addresses`, `host:port` each. UserError as `Chain.open`."""
        try:
            return TcpChain(
                [Address.parse(text) for text in addresses],
                [Address.parse(text) for text in spares],
                self.endpoint(network, fingerprints, self.client),
                tls=client_side_tls(network),
                answer_seconds=network.request_timeout_seconds,
                start_seconds=start_seconds,
            )
        except ChainMismatch as error:
            raise UserError(f"project.shards: {error}") from None
        except (ShardLost, WireError) as error:
            raise UserError(f"project.shards must be reachable and hold this model: {error}") from None


@dataclass(frozen=True)
class Chain:
    """The chain that the settings describe."""

    kind: ChainKind
    model: ModelSettings
    network: NetworkSettings
    project: ChainSettings
    fingerprints: dict[str, str]
    """Fingerprints of the model; all roles must have the same."""

    def open(self, local: LocalPlaces, make_stage: Callable[[range], Stage], stack: ExitStack) -> Transport:
        """Open the client's end of the chain; the settings name its shards, or let it start or await them.

        Args:
            local: For shards that are started on this machine.
            make_stage: A shard in this process, by its layers.
            stack: Leaves the shards, and ends those that were started.

        Raises:
            UserError: shards that are not there, or are not this model from its first layer to its last.
        """
        project, addresses = self.project, self.project.shards
        count = len(addresses) or project.local_shards
        if addresses and project.local_shards:
            raise UserError(f"project.local_shards must be 0 if project.shards is set, got {project.local_shards}")
        if project.transport is TransportKind.rpc:
            transport = self._meet(local, stack)
        elif not count:
            raise UserError("project.shards must name at least one shard (or set project.local_shards), got []")
        elif project.transport is TransportKind.inproc:
            transport = InProcess([make_stage(layers) for layers in cut_layers(self.model, project.cuts, count)])
        else:
            if project.local_shards:
                addresses = [str(address) for address in self._start(local, stack).addresses]
            transport = self.kind.connect(
                self.network, self.fingerprints, addresses, project.spares, project.start_seconds
            )
        stack.callback(transport.shutdown)  # before the processes end
        return transport

    def _meet(self, local: LocalPlaces, stack: ExitStack) -> Transport:
        """Open a group of torch's RPC, which shards join."""
        from split.transport.rpc import RpcChain, check_master  # some systems lack it

        check_master(self.network)
        project, port, world_size = self.project, self.network.port, self.project.world_size
        if project.local_shards:
            port, world_size = free_port(), project.local_shards + 1
            self._start(local, stack, port)
        elif project.shards or not world_size:
            raise UserError(
                f"project.world_size must be set for transport=rpc, where shards come to the {self.kind.client}, "
                f"got {world_size}"
            )
        try:
            threads, seconds = self.kind.worker_threads, project.start_seconds
            return RpcChain(world_size, self.network, port, self.fingerprints, threads, start_seconds=seconds)
        except ChainMismatch as error:
            raise UserError(str(error)) from None

    def _start(self, local: LocalPlaces, stack: ExitStack, group_port: int | None = None) -> LocalShards:
        project = self.project
        return stack.enter_context(
            LocalShards(
                cut_layers(self.model, project.cuts, project.local_shards),
                local.folder,
                project.start_seconds,
                local.all_overrides(),
                module=self.kind.module,
                pin=local.pin_cores,
                group_port=group_port,
            )
        )

    def serve(
        self,
        load: Callable[[range], StageT],
        make_server: Callable[[StageT, Place], ChainServer],
        make_rpc_shard: Callable[[StageT, str, int, dict[str, str]], RpcShard],
    ) -> tuple[StageT, int]:
        """Load one shard and serve it until Ctrl+C; its stage, and the number of its clients.

        Args:
            load: Makes the stage of some layers; called once the settings are known to be right.
            make_server: Makes its server, over tcp.
            make_rpc_shard: Makes its RPC shard, from the stage, its name, the model's layers and the fingerprints.

        Raises:
            UserError: what cannot be served.
        """
        project, network = self.project, self.network
        if project.layers is None:
            raise UserError("project.layers must be set for a shard, as first:last, got null")
        layers, name = parse_layers(project.layers), f"{self.model.name} {project.layers}"
        if project.transport is TransportKind.rpc:
            from split.transport.rpc import check_master, serve_rpc_shard  # some systems lack it

            check_master(network)
            if not 1 <= project.rank < project.world_size:
                raise UserError(f"project.rank must be in [1, world_size={project.world_size}), got {project.rank}")
            stage = load(layers)
            member = make_rpc_shard(stage, name, self.model_layers, self.fingerprints)
            with until_stopped(project.follow_stdin):
                say_ready("joining", self.kind.shard, network.host, network.port, layers=project.layers)
                serve_rpc_shard(member, project.rank, project.world_size, network)
            return stage, 1
        tls = listener_tls(network)
        stage = load(layers)
        place = Place(
            name=name,
            model_layers=self.model_layers,
            endpoint=self.kind.endpoint(network, self.fingerprints, self.kind.shard),
            next_addresses=[Address.parse(project.next)] if project.next else [],
            client_tls=client_side_tls(network),
        )
        server = make_server(stage, place)
        with until_stopped(project.follow_stdin):
            self._serve_port(server, tls)
        return stage, server.attached

    def _serve_port(self, server: ChainServer, tls: ssl.SSLContext | None) -> None:
        """Serve over tcp until Ctrl+C. UserError for a taken address."""
        network, project = self.network, self.project

        def announce(port: int) -> None:
            address = f"{address_for_peers(network.host)}:{port}"
            hint = f"this shard's address in the {self.kind.client}'s project.shards=[...]: {address}"
            say_listening(self.kind.shard, network.host, port, hint, layers=project.layers)

        most = project.max_connections
        try:
            run_async(serve(server, network.host, network.port, max_connections=most, tls=tls, announce=announce))
        except OSError as error:
            raise cannot_listen(network, error) from None

    @property
    def model_layers(self) -> int:
        """Layers of the whole model."""
        return ModelShape.of(load_config(self.model)).layers


def cut_layers(model: ModelSettings, cuts: Sequence[int], count: int) -> list[range]:
    """The layers of `count` shards: between `cuts`, or of equal size. UserError for cuts that do not fit."""
    total = ModelShape.of(load_config(model)).layers
    if not 1 <= count <= total:
        raise UserError(f"project.local_shards must be in [1, {total}] for this model, got {count}")
    if not cuts:
        cuts = [round(total * index / count) for index in range(1, count)]
    if len(cuts) != count - 1 or (cuts and cuts[-1] >= total):
        raise UserError(f"project.cuts must be {count - 1} numbers below the model's {total} layers, got {cuts}")
    return [range(first, last) for first, last in zip([0, *cuts], [*cuts, total])]


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
