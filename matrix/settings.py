"""Settings of a sweep: which command over which axes, within which limits, where, and what is drawn of it."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from lab.settings import LabSettings, register, require, require_above, require_at_least


class Launcher(Enum):
    """The launcher of the cells: this process on this machine, or a Ray cluster on all of its machines."""

    local = "local"
    ray = "ray"


class Better(Enum):
    """Which way a figure is good."""

    lower = "lower"
    higher = "higher"


@dataclass(kw_only=True)
class MetricSettings:
    """One figure of a cell that is drawn."""

    figure: str
    """Where it stands in a cell's result.json, dotted."""
    title: str
    unit: str
    """Unit of the figure times `scale`."""
    scale: float
    better: Better

    def __post_init__(self) -> None:
        require_above(0, self, "scale")


@dataclass(kw_only=True)
class SweepSettings:
    """One sweep. `name`, `command`, `config`, `axes` and `metrics` are the preset's (conf/matrix)."""

    name: str
    """The preset's own, for titles and folders."""
    command: str
    """Module of a cell: `python -m <command>`; its last line holds the cell's figures."""
    config: str
    """That command's primary config."""
    overrides: list[str]
    """Words of every cell; those of the command line come behind them."""
    axes: dict[str, list[Any]]
    """Values by dotted key. `key=a,b,c` on the command line replaces an axis or adds one, `key=a` takes it away."""
    metrics: list[MetricSettings]
    labels: dict[str, str]
    """Names of axes, with their units; another axis goes by its key."""
    repeats: int
    """Runs of each cell, interleaved (A, B, ..., A, B, ...)."""
    max_cells: int
    """Most cells of a sweep."""
    retry_failed: bool
    """Run those again whose result is a failure."""
    time_limit_seconds: float
    """Most time of one run of a cell."""
    memory_limit_gib: float
    """Resident memory of a cell's processes together, in GiB."""
    launcher: Launcher
    at_once: int
    """Cells at once on this machine (launcher=local); 0: as many as cores and memory allow. More than one disturb each
    other."""
    cores: float
    """CPU cores that a cell takes."""
    gpus: float
    """GPUs that a cell takes (launcher=ray)."""
    address: str
    """Ray cluster, `host:port`; auto: the one that runs on this machine; local: one for this sweep only."""
    address_timeout_seconds: float
    """How long that cluster may take to answer."""
    results: str
    """Folder of the cells: `<results>/<signature>/result.json`, shared by all sweeps."""
    plot: str | None
    """Folder of a finished sweep to draw again instead of running anything."""
    compare: str | None
    """Folder of another sweep to draw ratios to."""
    lines_from: int
    """Least number of values with which a numeric axis is drawn as a line plot."""
    sources: list[str]
    """Packages whose code is part of a cell's signature."""
    contents: list[str]
    """Settings that name a local file or folder, dotted: what stands in it is part of a cell's signature, too."""
    unsigned: list[str]
    """Settings that change no figure and are left out of it, dotted; a group stands for all below it."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "repeats", "max_cells")
        require_above(0, self, "time_limit_seconds", "memory_limit_gib", "cores", "address_timeout_seconds")
        require_at_least(0, self, "at_once", "gpus")
        require_at_least(2, self, "lines_from")
        require(bool(self.metrics), "metrics must name at least one figure", self.metrics)


@register("matrix")
@dataclass(kw_only=True)
class MatrixSettings(LabSettings):
    """Everything `python run_matrix.py` reads. `model`, `seed`, `network` and `device` are for the cells, too;
    `project.*` is for the cells alone."""

    matrix: SweepSettings
