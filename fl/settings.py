"""Settings of the federated pillar: clients, rounds, and the format on the wire."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    """How documents go to the clients of a simulation.

    `package`: whole units, in clients of equal size; `iid`: documents in random order, likewise. The others are those
    of flwr-datasets. `natural`: a client for each unit; `dirichlet`: shares of each unit, drawn for every client;
    `shards`: a few shards of the documents in the order of their units; `linear`: random documents, for client i
    (from 0) in proportion to i + 1.
    """

    package = "package"
    iid = "iid"
    natural = "natural"
    dirichlet = "dirichlet"
    shards = "shards"
    linear = "linear"


@dataclass(frozen=True, kw_only=True)
class PartitionRule:
    """How documents go to clients, with the numbers that it takes."""

    by: PartitionBy
    alpha: float
    shards: int


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


class Aggregation(Enum):
    """How the adapters of a round's replies become the next one (`fl.aggregation.rules`)."""

    average = "average"
    ffa = "ffa"
    rolora = "rolora"
    stack = "stack"
    svd = "svd"

    @property
    def takes_ranks(self) -> bool:
        """Whether sites may have different ranks."""
        return self in (Aggregation.stack, Aggregation.svd)


class ServerOptimizerName(Enum):
    """The server's step from the adapter that sites received towards their mean (`fl.aggregation.optimizer`)."""

    none = "none"
    """The mean itself."""
    fedavgm = "fedavgm"
    fedadam = "fedadam"
    nesterov = "nesterov"


@dataclass(kw_only=True)
class ServerOptimizerSettings:
    """The server's optimizer."""

    name: ServerOptimizerName
    learning_rate: float
    momentum: float
    """Momentum of fedavgm and nesterov; beta1 of fedadam."""
    beta2: float
    """Of fedadam."""
    epsilon: float
    """Of fedadam: the larger, the less it adapts."""

    def __post_init__(self) -> None:
        require_above(0, self, "learning_rate", "epsilon")
        for name in ("momentum", "beta2"):
            require(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1)", getattr(self, name))
        if self.name is ServerOptimizerName.nesterov:
            require(self.momentum > 0, "momentum must be greater than 0 for name=nesterov", self.momentum)
        if self.name is ServerOptimizerName.fedadam:  # whose step changes every value by about as much
            require(self.learning_rate <= 0.1, "learning_rate must be at most 0.1 for name=fedadam", self.learning_rate)


class Share(Enum):
    """Factors of the adapter that sites share; `A`: each keeps a B of its own (FedSA-LoRA, arXiv 2410.01463)."""

    both = "both"
    A = "A"


class Codec(Enum):
    """Format of an update on the wire (`fl.compression.codec`)."""

    none = "none"
    """The adapter itself, in `wire_dtype`."""
    bf16 = "bf16"
    int8 = "int8"
    int4 = "int4"
    topk_int8 = "topk_int8"


@dataclass(kw_only=True)
class CompressionSettings:
    """Updates of the adapter on the wire, against what the receiver has."""

    uplink: Codec
    """Of replies to the server."""
    downlink: Codec
    """Of messages to a site that has the adapter of the round before; others get it whole."""
    topk_fraction: float
    """Share of the values that topk_int8 sends."""

    def __post_init__(self) -> None:
        require(0 < self.topk_fraction <= 1, "topk_fraction must be in (0, 1]", self.topk_fraction)

    @property
    def is_on(self) -> bool:
        """Whether anything is compressed."""
        return (self.uplink, self.downlink) != (Codec.none, Codec.none)


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
    partition_alpha: float
    """Concentration of partition_by=dirichlet: the smaller it is, the fewer clients share a unit (arXiv 1905.12022)."""
    partition_shards: int
    """Shards of a client with partition_by=shards (arXiv 1602.05629)."""
    weighting: Weighting
    aggregation: Aggregation
    residual_rank: int
    """Most rows of a module that stack and svd keep, in a second and frozen adapter, beyond `lora.rank`."""
    site_ranks: list[int]
    """Rank of each site's adapter, by its number; []: `lora.rank` at all sites."""
    site_alphas: list[float]
    """Alpha of each site's adapter, by its number; []: `lora.alpha` at all sites."""
    server_optimizer: ServerOptimizerSettings
    wire_dtype: WireDtype
    compression: CompressionSettings
    share: Share
    site_folder: str
    """Folder on each site's machine for its memory between rounds, which compression and `share=A` need."""
    site_keep_days: float
    """Days after which a site removes the memory of another run."""
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
    watch_seconds: float
    """Deployment: pause between two looks of `python -m fl.run` at the files of its run."""
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
        require_at_least(
            1, self, "num_clients", "rounds", "local_steps", "attempts", "max_failures", "partition_shards"
        )
        require_at_least(0, self, "proximal_mu", "workers", "worker_retries", "retry_seconds", "pause_rounds")
        require_above(
            0,
            self,
            "partition_alpha",
            "node_timeout_seconds",
            "reply_timeout_seconds",
            "poll_seconds",
            "command_timeout_seconds",
            "watch_seconds",
            "warm_limit_bytes",
        )
        require(0 < self.fraction <= 1, "fraction must be in (0, 1]", self.fraction)
        self._check_sites()
        require_at_least(0, self, "site_keep_days")
        if self.share is Share.A:
            rule = "aggregation must be average for share=A, which trains A and B and shares A"
            require(self.aggregation is Aggregation.average, rule, self.aggregation.name)
        if self.compression.is_on:
            rule = "aggregation must be average, ffa or rolora, whose factors keep their basis, for compression"
            require(not self.aggregation.takes_ranks, rule, self.aggregation.name)
            rule = "wire_dtype must be float32 for compression, which has formats of its own"
            require(self.wire_dtype is WireDtype.float32, rule, self.wire_dtype.name)
        if self.server_optimizer.name is not ServerOptimizerName.none:
            rule = "aggregation must be average, ffa or rolora, whose factors keep their basis, for"
            rule += f" server_optimizer.name={self.server_optimizer.name.name}"
            require(not self.aggregation.takes_ranks, rule, self.aggregation.name)
        if self.aggregation is Aggregation.stack:
            needed = self.stacked_rank
            rule = f"residual_rank must be at least {needed} for aggregation=stack, which loses nothing, over"
            rule += f" {self.rounds} rounds of {self.asked} sites (aggregation=svd keeps the best part in any rank)"
            require(self.residual_rank >= needed, rule, self.residual_rank)
        require(
            1 <= self.quorum <= self.asked, f"quorum must be in [1, {self.asked}], the clients of a round", self.quorum
        )
        most = self.num_clients - self.asked
        require(0 <= self.oversample <= most, f"oversample must be in [0, {most}], the other clients", self.oversample)
        deadline, rule = (
            self.round_deadline_seconds,
            "round_deadline_seconds must be null or in (0, reply_timeout_seconds]",
        )
        require(deadline is None or 0 < deadline <= self.reply_timeout_seconds, rule, deadline)
        if self.baseline is Baseline.central:
            require(self.resume is None, "resume must be null for baseline=central", self.resume)

    def _check_sites(self) -> None:
        require_at_least(0, self, "residual_rank")
        for name in ("site_ranks", "site_alphas"):
            values = getattr(self, name)
            rule = f"{name} must have one value for each of num_clients={self.num_clients} sites, or none"
            require(len(values) in (0, self.num_clients), rule, values)
            require(all(value > 0 for value in values), f"{name} must be greater than 0", values)
        most = self.lora.rank
        require(
            all(rank <= most for rank in self.site_ranks),
            f"site_ranks must be at most lora.rank={most}",
            self.site_ranks,
        )
        if any(rank != most for rank in self.site_ranks):
            rule = f"aggregation must be stack or svd for sites of ranks {self.site_ranks}, with lora.rank={most}"
            require(self.aggregation.takes_ranks, rule, self.aggregation.name)

    @property
    def partition_rule(self) -> PartitionRule:
        """How documents go to clients."""
        return PartitionRule(by=self.partition_by, alpha=self.partition_alpha, shards=self.partition_shards)

    @property
    def remembers(self) -> bool:
        """Whether sites have a memory between rounds."""
        return self.compression.is_on or self.share is not Share.both

    @property
    def asked(self) -> int:
        """Sites that are asked in one round."""
        return max(1, round(self.fraction * self.num_clients))

    @property
    def stacked_rank(self) -> int:
        """Most rows that a run's stack can have: those of all replies of all rounds, and those of an adapter to start
        from, which sites of different ranks cannot train whole."""
        first = self.lora.rank if self.warm_start is not None and self.site_ranks else 0
        replies = sum(sorted(self.site_ranks, reverse=True)[: self.asked] or [self.asked * self.lora.rank])
        return first + self.rounds * replies

    def lora_of(self, site: int) -> LoraSettings:
        """The adapter that a site trains. ValueError for a number without a place in `site_ranks` or `site_alphas`."""
        lora = self.lora
        for name, field in (("site_ranks", "rank"), ("site_alphas", "alpha")):
            if values := getattr(self, name):
                require(site < len(values), f"partition-id must be in [0, {len(values)}) for project.{name}", site)
                lora = replace(lora, **{field: values[site]})
        return lora


@register("fed_learn")
@dataclass(kw_only=True)
class FederatedSettings(LabSettings):
    """All settings of `simulations/fed_sim.py` and the Flower apps."""

    project: FederatedProjectSettings

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_differentiable()
