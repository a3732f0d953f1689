"""Settings of the federated benchmarks: `python -m fl.bench`."""

from dataclasses import dataclass

from lab.settings import LabSettings, register, require, require_above, require_at_least


@dataclass(kw_only=True)
class FederatedBenchProjectSettings:
    """How large each part is; an empty list leaves a part out."""

    report: str | None
    """File of the results; null: benchmarks/results/fl-<commit>.json below the working folder."""
    adapter_bytes: int
    """Size of the adapter that is folded."""
    turns: int
    """Turns of folding against plain sums, after one to warm up."""
    few_replies: int
    many_replies: int
    """Replies of two rounds whose peaks of memory are compared."""
    size_models: list[str]
    """Models of conf/model whose messages are measured."""
    scale: list[str]
    """Overrides of the simulation whose time and server memory are measured."""
    compare: list[str]
    """Overrides of the federation that is compared with its central baseline."""
    compare_seeds: list[int]
    run_timeout_seconds: float
    """Longest one of these runs may take."""

    def __post_init__(self) -> None:
        require(
            self.adapter_bytes >= 4 and self.adapter_bytes % 4 == 0,
            "adapter_bytes must be a positive multiple of 4",
            self.adapter_bytes,
        )
        require_at_least(1, self, "turns")
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
    """Everything `python -m fl.bench` reads."""

    project: FederatedBenchProjectSettings
