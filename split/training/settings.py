"""Settings of split training: which layers where, what is trained, how a step is cut, what is kept."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lab.settings import (
    DataSettings,
    LabSettings,
    LoraSettings,
    OptimizationSettings,
    register,
    require,
)
from split.settings import TransportKind, check_address, parse_layers
from split.training.messages import MAX_EXAMPLES, MAX_MICRO_BATCHES, Train
from split.training.schedule import Schedule


class BackwardKind(Enum):
    """Who carries gradients over the cut. `explicit`: we do, over any transport; `autograd`: torch's distributed
    autograd, over rpc."""

    explicit = "explicit"
    autograd = "autograd"


class Baseline(Enum):
    """What the run is compared with. `unsplit`: the same steps of the whole model in the trainer's own process."""

    none = "none"
    unsplit = "unsplit"


@dataclass(kw_only=True)
class SplitTrainProjectSettings:
    """Both roles read one config; each value says whose it is where only one of them uses it."""

    transport: TransportKind
    backward: BackwardKind
    schedule: Schedule
    layers: str | None
    """Shard: its layers, `first:last`, counted from 0, without the last."""
    next: str | None
    """Shard: where the next one listens, `host:port`, as seen from here; null: the trainer says it."""
    rank: int
    """Shard over rpc: its place in the group, 1 for the first one; the trainer is 0."""
    world_size: int
    """Over rpc: processes of the group, trainer included; `network.host` and `port` are where the trainer opens it."""
    follow_stdin: bool
    """Shard: end when standard input ends, so that it does not outlive the process that started it."""
    max_connections: int
    """Shard: connections at once."""
    shards: list[str]
    """Trainer: where the shards listen, `host:port` each, first to last."""
    spares: list[str]
    """Trainer: shards that may take the place of one with the same layers; they need its part of the checkpoint."""
    local_shards: int
    """Trainer: start so many shards here and end them afterwards; 0: none."""
    cuts: list[int]
    """Trainer: where the shards that it starts begin, without the first's 0; []: even."""
    pin_cores: bool
    """Trainer: each shard that it starts on a core of its own, so that times can be compared (Linux)."""
    recovery_seconds: float
    """Trainer: how long to try to bring back a lost shard."""
    start_seconds: float
    """Trainer: how long the shards may take to be there at first."""
    train: Train
    steps: int
    """Trainer: optimizer steps of the whole run, resumed ones included. A finished run may be given more: what is left
    follows the schedule of the new number."""
    micro_batches: int
    """Trainer: parts of a batch that are under way at the same time."""
    activation_checkpointing: bool
    """Compute a layer's activations again in its backward instead of keeping them."""
    checkpoints: str | None
    """Where checkpoints are written, on each machine; null: `checkpoints` in the run folder."""
    checkpoint_every: int
    """Trainer: steps between two checkpoints; 0: only after the last step. The last two are kept."""
    resume: str | None
    """Trainer: a run's checkpoints, or one step of them, to go on from; null: from the beginning."""
    allow_changed_data: bool
    """Trainer: go on from a checkpoint although its examples were others; said in the log."""
    baseline: Baseline
    lora: LoraSettings
    """With model.adapter its rank and alpha must be these, and the rest of it is the folder's but for the dropout."""
    optimization: OptimizationSettings
    data: DataSettings

    def __post_init__(self) -> None:
        for name in ("steps", "micro_batches", "max_connections"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        most = MAX_MICRO_BATCHES
        require(self.micro_batches <= most, f"micro_batches must be at most {most}", self.micro_batches)
        for name in ("local_shards", "recovery_seconds", "rank", "checkpoint_every"):
            require(getattr(self, name) >= 0, f"{name} must be at least 0", getattr(self, name))
        require(self.start_seconds > 0, "start_seconds must be greater than 0", self.start_seconds)
        require(self.world_size == 0 or self.world_size >= 2, "world_size must be 0 or at least 2", self.world_size)
        ascending = all(a < b for a, b in zip([0, *self.cuts], self.cuts))
        require(ascending, "cuts must ascend from above 0", self.cuts)
        if self.layers is not None:
            parse_layers(self.layers)
        for name in ("shards", "spares"):
            for text in getattr(self, name):
                check_address(f"{name} must hold host:port", text)
        if self.next is not None:
            check_address("next must be host:port", self.next)
        require(
            self.optimization.batch_size % self.micro_batches == 0,
            f"optimization.batch_size must be divisible into micro_batches={self.micro_batches}",
            self.optimization.batch_size,
        )
        for name, most in (
            ("accumulation", MAX_MICRO_BATCHES // self.micro_batches),
            ("batch_size", MAX_EXAMPLES * self.micro_batches),
        ):
            value = getattr(self.optimization, name)
            rule = f"optimization.{name} must be at most {most} with micro_batches={self.micro_batches}"
            require(value <= most, rule, value)
        if self.backward is BackwardKind.autograd:
            require(
                self.transport is TransportKind.rpc,
                "transport must be rpc for backward=autograd (torch's distributed autograd knows no other)",
                self.transport.name,
            )
            require(
                self.schedule is Schedule.gpipe,
                "schedule must be gpipe for backward=autograd (one context takes one joint backward of all its "
                "micro-batches: a backward for each hangs until its time-out)",
                self.schedule.name,
            )


@dataclass(kw_only=True)
class SplitTrainSettings(LabSettings):
    """Everything that a trainer and its shards read."""

    project: SplitTrainProjectSettings


register("split_train", SplitTrainSettings)
