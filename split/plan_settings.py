"""Settings of the planner: the machines there are, and what they are to do."""

from __future__ import annotations

from dataclasses import dataclass

from lab.settings import LabSettings, register, require
from split.chain.boundary import Boundary

MAX_NODES = 7
"""All orders of them are tried."""


@dataclass(kw_only=True)
class NodeSettings:
    """A machine that could take layers."""

    name: str
    memory_gb: float
    """What the model may take there, in units of 10^9 bytes."""
    gb_per_second: float
    """How fast it reads weights: about its memory's bandwidth."""
    delay_ms: float
    """One way to the middle of the network."""
    megabit_per_second: float
    """Of its link."""
    layer_ms: float
    """Measured time of a layer for one token (`split.bench`); 0: from `gb_per_second`."""
    head_ms: float
    """Measured time of the head for one token; 0: from `gb_per_second`."""

    def __post_init__(self) -> None:
        for name in ("memory_gb", "gb_per_second", "megabit_per_second"):
            require(getattr(self, name) > 0, f"{name} must be greater than 0", getattr(self, name))
        for name in ("delay_ms", "layer_ms", "head_ms"):
            require(getattr(self, name) >= 0, f"{name} must be at least 0", getattr(self, name))


@dataclass(kw_only=True)
class PlanProjectSettings:
    """What is to be planned."""

    nodes: list[NodeSettings]
    boundary: Boundary
    context: int
    """Tokens of each text that must fit."""
    sessions: int
    prefill_chunk: int
    overhead_gb: float
    """Of each process, before any weight."""
    hop_ms: float
    """Of each frame besides its link."""

    def __post_init__(self) -> None:
        require(1 <= len(self.nodes) <= MAX_NODES, f"nodes must name 1 to {MAX_NODES} machines", len(self.nodes))
        names = [node.name for node in self.nodes]
        require(len(set(names)) == len(names), "nodes must have different names", names)
        for name in ("context", "sessions", "prefill_chunk"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        for name in ("overhead_gb", "hop_ms"):
            require(getattr(self, name) >= 0, f"{name} must be at least 0", getattr(self, name))


@dataclass(kw_only=True)
class PlanSettings(LabSettings):
    """Everything the planner reads."""

    project: PlanProjectSettings


register("split_plan", PlanSettings)
