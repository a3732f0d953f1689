"""From settings to training shards and the client's end of their chain; and to a shard that serves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from lab.command.overrides import override as make_override
from lab.device import give_back_freed_memory, open_device
from lab.files import path_of
from lab.models.fingerprints import weights_fingerprints
from lab.models.shape import ModelShape
from lab.models.sources import load_config, model_identity
from lab.settings import ModelSettings, UserError
from lab.wire.faults import BadFrame
from lab.wire.frame_connection import FrameConnection
from lab.wire.frames import Head
from split.chain.messages import Attach
from split.chain.open import Chain, ChainKind, LocalPlaces
from split.chain.server import ChainServer, tell_lost
from split.training.messages import MAX_JOINT_MICRO_BATCHES, PROTOCOL, Recipe, Start, table
from split.training.settings import MAX_MICRO_BATCHES, BackwardKind, SplitTrainSettings
from split.training.shard import TrainingShard
from split.training.stage import InitialWeight, TrainingStage
from split.training.trainer import Backward, ExplicitBackward, Shards
from split.training.weights import initial_weight, load_training_shard
from split.transport.base import To

if TYPE_CHECKING:
    from split.training.autograd import AutogradRpcShard  # some systems lack it

LEARNING = ChainKind(
    client="trainer",
    shard="learner",
    module="split.learn",
    protocol=PROTOCOL,
    table=table,
    worker_threads=2 * MAX_JOINT_MICRO_BATCHES,
)


def make_stage(model: ModelSettings, device: torch.device, layers: range, checkpoints: Path) -> TrainingStage:
    """A training shard with nothing loaded yet: the trainer sends what it has to train."""

    def load(start: Start) -> tuple[TrainingShard, InitialWeight]:
        shard = load_training_shard(model, device, layers, start.recipe)
        return shard, initial_weight(model, start.recipe, layers)

    return TrainingStage(layers, load, checkpoints)


def checkpoints_of(settings: SplitTrainSettings, folder: Path) -> Path:
    """Folder of the checkpoints on this machine: as set, or in the run's folder."""
    named = settings.project.checkpoints
    return path_of(named, "project.checkpoints") if named else folder / "checkpoints"


def identity_of(model: ModelSettings) -> str:
    """Identity of the weights that a run began with: the base model, and the adapter if it started from one."""
    prints = weights_fingerprints(model)
    return f"{model_identity(model)} adapter={prints['adapter']}"


@contextmanager
def open_shards(
    settings: SplitTrainSettings,
    recipe: Recipe,
    device: torch.device,
    folder: Path,
    checkpoints: Path,
    overrides: Sequence[str] | None = None,
) -> Iterator[tuple[Shards, Backward]]:
    """The shards that the settings describe; local ones live as long as this does.

    `overrides`: the command line of local shards, without their layers and checkpoints; None: our own.
    """
    override_checkpoints = make_override("project.checkpoints", checkpoints)
    local = LocalPlaces(folder, overrides, [override_checkpoints], pin_cores=settings.project.pin_cores)
    with ExitStack() as stack:
        transport = _chain(settings).open(
            local, lambda layers: make_stage(settings.model, device, layers, checkpoints), stack
        )
        shards = Shards(transport)
        yield shards, _backward(settings, shards, recipe)


def _chain(settings: SplitTrainSettings) -> Chain:
    return Chain(LEARNING, settings.model, settings.network, settings.project, weights_fingerprints(settings.model))


def _backward(settings: SplitTrainSettings, shards: Shards, recipe: Recipe) -> Backward:
    if settings.project.backward is BackwardKind.explicit:
        return ExplicitBackward(shards)
    from split.training.autograd import AutogradBackward  # some systems lack it

    return AutogradBackward(shards, recipe)


class TrainingServer(ChainServer):
    """Serves one trainer at a time: hidden states go to the next shard, gradients to the one before it."""

    phase = "training"
    most_waiting_messages = 4 * MAX_MICRO_BATCHES  # more than a schedule ever has in transit: both ends of a link send

    @override
    def takes(self, head: Head, origin: To) -> bool:
        return True  # the stage tells the trainer which messages are invalid

    @override
    def check_attaching(self, connection: FrameConnection, attach: Attach) -> None:
        if self.clients:
            tell_lost(connection, "this shard learns for another trainer")
            raise BadFrame(connection.peer, "attached while another trainer is")


def host(settings: SplitTrainSettings, folder: Path) -> dict[str, Any]:
    """Serve until Ctrl+C; the figures of the last line. UserError for settings that cannot be served."""
    checkpoints = checkpoints_of(settings, folder)
    give_back_freed_memory()

    def load(layers: range) -> TrainingStage:
        count = ModelShape.of(load_config(settings.model)).layers
        if layers.stop > count:
            raise UserError(f"project.layers must be within the model's {count} layers, got {settings.project.layers}")
        return make_stage(settings.model, open_device(settings.device), layers, checkpoints)

    def make_rpc_shard(stage: TrainingStage, name: str, model_layers: int, prints: dict[str, str]) -> AutogradRpcShard:
        from split.training.autograd import AutogradRpcShard

        return AutogradRpcShard(stage, name, model_layers, prints)

    _chain(settings).serve(load, TrainingServer, make_rpc_shard)
    return {"role": LEARNING.shard, "layers": settings.project.layers, "checkpoints": checkpoints}
