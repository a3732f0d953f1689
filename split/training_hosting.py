"""The process of a shard that learns, from its settings: it serves until it is told to end."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path
from typing import Any

from lab.device import give_back_freed_memory, open_device
from lab.models import load_config
from lab.network import address_for_peers, client_side_tls, listener_tls
from lab.settings import UserError
from split.address import Address
from split.hosting import listen_for_the_end
from split.joining import weights_fingerprints
from split.settings import TransportKind, parse_layers
from split.train_settings import SplitTrainSettings
from split.training_opening import make_stage, training_side
from split.training_server import TrainingServer

log = logging.getLogger(__name__)


def host(settings: SplitTrainSettings, folder: Path) -> dict[str, Any]:
    """Serves until Ctrl+C; the figures of the last line. UserError for what cannot be served."""
    project, network = settings.project, settings.network
    if project.layers is None:
        raise UserError("project.layers must be set for a shard, as first:last, got null")
    give_back_freed_memory()
    if project.transport is TransportKind.rpc:
        return _serve_group(settings, checkpoints_of(settings, folder))
    tls = listener_tls(network)
    layers, model_layers = layers_of(settings)
    checkpoints = checkpoints_of(settings, folder)
    stage = make_stage(settings.model, open_device(settings.device), layers, checkpoints)
    server = TrainingServer(
        stage,
        layers=layers,
        model_layers=model_layers,
        endpoint=training_side(settings.model, network, "learner"),
        next_addresses=[Address.parse(project.next)] if project.next else [],
        client_tls=client_side_tls(network),
    )
    listen_for_the_end(project.follow_stdin)
    try:
        asyncio.run(_serve(server, settings, tls))
    except KeyboardInterrupt:
        log.info("stopped")
    return {"role": "learner", "layers": project.layers, "checkpoints": checkpoints}


def _serve_group(settings: SplitTrainSettings, checkpoints: Path) -> dict[str, Any]:
    """A shard in a group of torch's RPC."""
    from split.transport.rpc import Place, check_master, serve_seat  # some systems lack it
    from split.transport.training_rpc import LearnerSeat

    project, network = settings.project, settings.network
    check_master(network)
    if not 1 <= project.rank < project.world_size:
        raise UserError(f"project.rank must be in [1, world_size={project.world_size}), got {project.rank}")
    layers, model_layers = layers_of(settings)
    place = Place(
        name=f"{settings.model.name} {project.layers}",
        layers=layers,
        model_layers=model_layers,
        context=0,
        fingerprints=weights_fingerprints(settings.model),
    )
    seat = LearnerSeat(make_stage(settings.model, open_device(settings.device), layers, checkpoints), place)
    listen_for_the_end(project.follow_stdin)
    try:
        serve_seat(seat, project.rank, project.world_size, network)
    except KeyboardInterrupt:
        log.info("stopped")
    return {"role": "learner", "layers": project.layers, "checkpoints": checkpoints}


def checkpoints_of(settings: SplitTrainSettings, folder: Path) -> Path:
    """Where checkpoints are on this machine: as set, else in the run's folder."""
    named = settings.project.checkpoints
    return Path(named).expanduser().absolute() if named else folder / "checkpoints"


def layers_of(settings: SplitTrainSettings) -> tuple[range, int]:
    """The layers of this shard, and how many the whole model has. UserError for layers that it does not have."""
    assert settings.project.layers is not None
    layers = parse_layers(settings.project.layers)
    count = int(load_config(settings.model).get_text_config(decoder=True).num_hidden_layers)
    if layers.stop > count:
        raise UserError(f"project.layers must be within the model's {count} layers, got {settings.project.layers}")
    return layers, count


async def _serve(server: TrainingServer, settings: SplitTrainSettings, tls: Any) -> None:
    network = settings.network

    def announce(port: int) -> None:
        ready = {"status": "listening", "role": "learner", "host": network.host, "port": port}
        print(json.dumps(ready | {"layers": settings.project.layers}), flush=True)
        address = f"{address_for_peers(network.host)}:{port}"
        print(f"this shard's address in the trainer's project.shards=[...]: {address}", file=sys.stderr, flush=True)

    try:
        await server.serve(
            host=network.host,
            port=network.port,
            max_connections=settings.project.max_connections,
            tls=tls,
            announce=announce,
        )
    except OSError as error:
        raise UserError(f"network.port must be free on {network.host}, got {network.port} ({error})") from None
