"""From settings to shards that learn, and the way to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lab.command.overrides import override
from lab.command.processes import own_words
from lab.device import give_back_freed_memory, open_device
from lab.files import path_of
from lab.models.fingerprints import weights_fingerprints
from lab.models.shape import ModelShape
from lab.models.sources import load_config, model_identity
from lab.network import client_side_tls, listener_tls, make_endpoint
from lab.settings import ModelSettings, NetworkSettings, UserError
from lab.wire import Endpoint, WireError
from split.chain.address import Address
from split.chain.local_shards import NOT_FOR_SHARDS, LocalShards
from split.chain.process import check_rank, layers_to_serve, serve_port, serve_rank
from split.inference.open import cut_layers, free_port
from split.settings import TransportKind, parse_layers
from split.training.messages import PROTOCOL, Recipe, Start, table
from split.training.server import TrainingServer
from split.training.settings import BackwardKind, SplitTrainSettings
from split.training.shard import TrainingShard
from split.training.stage import InitialWeight, TrainingStage
from split.training.trainer import Backward, Explicit, Shards
from split.training.weights import initial_weight, load_training_shard
from split.transport.base import ShardLost
from split.transport.tcp import ChainMismatch
from split.transport.training import InProcessTraining, TrainingTransport
from split.transport.training_tcp import TcpTraining

LEARNER = "split.learn"


def make_stage(model: ModelSettings, device: torch.device, layers: range, checkpoints: Path) -> TrainingStage:
    """A shard that learns, with nothing loaded yet: what is trained comes with the trainer."""

    def load(start: Start) -> tuple[TrainingShard, InitialWeight]:
        shard = load_training_shard(model, device, layers, start.recipe)
        return shard, initial_weight(model, start.recipe, layers)

    return TrainingStage(load, checkpoints)


def training_side(model: ModelSettings, network: NetworkSettings, role: str) -> Endpoint:
    """Our side of the wire: `trainer` talks to learners, `learner` to both. UserError for what makes no sense."""
    return make_endpoint(
        network,
        role=role,
        peer_roles=frozenset({"learner"} if role == "trainer" else {"trainer", "learner"}),
        table=table(network.max_frame_bytes),
        protocol=PROTOCOL,
        fingerprints=weights_fingerprints(model),
    )


def checkpoints_of(settings: SplitTrainSettings, folder: Path) -> Path:
    """Where checkpoints are on this machine: as set, else in the run's folder."""
    named = settings.project.checkpoints
    return path_of(named, "project.checkpoints") if named else folder / "checkpoints"


@contextmanager
def open_shards(
    settings: SplitTrainSettings,
    recipe: Recipe,
    device: torch.device,
    folder: Path,
    checkpoints: Path,
    words: Sequence[str] | None = None,
) -> Iterator[tuple[Shards, Backward]]:
    """The shards that the settings describe; local ones live as long as this does.

    `words`: what local shards are told besides their places; None: what we were told ourselves.
    """
    project = settings.project
    if project.shards and project.local_shards:
        raise UserError(f"project.local_shards must be 0 where project.shards is given, got {project.local_shards}")
    with ExitStack() as stack:
        transport = _open(settings, device, _Local(folder, checkpoints, words), stack)
        stack.callback(transport.shutdown)  # before the processes end
        shards = Shards(transport)
        yield shards, _backward(settings, shards, recipe)


def _backward(settings: SplitTrainSettings, shards: Shards, recipe: Recipe) -> Backward:
    if settings.project.backward is BackwardKind.explicit:
        return Explicit(shards)
    from split.training.autograd import Autograd  # some systems lack it

    return Autograd(shards, recipe)


class _Local(NamedTuple):
    """What shards on this machine need."""

    folder: Path
    """Where they log."""
    checkpoints: Path
    words: Sequence[str] | None

    def told(self) -> list[str]:
        """The words of each of them, but for its place."""
        words = own_words(NOT_FOR_SHARDS) if self.words is None else self.words
        return [*words, override("project.checkpoints", self.checkpoints)]


def _open(settings: SplitTrainSettings, device: torch.device, local: _Local, stack: ExitStack) -> TrainingTransport:
    project = settings.project
    if project.transport is TransportKind.rpc:
        return _open_group(settings, local, stack)
    count = len(project.shards) or project.local_shards
    if not count:
        raise UserError("project.shards must name at least one shard (or set project.local_shards), got []")
    layers = cut_layers(settings.model, project.cuts, count)
    if project.transport is TransportKind.inproc:
        stages = [make_stage(settings.model, device, part, local.checkpoints) for part in layers]
        return InProcessTraining(stages, layers)
    if project.shards:
        return _connect(settings, project.shards)
    shards = LocalShards(
        layers, local.folder, project.start_seconds, local.told(), module=LEARNER, pin=project.pin_cores
    )
    return _connect(settings, [str(address) for address in stack.enter_context(shards).addresses])


def _open_group(settings: SplitTrainSettings, local: _Local, stack: ExitStack) -> TrainingTransport:
    from split.transport.rpc import check_master  # some systems lack it
    from split.transport.training_rpc import RpcTraining

    check_master(settings.network)
    project, port, world_size = settings.project, settings.network.port, settings.project.world_size
    if project.local_shards:
        port, world_size = free_port(), project.local_shards + 1
        layers = cut_layers(settings.model, project.cuts, project.local_shards)
        stack.enter_context(
            LocalShards.of_group(layers, local.folder, port, local.told(), module=LEARNER, pin=project.pin_cores)
        )
    elif project.shards or not world_size:
        raise UserError(
            f"project.world_size must be set for transport=rpc, where shards come to the trainer, got {world_size}"
        )
    return RpcTraining(world_size, settings.network, port, weights_fingerprints(settings.model))


def _connect(settings: SplitTrainSettings, addresses: Sequence[str]) -> TcpTraining:
    project, network = settings.project, settings.network
    try:
        return TcpTraining(
            [Address.parse(text) for text in addresses],
            [Address.parse(text) for text in project.spares],
            training_side(settings.model, network, "trainer"),
            tls=client_side_tls(network),
            answer_seconds=network.request_timeout_seconds,
            start_seconds=project.start_seconds,
        )
    except ChainMismatch as error:
        raise UserError(f"project.shards: {error}") from None
    except (ShardLost, WireError) as error:
        raise UserError(f"project.shards must be reachable and hold this model: {error}") from None


def identity_of(model: ModelSettings) -> str:
    """Which weights a run began with: the base model, and the adapter where it goes on from one."""
    prints = weights_fingerprints(model)
    return f"{model_identity(model)} adapter={prints['adapter']}"


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
