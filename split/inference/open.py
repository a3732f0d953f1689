"""From settings to shards, transports and a `ShardedModel`."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lab.device import open_device
from lab.engine.context import model_context
from lab.models.fingerprints import weights_fingerprints
from lab.models.shape import ModelShape
from lab.models.sources import load_config
from lab.network import client_side_tls, listener_tls, make_endpoint
from lab.settings import ModelSettings, NetworkSettings, UserError
from lab.wire import Endpoint, WireError
from split.chain.address import Address
from split.chain.boundary import Boundary
from split.chain.local_shards import LocalShards
from split.chain.process import check_rank, layers_to_serve, serve_port, serve_rank
from split.inference.messages import PROTOCOL, table
from split.inference.server import ShardServer
from split.inference.shard import ShardLimits, load_shard
from split.inference.sharded_model import ShardedModel
from split.inference.stage import Stage
from split.settings import SplitSettings, TransportKind, parse_layers
from split.transport.base import ShardLost, Transport
from split.transport.inproc import InProcess
from split.transport.tcp import ChainMismatch, TcpChain


def model_layers(settings: SplitSettings) -> int:
    """Layers of the whole model."""
    return ModelShape.of(load_config(settings.model)).layers


def load_stage(settings: SplitSettings, device: torch.device, layers: range) -> Stage:
    """One shard of the model. UserError for layers it does not have, a context that the cache has no room for,
    and for what cannot run."""
    project = settings.project
    limits = ShardLimits(
        sessions=project.sessions,
        context=model_context(load_config(settings.model), project.context),
        bucket=project.cache_bucket,
        kv_limit_bytes=project.cache_limit_bytes,
        idle_seconds=project.idle_seconds,
    )
    shard = load_shard(settings.model, device, layers, limits)
    needed = shard.cache.bytes_per_position * -(-limits.context // limits.bucket) * limits.bucket
    if needed > limits.kv_limit_bytes:
        raise UserError(
            f"project.context must fit project.cache_limit_bytes={limits.kv_limit_bytes}: {limits.context} tokens of "
            f"layers {layers.start}:{layers.stop} need {needed} bytes, got {limits.context}"
        )
    stage = Stage(shard, project.boundary)
    stage.prove()
    return stage


def ranges(settings: SplitSettings, count: int) -> list[range]:
    """The layers of `count` shards of a split model."""
    return cut_layers(settings.model, settings.project.cuts, count)


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


@contextmanager
def sharded_model(settings: SplitSettings, device: torch.device, folder: Path) -> Iterator[ShardedModel]:
    """The engine that the settings describe; local shards live as long as it does."""
    with ExitStack() as stack:
        engine = _open(settings, device, folder, stack)
        stack.callback(engine.shutdown)  # before the processes end
        yield engine


def _open(settings: SplitSettings, device: torch.device, folder: Path, stack: ExitStack) -> ShardedModel:
    project = settings.project
    if project.shards and project.local_shards:
        raise UserError(f"project.local_shards must be 0 where project.shards is given, got {project.local_shards}")
    if project.transport is TransportKind.rpc:
        return _open_group(settings, folder, stack)
    count = len(project.shards) or project.local_shards
    if not count:
        raise UserError("project.shards must name at least one shard (or set project.local_shards), got []")
    if project.transport is TransportKind.inproc:
        stages = [load_stage(settings, device, layers) for layers in ranges(settings, count)]
        return _engine(settings, InProcess(stages), model_context(load_config(settings.model), project.context))
    if project.shards:
        return _connect(settings, project.shards)
    local = stack.enter_context(LocalShards(ranges(settings, count), folder, project.start_seconds))
    return _connect(settings, [str(address) for address in local.addresses])


def _open_group(settings: SplitSettings, folder: Path, stack: ExitStack) -> ShardedModel:
    from split.transport.rpc import RpcChain, check_master  # some systems lack it

    check_master(settings.network)
    project, port, world_size = settings.project, settings.network.port, settings.project.world_size
    if project.local_shards:
        port, world_size = free_port(), project.local_shards + 1
        stack.enter_context(LocalShards.of_group(ranges(settings, project.local_shards), folder, port))
    elif project.shards or not world_size:
        raise UserError(
            f"project.world_size must be set for transport=rpc, where shards come to the client, got {world_size}"
        )
    wanted = fingerprints(settings.model, project.boundary)
    chain = RpcChain(world_size, settings.network, port, wanted)
    return _engine(settings, chain, chain.context)


def _engine(settings: SplitSettings, transport: Transport, context: int) -> ShardedModel:
    return ShardedModel(
        transport,
        vocabulary_size=ModelShape.of(load_config(settings.model)).vocabulary,
        context=context,
        prefill_chunk=settings.project.prefill_chunk,
        recovery_seconds=settings.project.recovery_seconds,
    )


def free_port() -> int:
    """A port that was free just now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _connect(settings: SplitSettings, addresses: Sequence[str]) -> ShardedModel:
    project = settings.project
    return join_shards(
        settings.model,
        settings.network,
        shards=addresses,
        spares=project.spares,
        boundary=project.boundary.name,
        context=project.context,
        prefill_chunk=project.prefill_chunk,
        start_seconds=project.start_seconds,
        recovery_seconds=project.recovery_seconds,
        line_seconds=project.line_seconds,
    )


def join_shards(
    model: ModelSettings,
    network: NetworkSettings,
    *,
    shards: Sequence[str],
    spares: Sequence[str],
    boundary: str,
    context: int,
    prefill_chunk: int,
    start_seconds: float,
    recovery_seconds: float,
    line_seconds: float = 0.0,
) -> ShardedModel:
    """An engine over shards that serve already.

    Args:
        model: What they must hold; its config is read here, its weights are not.
        network: Key, TLS and deadlines.
        shards: Where they listen, `host:port` each, first to last.
        spares: Shards that may take the place of one with the same layers.
        boundary: How hidden states travel between them: a name of `Boundary`.
        context: Most tokens of a text; 0: what the model was made for. Never more than the shards take.
        prefill_chunk: Most tokens of a text in one pass.
        start_seconds: How long they may take to be there.
        recovery_seconds: How long to try to bring back one that was lost.
        line_seconds: How long to wait in line for room; who has a line of its own asks again instead.

    Raises:
        UserError: shards that are not there, or are not this model from its first layer to its last.
    """
    known = Boundary.__members__.get(boundary)
    if known is None:
        names = ", ".join(Boundary.__members__)
        raise UserError(f"boundary must be one of {names}, got {boundary!r}")
    try:
        chain = TcpChain(
            [Address.parse(text) for text in shards],
            [Address.parse(text) for text in spares],
            make_side(model, network, known, "client"),
            tls=client_side_tls(network),
            answer_seconds=network.request_timeout_seconds,
            start_seconds=start_seconds,
        )
    except ChainMismatch as error:
        raise UserError(f"project.shards: {error}") from None
    except (ShardLost, WireError) as error:
        raise UserError(f"project.shards must be reachable and hold this model: {error}") from None
    return ShardedModel(
        chain,
        vocabulary_size=ModelShape.of(load_config(model)).vocabulary,
        context=min(chain.context, model_context(load_config(model), context)),
        prefill_chunk=prefill_chunk,
        recovery_seconds=recovery_seconds,
        line_seconds=line_seconds,
    )


def make_side(model: ModelSettings, network: NetworkSettings, boundary: Boundary, role: str) -> Endpoint:
    """Our side of the wire: `client` talks to shards, `shard` to both. UserError for what makes no sense."""
    return make_endpoint(
        network,
        role=role,
        peer_roles=frozenset({"shard"} if role == "client" else {"client", "shard"}),
        table=table(network.max_frame_bytes),
        protocol=PROTOCOL,
        fingerprints=fingerprints(model, boundary),
    )


def fingerprints(model: ModelSettings, boundary: Boundary) -> dict[str, str]:
    """What all roles must have alike: the weights, and how hidden states travel."""
    return weights_fingerprints(model) | {"boundary": boundary.name}


ROOM_FOR_A_HEAD = 1024
"""Bytes beside the hidden states of one token in a frame."""


def host(settings: SplitSettings) -> dict[str, Any]:
    """Serves until Ctrl+C; the figures of the last line. UserError for what cannot be served."""
    layers = layers_to_serve(settings.project)
    serve = _serve_rank if settings.project.transport is TransportKind.rpc else _serve_port
    stage, clients = serve(settings, layers)
    figures = {"role": "shard", "layers": layers, "weights_bytes": stage.shard.weights_bytes, "clients": clients}
    return figures | asdict(stage.counts)


def _serve_port(settings: SplitSettings, layers: str) -> tuple[Stage, int]:
    project, network = settings.project, settings.network
    tls = listener_tls(network)  # before a model is loaded for nothing
    stage = load_stage(settings, open_device(settings.device), parse_layers(layers))
    needed = project.boundary.row_bytes(stage.shard.hidden_size) + ROOM_FOR_A_HEAD
    if needed > network.max_frame_bytes:
        raise UserError(
            f"network.max_frame_bytes must be at least {needed}, for the hidden states of one token, "
            f"got {network.max_frame_bytes}"
        )
    server = ShardServer(
        stage,
        name=f"{settings.model.name} {layers}",
        model_layers=model_layers(settings),
        endpoint=make_side(settings.model, network, project.boundary, "shard"),
        next_addresses=[Address.parse(project.next)] if project.next else [],
        client_tls=client_side_tls(network),
        awake_seconds=project.awake_seconds,
        most_waiting=project.max_waiting,
    )
    serve_port(server, project, network, tls, role="shard", peer_role="client")
    return stage, server.clients


def _serve_rank(settings: SplitSettings, layers: str) -> tuple[Stage, int]:
    from split.transport.rpc import Place, Seat, check_master  # some systems lack it

    check_master(settings.network)
    check_rank(settings.project)
    stage = load_stage(settings, open_device(settings.device), parse_layers(layers))
    place = Place(
        name=f"{settings.model.name} {layers}",
        layers=stage.shard.layers,
        model_layers=model_layers(settings),
        context=stage.shard.limits.context,
        fingerprints=fingerprints(settings.model, settings.project.boundary),
    )
    serve_rank(Seat(stage, place, settings.project.awake_seconds), settings.project, settings.network)
    return stage, 1
