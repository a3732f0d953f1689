"""Settings of `make bench`: which benchmarks, told what."""

from dataclasses import dataclass

from lab.settings import LabSettings, register, require


@dataclass(kw_only=True)
class BenchmarkSettings:
    """One benchmark: a command whose last line holds `rows`."""

    name: str
    command: str
    """Its module."""
    overrides: list[str]


@dataclass(kw_only=True)
class BenchProjectSettings:
    """All of them, and where the figures go."""

    benchmarks: list[BenchmarkSettings]
    only: list[str]
    """Names of those to run; of the others the figures of the last report stay. Empty: all."""
    folder: str
    """Gets results/<date>-<commit>.json and RESULTS.md."""
    timeout_seconds: float
    """Longest that one benchmark may take."""

    def __post_init__(self) -> None:
        require(bool(self.benchmarks), "benchmarks must name at least one", self.benchmarks)
        unknown = sorted(set(self.only) - {benchmark.name for benchmark in self.benchmarks})
        require(not unknown, f"only must name some of {', '.join(b.name for b in self.benchmarks)}", unknown)
        require(self.timeout_seconds > 0, "timeout_seconds must be greater than 0", self.timeout_seconds)


@register("bench")
@dataclass(kw_only=True)
class BenchSettings(LabSettings):
    """Everything `python -m simulations.bench` reads."""

    project: BenchProjectSettings
