"""From settings to shards, transports and a `ShardedModel`."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from lab.engine.context import model_context
from lab.models.shape import ModelShape
from lab.models.sources import load_config
from lab.settings import ModelSettings, UserError
from split.chain.local_shards import LocalShards
from split.inference.joining import fingerprints, join_shards
from split.inference.shard import ShardLimits, load_shard
from split.inference.sharded_model import ShardedModel
from split.inference.stage import Stage
from split.settings import SplitSettings, TransportKind
from split.transport.base import Transport
from split.transport.inproc import InProcess


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
