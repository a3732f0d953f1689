"""From settings to shards, transports and a `ShardedModel`."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lab.models import load_config
from lab.network import client_side_tls
from lab.settings import UserError
from lab.wire import WireError
from split.address import Address
from split.local_shards import LocalShards
from split.network import endpoint, fingerprints
from split.settings import SplitSettings, TransportKind
from split.shard import ShardLimits, load_shard
from split.sharded_model import ShardedModel
from split.stage import Stage
from split.transport.base import ShardLost
from split.transport.inproc import InProcess
from split.transport.tcp import ChainMismatch, TcpChain

if TYPE_CHECKING:
    from split.transport.rpc import RpcChain


def model_layers(settings: SplitSettings) -> int:
    """Layers of the whole model."""
    return int(load_config(settings.model).get_text_config(decoder=True).num_hidden_layers)


def context_of(settings: SplitSettings) -> int:
    """Most tokens of a text: `project.context`, but no more than what the model was made for; 0: just that."""
    config = load_config(settings.model).get_text_config(decoder=True)
    made_for = getattr(config, "max_position_embeddings", None)
    sizes = [size for size in (settings.project.context, made_for) if size]
    if not sizes:
        raise UserError("project.context must be set for a model that does not say what it was made for, got 0")
    return int(min(sizes))


def load_stage(settings: SplitSettings, device: torch.device, layers: range) -> Stage:
    """One shard of the model. UserError for layers it does not have, and a context that the cache has no room for."""
    project = settings.project
    limits = ShardLimits(
        sessions=project.sessions,
        context=context_of(settings),
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
    return Stage(shard, project.boundary)


def ranges(settings: SplitSettings, count: int) -> list[range]:
    """The layers of `count` shards: between `project.cuts`, or even. UserError for cuts that do not fit."""
    total, cuts = model_layers(settings), settings.project.cuts
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
    project = settings.project
    if project.shards and project.local_shards:
        raise UserError(f"project.local_shards must be 0 where project.shards is given, got {project.local_shards}")
    if project.transport is TransportKind.rpc and not project.local_shards:
        if project.shards or not project.world_size:
            raise UserError("project.world_size must be set for transport=rpc (its shards come to us), got 0")
        yield from _lasting(settings, _join_group(settings, project.world_size, settings.network.port))
        return
    count = len(project.shards) or project.local_shards
    if not count:
        raise UserError("project.shards must name at least one shard (or set project.local_shards), got []")
    if project.transport is TransportKind.inproc:
        stages = [load_stage(settings, device, layers) for layers in ranges(settings, count)]
        yield from _lasting(settings, InProcess(stages))
    elif project.shards:
        yield from _lasting(settings, _connect(settings, [Address.parse(text) for text in project.shards]))
    elif project.transport is TransportKind.rpc:
        with LocalShards.of_group(ranges(settings, count), folder, port := free_port()):
            yield from _lasting(settings, _join_group(settings, count + 1, port))
    else:
        with LocalShards(ranges(settings, count), folder, project.start_seconds) as shards:
            yield from _lasting(settings, _connect(settings, shards.addresses))


def _lasting(settings: SplitSettings, transport: InProcess | TcpChain | RpcChain) -> Iterator[ShardedModel]:
    config = load_config(settings.model).get_text_config(decoder=True)
    context = context_of(settings) if isinstance(transport, InProcess) else transport.context
    engine = ShardedModel(
        transport,
        vocabulary_size=int(config.vocab_size),
        context=min(context, context_of(settings)),
        prefill_chunk=settings.project.prefill_chunk,
        recovery_seconds=settings.project.recovery_seconds,
    )
    try:
        yield engine
    finally:
        engine.shutdown()


def _join_group(settings: SplitSettings, world_size: int, port: int) -> RpcChain:
    from split.transport.rpc import RpcChain, check_master  # some systems lack it

    check_master(settings.network)
    return RpcChain(world_size, settings.network, port, fingerprints(settings))


def free_port() -> int:
    """A port that was free just now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _connect(settings: SplitSettings, addresses: Sequence[Address]) -> TcpChain:
    project = settings.project
    try:
        return TcpChain(
            addresses,
            [Address.parse(text) for text in project.spares],
            endpoint(settings, "client"),
            tls=client_side_tls(settings.network),
            answer_seconds=settings.network.request_timeout_seconds,
            start_seconds=project.start_seconds,
        )
    except ChainMismatch as error:
        raise UserError(f"project.shards: {error}") from None
    except (ShardLost, WireError) as error:
        raise UserError(f"project.shards must be reachable and hold this model: {error}") from None
