"""A shard from its settings: loads the layers, then serves."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lab.device import open_device
from lab.network import client_side_tls, listener_tls
from lab.settings import UserError
from split.chain.address import Address
from split.chain.process import check_rank, layers_to_serve, serve_port, serve_rank
from split.inference.joining import fingerprints, make_side
from split.inference.open import load_stage, model_layers
from split.inference.server import ShardServer
from split.inference.stage import Stage
from split.settings import SplitSettings, TransportKind, parse_layers

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
