"""Settings of the demonstration: the overrides of each part."""

from dataclasses import dataclass

from lab.settings import LabSettings, register, require_above


@dataclass(kw_only=True)
class DemoProjectSettings:
    """Overrides of the parts' commands; those that generate text also take the demonstration's prompt."""

    federated: list[str]
    """For simulations/fed_sim.py."""
    verifier: list[str]
    """For speculative.verifier."""
    drafter: list[str]
    """For speculative.drafter."""
    split: list[str]
    """For split.infer."""
    split_training: list[str]
    """For split.train."""
    matrix: list[str]
    """For run_matrix.py."""
    server: list[str]
    """For serve."""
    chat: list[str]
    """For serve.chat."""
    part_timeout_seconds: float
    """Time limit of one part."""

    def __post_init__(self) -> None:
        require_above(0, self, "part_timeout_seconds")


@register("demo")
@dataclass(kw_only=True)
class DemoSettings(LabSettings):
    """All settings of `python -m simulations.demo`."""

    project: DemoProjectSettings
