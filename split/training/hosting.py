"""A shard that learns from its settings: it serves, and loads what the trainer says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lab.device import give_back_freed_memory, open_device
from lab.models.fingerprints import weights_fingerprints
from lab.models.shape import ModelShape
from lab.models.sources import load_config
from lab.network import client_side_tls, listener_tls
from lab.settings import UserError
from split.chain.address import Address
from split.chain.process import check_rank, layers_to_serve, serve_port, serve_rank
from split.settings import TransportKind, parse_layers
from split.training.open import checkpoints_of, make_stage, training_side
from split.training.server import TrainingServer
from split.training.settings import SplitTrainSettings


def host(settings: SplitTrainSettings, folder: Path) -> dict[str, Any]:
    """Serves until Ctrl+C; the figures of the last line. UserError for what cannot be served."""
    layers, checkpoints = layers_to_serve(settings.project), checkpoints_of(settings, folder)
    give_back_freed_memory()
    serve = _serve_rank if settings.project.transport is TransportKind.rpc else _serve_port
    serve(settings, layers, checkpoints)
    return {"role": "learner", "layers": layers, "checkpoints": checkpoints}


def _serve_port(settings: SplitTrainSettings, text: str, checkpoints: Path) -> None:
    project, network = settings.project, settings.network
    tls = listener_tls(network)
    layers, model_layers = _range(settings, text)
    server = TrainingServer(
        make_stage(settings.model, open_device(settings.device), layers, checkpoints),
        layers=layers,
        model_layers=model_layers,
        endpoint=training_side(settings.model, network, "learner"),
        next_addresses=[Address.parse(project.next)] if project.next else [],
        client_tls=client_side_tls(network),
    )
    serve_port(server, project, network, tls, role="learner", peer_role="trainer")


def _serve_rank(settings: SplitTrainSettings, text: str, checkpoints: Path) -> None:
    from split.transport.rpc import Place, check_master  # some systems lack it
    from split.transport.training_rpc import LearnerSeat

    check_master(settings.network)
    check_rank(settings.project)
    layers, model_layers = _range(settings, text)
    place = Place(
        name=f"{settings.model.name} {text}",
        layers=layers,
        model_layers=model_layers,
        context=0,
        fingerprints=weights_fingerprints(settings.model),
    )
    seat = LearnerSeat(make_stage(settings.model, open_device(settings.device), layers, checkpoints), place)
    serve_rank(seat, settings.project, settings.network)


def _range(settings: SplitTrainSettings, text: str) -> tuple[range, int]:
    """The layers of this shard, and how many the whole model has. UserError for layers that it does not have."""
    layers = parse_layers(text)
    count = ModelShape.of(load_config(settings.model)).layers
    if layers.stop > count:
        raise UserError(f"project.layers must be within the model's {count} layers, got {text}")
    return layers, count
