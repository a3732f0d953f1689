"""Settings of the demonstration: what its parts are told."""

from __future__ import annotations

from dataclasses import dataclass

from lab.settings import LabSettings, register, require_above


@dataclass(kw_only=True)
class DemoProjectSettings:
    """Overrides that the demonstration gives to each part's own command."""

    federated: list[str]
    """Of simulations/fed_sim.py."""
    verifier: list[str]
    """Of speculative.verifier."""
    drafter: list[str]
    """Of speculative.drafter; the prompt is the demonstration's own."""
    split: list[str]
    """Of split.infer; the same prompt."""
    split_training: list[str]
    """Of split.train."""
    matrix: list[str]
    """Of run_matrix.py."""
    part_timeout_seconds: float
    """Longest that one part may take."""

    def __post_init__(self) -> None:
        require_above(0, self, "part_timeout_seconds")


@dataclass(kw_only=True)
class DemoSettings(LabSettings):
    """Everything `python -m simulations.demo` reads."""

    project: DemoProjectSettings


register("demo", DemoSettings)
