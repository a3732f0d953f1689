"""Opens a `ShardedModel`, or one of its shards, from settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lab.device import open_device
from lab.engine.compiled import Compiler
from lab.engine.context import model_context
from lab.models.fingerprints import weights_fingerprints
from lab.models.shape import ModelShape
from lab.models.sources import load_config
from lab.settings import ModelSettings, NetworkSettings, UserError
from lab.text.generation import grammars_of
from split.chain.boundary import Boundary
from split.chain.open import Chain, ChainKind, LocalPlaces
from split.chain.server import Place
from split.inference.messages import PROTOCOL, table
from split.inference.server import ShardServer
from split.inference.shard import ShardLimits, load_shard
from split.inference.sharded_model import ShardedModel
from split.inference.stage import InferenceStage
from split.settings import SplitSettings
from split.transport.base import Transport

if TYPE_CHECKING:
    from split.transport.rpc import RpcShard  # some systems lack it

INFERENCE = ChainKind(
    client="client", shard="shard", module="split.serve", protocol=PROTOCOL, table=table, worker_threads=4
)
ROOM_FOR_A_HEAD = 1024
"""Bytes of a frame for one token, besides its hidden states."""


def fingerprints(model: ModelSettings, boundary: Boundary) -> dict[str, str]:
    """Fingerprints that all roles must share: of the weights, and of the boundary."""
    return weights_fingerprints(model) | {"boundary": boundary.name}


@contextmanager
def sharded_model(settings: SplitSettings, device: torch.device, folder: Path) -> Iterator[ShardedModel]:
    """The engine that the settings describe; local shards live as long as it does."""
    project = settings.project
    with ExitStack() as stack:
        transport = _chain(settings).open(
            LocalPlaces(folder), lambda layers: load_stage(settings, device, layers), stack
        )
        yield ShardedModel(
            transport,
            **_sizes(transport, settings.model, project.context),
            prefill_chunk=project.prefill_chunk,
            recovery_seconds=project.recovery_seconds,
            line_seconds=project.line_seconds,
            grammars=grammars_of(settings.model),
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
    """An engine over running shards.

    Args:
        model: What they must hold; its config is read here, its weights are not.
        network: Key, TLS and deadlines.
        shards: Where they listen, `host:port` each, first to last.
        spares: Shards that may take the place of one with the same layers.
        boundary: How hidden states travel between them: a name of `Boundary`.
        context: Most tokens of a request; 0: the model's own limit. Never more than the shards take.
        prefill_chunk: Most tokens of a request in one pass.
        start_seconds: Time limit for them to start.
        recovery_seconds: How long to try to bring back one that was lost.
        line_seconds: How long to wait in line for room; 0 for a caller with its own line, which asks again.

    Raises:
        UserError: shards that are not there, or are not this model from its first layer to its last.
    """
    known = Boundary.__members__.get(boundary)
    if known is None:
        names = ", ".join(Boundary.__members__)
        raise UserError(f"boundary must be one of {names}, got {boundary!r}")
    chain = INFERENCE.connect(network, fingerprints(model, known), shards, spares, start_seconds)
    return ShardedModel(
        chain,
        **_sizes(chain, model, context),
        prefill_chunk=prefill_chunk,
        recovery_seconds=recovery_seconds,
        line_seconds=line_seconds,
        grammars=grammars_of(model),
    )


def _chain(settings: SplitSettings) -> Chain:
    prints = fingerprints(settings.model, settings.project.boundary)
    return Chain(INFERENCE, settings.model, settings.network, settings.project, prints)


def _sizes(transport: Transport, model: ModelSettings, context: int) -> dict[str, int]:
    """Rows of the model's embedding, and the most tokens of a request."""
    config = load_config(model)
    most = min(transport.context, model_context(config, context))
    return {"vocabulary_size": ModelShape.of(config).vocabulary, "context": most}


# A shard


def load_stage(settings: SplitSettings, device: torch.device, layers: range) -> InferenceStage:
    """One shard of the model. UserError for layers that the model lacks, a context too large for the cache, and
    settings that cannot be served."""
    project = settings.project
    limits = ShardLimits(
        sessions=project.sessions,
        context=model_context(load_config(settings.model), project.context),
        bucket=project.cache_bucket,
        kv_limit_bytes=project.cache_limit_bytes,
        idle_seconds=project.idle_seconds,
    )
    compiler = Compiler.of(settings.model, settings.device, lasts=True)
    shard = load_shard(settings.model, device, layers, limits, compiler, grammars_of(settings.model))
    needed = shard.cache.bytes_per_position * -(-limits.context // limits.bucket) * limits.bucket
    if needed > limits.kv_limit_bytes:
        raise UserError(
            f"project.context must fit project.cache_limit_bytes={limits.kv_limit_bytes}: {limits.context} tokens of "
            f"layers {layers.start}:{layers.stop} need {needed} bytes, got {limits.context}"
        )
    stage = InferenceStage(shard, project.boundary)
    stage.prove()
    return stage


def host(settings: SplitSettings) -> dict[str, Any]:
    """Serve until Ctrl+C; the figures of the last line. UserError for settings that cannot be served."""
    project, network = settings.project, settings.network

    def make_server(stage: InferenceStage, place: Place) -> ShardServer:
        needed = project.boundary.row_bytes(stage.shard.hidden_size) + ROOM_FOR_A_HEAD
        if needed > network.max_frame_bytes:
            raise UserError(
                f"network.max_frame_bytes must be at least {needed}, for the hidden states of one token, "
                f"got {network.max_frame_bytes}"
            )
        return ShardServer(stage, place, awake_seconds=project.awake_seconds, most_waiting=project.max_waiting)

    def make_rpc_shard(stage: InferenceStage, name: str, model_layers: int, prints: dict[str, str]) -> RpcShard:
        from split.transport.rpc import RpcShard

        return RpcShard(stage, name, model_layers, prints, project.awake_seconds)

    def load(layers: range) -> InferenceStage:
        return load_stage(settings, open_device(settings.device), layers)

    stage, clients = _chain(settings).serve(load, make_server, make_rpc_shard)
    sizes = {"layers": project.layers, "weights_bytes": stage.shard.weights_bytes, "clients": clients}
    return {"role": INFERENCE.shard} | sizes | asdict(stage.counts)
