"""Settings of the federated pillar: clients, rounds, and the format on the wire."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from lab.settings import (
    DataSettings,
    LabSettings,
    LoraSettings,
    OptimizationSettings,
    register,
    require,
    require_above,
    require_at_least,
)

if TYPE_CHECKING:
    import numpy as np
    import torch


class PartitionBy(Enum):
    """`package`: whole units go to clients (not identically distributed); `iid`: documents are shuffled first."""

    package = "package"
    iid = "iid"


class WireDtype(Enum):
    """Number format of an adapter on the wire; bfloat16 travels as uint16, because numpy, and so Flower, lacks it."""

    float32 = "float32"
    bfloat16 = "bfloat16"

    @property
    def torch(self) -> torch.dtype:
        """The torch type of the tensors."""
        import torch  # here, so that a bad setting is reported without loading it

        return torch.float32 if self is WireDtype.float32 else torch.bfloat16

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy type of the packed array."""
        import numpy as np

        return np.dtype(np.float32 if self is WireDtype.float32 else np.uint16)

    @property
    def itemsize(self) -> int:
        """Bytes per value."""
        return self.numpy.itemsize


class Weighting(Enum):
    """Weight of a client's adapter and of its held-out loss in the mean."""

    examples = "examples"
    """Number of its examples: each dialogue counts the same, however long its answers are (FedAvg as published)."""
    answer_tokens = "answer_tokens"
    """Number of tokens that its loss counts: the mean loss is that of all tokens together."""

    @property
    def words(self) -> str:
        """The unit, as used in a sentence."""
        return self.value.replace("_", " ")


class Baseline(Enum):
    """`central`: the same number of steps on the union of the clients' data in one place, for comparison."""

    none = "none"
    central = "central"


@dataclass(kw_only=True)
class FederatedProjectSettings:
    """One federated run."""

    num_clients: int
    """Clients that take part; in deployment, SuperNodes that must be connected before round 1."""
    rounds: int
    local_steps: int
    """Optimizer steps of a client in one round."""
    fraction: float
    """Share of the clients that train in a round (chosen by seed and round); 1.0: all."""
    quorum: int
    """Good replies without which a round fails."""
    oversample: int
    """Clients asked in a round beyond its share; the first good replies count, as many as the share."""
    round_deadline_seconds: float | None
    """When a round ends although clients have not replied, if it has its quorum; null: it waits for all."""
    max_failures: int
    """Rounds that a client fails in a row before it is left out for a while."""
    pause_rounds: int
    """Rounds for which it is left out."""
    partition_by: PartitionBy
    weighting: Weighting
    wire_dtype: WireDtype
    proximal_mu: float
    """FedProx (arXiv 1812.06127): mu / 2 * |w - w_global|^2 added to the loss; 0: plain FedAvg."""
    baseline: Baseline
    warm_start: str | None
    """PEFT folder of this base model to start from; null: a new adapter."""
    resume: str | None
    """Folder of an interrupted run to continue, in a new folder; null: a new run."""
    resume_changes: list[str]
    """Settings, by dotted key, that may differ from those of the run that is continued."""
    warm: bool
    """Deployment: a worker beside each SuperNode keeps model and data between messages; false: a process a message."""
    warm_limit_bytes: int
    """Deployment: a worker that is larger than this after a message ends; the next message starts another."""
    attempts: int
    """Deployment: submissions of a run that fails, each from its last finished round."""
    retry_seconds: float
    """Deployment: pause before the next attempt."""
    superlink: str
    """Deployment: connection in the config.toml of `FLWR_HOME`; its SuperLink runs on this machine."""
    command_timeout_seconds: float
    """Deployment: time limit of one call of `flwr`."""
    node_timeout_seconds: float
    """Time limit for `num_clients` nodes to connect; in a deployment, also for the SuperLink to answer."""
    reply_timeout_seconds: float
    """Time to live of a message: a client that has not replied by then is left out of the round."""
    poll_seconds: float
    """Pause between two polls for replies."""
    workers: int
    """Ray workers in a simulation, each with its own copy of the base model; 0: one per core."""
    worker_retries: int
    """Retries of a message of a simulation after its worker died; then the message has failed."""
    lora: LoraSettings
    optimization: OptimizationSettings
    data: DataSettings

    def __post_init__(self) -> None:
        require_at_least(1, self, "num_clients", "rounds", "local_steps", "attempts", "max_failures")
        require_at_least(0, self, "proximal_mu", "workers", "worker_retries", "retry_seconds", "pause_rounds")
        require_above(
            0,
            self,
            "node_timeout_seconds",
            "reply_timeout_seconds",
            "poll_seconds",
            "command_timeout_seconds",
            "warm_limit_bytes",
        )
        require(0 < self.fraction <= 1, "fraction must be in (0, 1]", self.fraction)
        share = max(1, round(self.fraction * self.num_clients))
        require(1 <= self.quorum <= share, f"quorum must be in [1, {share}], the clients of a round", self.quorum)
        most = self.num_clients - share
        require(0 <= self.oversample <= most, f"oversample must be in [0, {most}], the other clients", self.oversample)
        deadline, rule = (
            self.round_deadline_seconds,
            "round_deadline_seconds must be null or in (0, reply_timeout_seconds]",
        )
        require(deadline is None or 0 < deadline <= self.reply_timeout_seconds, rule, deadline)
        if self.baseline is Baseline.central:
            require(self.resume is None, "resume must be null for baseline=central", self.resume)


@register("fed_learn")
@dataclass(kw_only=True)
class FederatedSettings(LabSettings):
    """All settings of `simulations/fed_sim.py` and the Flower apps."""

    project: FederatedProjectSettings

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_differentiable()
