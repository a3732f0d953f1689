"""Settings of `make bench`: the benchmarks and their overrides."""

from dataclasses import dataclass

from lab.settings import LabSettings, register, require


@dataclass(kw_only=True)
class BenchmarkSettings:
    """One benchmark: a command whose last line holds `rows`."""

    name: str
    command: str
    """Module that it runs."""
    overrides: list[str]


@dataclass(kw_only=True)
class BenchProjectSettings:
    """The benchmarks, and where their figures are written."""

    benchmarks: list[BenchmarkSettings]
    only: list[str]
    """Names of the benchmarks to run; for the others, the figures of the last report are kept. Empty: all."""
    folder: str
    """Folder of results/<date>-<commit>.json and RESULTS.md."""
    timeout_seconds: float
    """Time limit of one benchmark."""

    def __post_init__(self) -> None:
        require(bool(self.benchmarks), "benchmarks must name at least one", self.benchmarks)
        unknown = sorted(set(self.only) - {benchmark.name for benchmark in self.benchmarks})
        require(not unknown, f"only must name some of {', '.join(b.name for b in self.benchmarks)}", unknown)
        require(self.timeout_seconds > 0, "timeout_seconds must be greater than 0", self.timeout_seconds)


@register("bench")
@dataclass(kw_only=True)
class BenchSettings(LabSettings):
    """All settings of `python -m simulations.bench`."""

    project: BenchProjectSettings
