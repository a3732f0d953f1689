"""Settings of `make bench`: which benchmarks, told what."""

from __future__ import annotations

from dataclasses import dataclass

from lab.settings import LabSettings, register_project, require


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
    folder: str
    """Gets results/<date>-<commit>.json and RESULTS.md."""
    timeout_seconds: float
    """Longest that one benchmark may take."""

    def __post_init__(self) -> None:
        require(bool(self.benchmarks), "benchmarks must name at least one", self.benchmarks)
        require(self.timeout_seconds > 0, "timeout_seconds must be greater than 0", self.timeout_seconds)


@dataclass(kw_only=True)
class BenchSettings(LabSettings):
    """Everything `python -m simulations.bench` reads."""

    project: BenchProjectSettings


register_project("bench", BenchProjectSettings)
