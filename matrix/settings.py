"""Settings of a sweep: its command, axes, limits, launcher and pictures."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from lab.settings import LabSettings, register, require, require_above, require_at_least


class Launcher(Enum):
    """Launcher of the cells: this process on this machine, or a Ray cluster on all of its machines."""

    local = "local"
    ray = "ray"


class Better(Enum):
    """Whether smaller or larger figures are better."""

    lower = "lower"
    higher = "higher"


@dataclass(kw_only=True)
class MetricSettings:
    """A figure of each cell that is drawn."""

    figure: str
    """Its key in a cell's result.json, dotted."""
    title: str
    unit: str
    """Unit of the figure times `scale`."""
    scale: float
    better: Better

    def __post_init__(self) -> None:
        require_above(0, self, "scale")


@dataclass(kw_only=True)
class SweepSettings:
    """One sweep. The preset (conf/matrix) gives `name`, `command`, `config`, `axes` and `metrics`."""

    name: str
    """Name of the preset, for titles and folders."""
    command: str
    """Module that a cell runs, `python -m <command>`; its last line holds the figures of the cell."""
    config: str
    """Primary config of that command."""
    overrides: list[str]
    """Overrides of every cell; those of the command line follow them."""
    axes: dict[str, list[Any]]
    """Values by dotted key. On the command line, `key=a,b,c` replaces or adds an axis, and `key=a` removes it."""
    metrics: list[MetricSettings]
    labels: dict[str, str]
    """Names of axes, with their units; the name of any other axis is its key."""
    repeats: int
    """Runs of each cell, interleaved (A, B, ..., A, B, ...)."""
    max_cells: int
    """A sweep with more cells is refused."""
    retry_failed: bool
    """Run cells again whose result is a failure."""
    time_limit_seconds: float
    """Time limit of one run of a cell."""
    memory_limit_gib: float
    """Limit of the resident memory of all processes of a cell, in GiB."""
    launcher: Launcher
    at_once: int
    """Concurrent cells on this machine (launcher=local); 0: as many as cores and memory allow. Concurrent cells slow
    each other down."""
    cores: float
    """CPU cores that a cell demands."""
    gpus: float
    """GPUs that a cell demands (launcher=ray)."""
    address: str
    """The Ray cluster, `host:port`; auto: the one that runs on this machine; local: a new one for this sweep only."""
    address_timeout_seconds: float
    """Time limit for that cluster to answer."""
    results: str
    """Folder of the cells: `<results>/<signature>/result.json`, shared by all sweeps."""
    plot: str | None
    """Folder of a finished sweep to draw again instead of running anything."""
    compare: str | None
    """Folder of another sweep, for pictures of the ratios."""
    lines_from: int
    """A numeric axis with at least this many values is drawn as a line plot."""
    sources: list[str]
    """Packages whose code is part of a cell's signature."""
    contents: list[str]
    """Dotted keys of settings that name a local file or folder, whose contents are part of a cell's signature, too."""
    unsigned: list[str]
    """Dotted keys of settings that change no figure and are not part of it; a group includes everything below it."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "repeats", "max_cells")
        require_above(0, self, "time_limit_seconds", "memory_limit_gib", "cores", "address_timeout_seconds")
        require_at_least(0, self, "at_once", "gpus")
        require_at_least(2, self, "lines_from")
        require(bool(self.metrics), "metrics must name at least one figure", self.metrics)


@register("matrix")
@dataclass(kw_only=True)
class MatrixSettings(LabSettings):
    """All settings of `python run_matrix.py`. `model`, `seed`, `network` and `device` apply to the cells, too;
    `project.*` only to the cells."""

    matrix: SweepSettings
