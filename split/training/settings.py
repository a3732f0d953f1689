"""Settings of split training: trained weights, micro-batches, checkpoints."""

from dataclasses import dataclass
from enum import Enum

from lab.settings import (
    DataSettings,
    LabSettings,
    LoraSettings,
    OptimizationSettings,
    register,
    require,
    require_at_least,
)
from split.settings import ChainSettings, TransportKind
from split.training.schedule import Schedule

MAX_MICRO_BATCHES = 4096
"""Micro-batches of a step, at most: part of the protocol."""
MAX_EXAMPLES = 4096
"""Examples of a micro-batch, at most: part of the protocol."""


class Train(Enum):
    """`lora`: an adapter on a frozen base. `everything`: every weight of the model."""

    lora = "lora"
    everything = "everything"


class BackwardKind(Enum):
    """Transport of gradients across the cut. `explicit`: our messages, over any transport; `autograd`: torch's
    distributed autograd, over rpc."""

    explicit = "explicit"
    autograd = "autograd"


class Baseline(Enum):
    """Run for comparison. `unsplit`: the same steps of the whole model in the trainer's own process."""

    none = "none"
    unsplit = "unsplit"


@dataclass(kw_only=True)
class SplitTrainProjectSettings(ChainSettings):
    """Training over a chain."""

    backward: BackwardKind
    schedule: Schedule
    pin_cores: bool
    """Trainer: pin each local shard to its own core, so that times can be compared (Linux)."""
    train: Train
    steps: int
    """Trainer: optimizer steps of the whole run, including those before a resume. A finished run may be given more: the
    remaining ones follow the schedule of the new number."""
    micro_batches: int
    """Trainer: parts into which a batch is divided, so that the shards work concurrently."""
    activation_checkpointing: bool
    """Compute a layer's activations again in its backward instead of keeping them."""
    checkpoints: str | None
    """Folder of the checkpoints, on each machine; null: `checkpoints` in the run folder."""
    checkpoint_every: int
    """Trainer: steps between two checkpoints; 0: only after the last step. The last two are kept."""
    resume: str | None
    """Trainer: a run's checkpoints, or one step of them, to continue from; null: from the beginning."""
    allow_changed_data: bool
    """Trainer: continue from a checkpoint of other examples, with a warning."""
    baseline: Baseline
    lora: LoraSettings
    """With model.adapter, rank and alpha must be the adapter's; everything but the dropout comes from its folder."""
    optimization: OptimizationSettings
    data: DataSettings

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "steps", "micro_batches")
        require_at_least(0, self, "checkpoint_every")
        rule = f"micro_batches must be at most {MAX_MICRO_BATCHES}"
        require(self.micro_batches <= MAX_MICRO_BATCHES, rule, self.micro_batches)
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


@register("split_train")
@dataclass(kw_only=True)
class SplitTrainSettings(LabSettings):
    """Settings of a trainer and of its shards."""

    project: SplitTrainProjectSettings

    takes_adapter = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_differentiable()
