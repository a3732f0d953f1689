"""Settings of the federated benchmarks: `python -m fl.bench`."""

from dataclasses import dataclass

from lab.settings import LabSettings, register, require, require_above, require_at_least


@dataclass(kw_only=True)
class FederatedBenchProjectSettings:
    """Sizes of the parts; an empty list leaves a part out."""

    report: str | None
    """File of the report; null: benchmarks/results/fl-<commit>.json below the working folder."""
    adapter_bytes: int
    """Size of the adapter that is folded."""
    turns: int
    """Turns of exact and plain sums, after one warm-up turn."""
    few_replies: int
    many_replies: int
    """Numbers of replies in two rounds whose peak memory is compared."""
    size_models: list[str]
    """Models of conf/model whose messages are measured."""
    scale: list[str]
    """Overrides of the simulation whose time and server memory are measured."""
    many_sites: list[str]
    """Overrides of the simulation with many sites, whose memory is measured from round to round."""
    lines_of_many_sites: int
    """Lines of the file that its sites share."""
    compare: list[str]
    """Overrides of the federation that is compared with its central baseline."""
    compare_seeds: list[int]
    run_timeout_seconds: float
    """Time limit of one of these runs."""

    def __post_init__(self) -> None:
        require(
            self.adapter_bytes >= 4 and self.adapter_bytes % 4 == 0,
            "adapter_bytes must be a positive multiple of 4",
            self.adapter_bytes,
        )
        require_at_least(1, self, "turns", "lines_of_many_sites")
        require_at_least(2, self, "few_replies")
        require(
            self.many_replies > self.few_replies,
            f"many_replies must be greater than few_replies={self.few_replies}",
            self.many_replies,
        )
        require_above(0, self, "run_timeout_seconds")


@register("fed_bench")
@dataclass(kw_only=True)
class FederatedBenchSettings(LabSettings):
    """All settings of `python -m fl.bench`."""

    project: FederatedBenchProjectSettings


@dataclass(kw_only=True)
class MeanBenchProjectSettings:
    """Sizes of the benchmarks of the right mean."""

    parts: list[str]
    """Parts to run."""
    report: str
    """File of the report."""
    width: int
    """Inputs and outputs of the module whose sum is decomposed."""
    rank: int
    """Rank of every site's adapter."""
    sites: int
    turns: int
    """Decompositions that are timed, after one that is not; the dense one is timed once."""
    uplink_model: str
    """Model of conf/model whose replies are measured."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "rank", "sites", "turns")
        most = self.sites * self.rank
        require(self.width > self.rank < most, f"rank must be less than width={self.width} and {most}", self.rank)


@register("fed_mean_bench")
@dataclass(kw_only=True)
class FederatedMeanBenchSettings(LabSettings):
    """All settings of `python -m fl.bench.mean`."""

    project: MeanBenchProjectSettings
