"""A sweep's pictures: a heatmap per metric, or lines where an axis has many numbers; ratios to another sweep.

Yellow is good, whichever way the figure goes. A failed cell is hatched and says why.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.bench import Sample
from lab.figures import number
from lab.matrix.table import Metric, Row, Table, same_point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 100
WIDEST_INCHES = 12.0
"""1200 pixels."""

CHARACTERS_AN_INCH = 11
"""Of a title."""

MANY_COLUMNS = 8
"""With more, the texts in the cells are smaller."""

LEAST_RANGE = 0.2
"""Of the colour scale, as a share of the largest figure."""

GOOD_IS_HIGH, GOOD_IS_LOW = "viridis", "viridis_r"
RATIO_GOOD_IS_HIGH, RATIO_GOOD_IS_LOW = "BrBG", "BrBG_r"


@dataclass(frozen=True)
class Picture:
    """One pair of axes, everything else fixed."""

    table: Table
    rows: list[Row]
    down: str | None
    """Axis of a heatmap's rows, or of the lines."""
    across: str | None
    fixed: dict[str, Any]
    """Values of all other axes."""

    def grid(self) -> list[list[Row | None]]:
        """Cells by value, first down, then across."""
        return [
            [same_point(self.rows, self._point(down, across)) for across in self.values(self.across)]
            for down in self.values(self.down)
        ]

    def values(self, axis: str | None) -> list[Any]:
        """What an axis takes; one empty value where there is no such axis."""
        return [None] if axis is None else self.table.values(axis)

    def label(self, axis: str | None) -> str:
        """Name and unit."""
        return "" if axis is None else self.table.label(axis)

    def title(self, metric: str) -> str:
        """What is drawn, of which model, on what, from which commit."""
        sweep = self.table.sweep
        fixed = "".join(f", {self.table.label(key)} = {value}" for key, value in self.fixed.items())
        return f"{metric}{fixed}\n{sweep['model']} on {sweep['device']}, commit {sweep['commit'] or 'unknown'}"

    def file(self, name: str) -> str:
        """A file name that says what is fixed."""
        words = [name, *(f"{key.rpartition('.')[2]}-{value}" for key, value in self.fixed.items())]
        return "".join(c if c.isalnum() or c in "-." else "_" for c in "_".join(words)) + ".png"

    def _point(self, down: Any, across: Any) -> dict[str, Any]:
        chosen = {self.down: down, self.across: across} | self.fixed
        return {axis: chosen[axis] for axis in self.table.sweep["axes"]}


def pictures_of(table: Table) -> list[Picture]:
    """The first two axes against each other, once for every combination of the others' values."""
    axes = list(table.sweep["axes"])
    down, across = (axes[0], axes[1]) if len(axes) > 1 else (None, axes[0] if axes else None)
    others = [axis for axis in axes if axis not in (down, across)]
    found = []
    for values in itertools.product(*(table.values(axis) for axis in others)):
        fixed = dict(zip(others, values))
        rows = [row for row in table.rows if all(row.point[axis] == value for axis, value in fixed.items())]
        found.append(Picture(table, rows, down, across, fixed))
    return found


def draw_sweep(table: Table, folder: Path, lines_from: int, other: Table | None = None) -> list[Path]:
    """All pictures of a sweep as PNG files in `folder`: metric by metric, ratios to `other` behind each."""
    paths = []
    for metric, picture in itertools.product(table.metrics, pictures_of(table)):
        long_axis = _long_axis(picture, lines_from)
        figure = _lines(picture, metric, long_axis) if long_axis else _heatmap(picture, metric)
        paths.append(_save(figure, folder / picture.file(metric.column)))
        if other is not None:
            ratios = _ratio_heatmap(picture, metric, other)
            paths.append(_save(ratios, folder / picture.file(f"{metric.column}_ratio")))
    return paths


def _long_axis(picture: Picture, lines_from: int) -> str | None:
    """The axis with many numbers, the longer of two."""
    numeric = {
        axis: len(picture.values(axis))
        for axis in (picture.down, picture.across)
        if axis is not None and all(isinstance(value, int | float) for value in picture.values(axis))
    }
    longest = max(numeric, key=lambda axis: numeric[axis], default=None)
    return longest if longest is not None and numeric[longest] >= lines_from else None


def _heatmap(picture: Picture, metric: Metric) -> Figure:
    scaled = [[_scaled(row.sample(metric) if row else None, metric) for row in line] for line in picture.grid()]
    colours = GOOD_IS_HIGH if metric.better == "higher" else GOOD_IS_LOW
    middles = [[math.nan if sample is None else sample.median for sample in line] for line in scaled]
    texts = [["" if sample is None else _text(sample) for sample in line] for line in scaled]
    reasons = [[_reason(row) for row in line] for line in picture.grid()]
    figure, axes = _draw_grid(picture, middles, texts, reasons, colours, metric.label, limits=_limits(middles))
    bar = axes.collections[0].colorbar
    assert bar is not None
    _say_better(bar.ax, top=metric.better == "higher")
    _set_title(figure, picture.title(_heading(metric.title, scaled)))
    return figure


def _ratio_heatmap(picture: Picture, metric: Metric, other: Table) -> Figure:
    """This sweep's median over the other's; colours by the logarithm, so that half and double weigh the same."""
    ratios = [[_ratio(row, metric, other) for row in line] for line in picture.grid()]
    texts = [["" if math.isnan(ratio) else f"{ratio:.3g}×" for ratio in line] for line in ratios]
    reasons = [[_reason_beside(row, metric, other) for row in line] for line in picture.grid()]
    colours = RATIO_GOOD_IS_HIGH if metric.better == "higher" else RATIO_GOOD_IS_LOW
    doublings = [[math.log2(ratio) for ratio in line] for line in ratios]
    widest = max((abs(value) for line in doublings for value in line if not math.isnan(value)), default=0.0) or 1.0
    label = "log₂ of the ratio (0: equal)"
    figure, axes = _draw_grid(picture, doublings, texts, reasons, colours, label, limits=(-widest, widest))
    bar = axes.collections[0].colorbar
    assert bar is not None
    _say_better(bar.ax, top=metric.better == "higher")
    over = f"over {other.sweep['model']} on {other.sweep['device']}, commit {other.sweep['commit'] or 'unknown'}"
    _set_title(figure, f"{picture.title(f'{metric.title}, ratio')}\n{over}")
    return figure


def _draw_grid(
    picture: Picture,
    values: Sequence[Sequence[float]],
    texts: Sequence[Sequence[str]],
    reasons: Sequence[Sequence[str | None]],
    colours: str,
    label: str,
    limits: tuple[float, float],
) -> tuple[Figure, Axes]:
    import numpy as np
    import seaborn as sns

    plt = _pyplot()
    sns.set_theme(style="white", context="notebook")
    columns, lines = len(values[0]), len(values)
    size = (min(WIDEST_INCHES, max(8.0, 3.0 + 1.7 * columns)), min(14.0, max(3.6, 2.0 + 0.95 * lines)))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    sns.heatmap(
        np.asarray(values, dtype=float),
        annot=np.asarray(texts, dtype=object),
        fmt="",
        cmap=colours,
        vmin=limits[0],
        vmax=limits[1],
        linewidths=1.5,
        linecolor="white",
        cbar_kws={"label": label},
        annot_kws={"fontsize": 10 if columns <= MANY_COLUMNS else 7},
        xticklabels=[_tick(value) for value in picture.values(picture.across)],
        yticklabels=[_tick(value) for value in picture.values(picture.down)],
        ax=axes,
    )
    axes.set_xlabel(picture.label(picture.across), labelpad=8)
    axes.set_ylabel(picture.label(picture.down), labelpad=8)
    axes.tick_params(axis="y", rotation=0)
    axes.tick_params(axis="x", rotation=0)
    _hatch(axes, reasons)
    return figure, axes


def _hatch(axes: Axes, reasons: Sequence[Sequence[str | None]]) -> None:
    """Every cell without a figure, with the reason."""
    from matplotlib.patches import Rectangle

    fontsize = 9 if len(reasons[0]) <= MANY_COLUMNS else 6
    box = {"facecolor": "white", "edgecolor": "none", "pad": 2.0}
    for down, line in enumerate(reasons):
        for across, reason in enumerate(line):
            if reason is None:
                continue
            axes.add_patch(Rectangle((across, down), 1, 1, facecolor="0.93", edgecolor="0.6", hatch="///", linewidth=0))
            axes.text(across + 0.5, down + 0.5, reason, ha="center", va="center", fontsize=fontsize, bbox=box)


def _reason(row: Row | None) -> str | None:
    """Why a cell has no figures; None for one that has."""
    if row is None:
        return "not run"
    return str(row.failed["failure"]) if row.failed else None


def _reason_beside(row: Row | None, metric: Metric, other: Table) -> str | None:
    """Why a cell has no ratio, here or in the other sweep; None for one that has."""
    if row is None or row.failed or not math.isnan(_ratio(row, metric, other)):
        return _reason(row)
    return f"other sweep:\n{_reason(same_point(other.rows, row.point)) or 'no figure'}"


def _lines(picture: Picture, metric: Metric, along: str) -> Figure:
    import seaborn as sns

    plt = _pyplot()
    sns.set_theme(style="whitegrid", context="notebook")
    figure: Figure
    figure, axes = plt.subplots(figsize=(10.0, 5.6), layout="constrained")
    across = picture.down if along == picture.across else picture.across
    samples = []
    for colour, value in zip(itertools.cycle(sns.color_palette("colorblind")), picture.values(across)):
        rows = [row for row in picture.rows if across is None or row.point[across] == value]
        name = metric.title if across is None else f"{picture.label(across)} = {_tick(value)}"
        samples.append(_draw_line(axes, rows, metric, along, colour, name))
        _mark_failures(axes, rows, along, colour)
    axes.set_xlabel(picture.label(along))
    axes.set_ylabel(f"{metric.label}, {metric.better} is better")
    _set_title(figure, picture.title(_heading(metric.title, samples)))
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return figure


def _draw_line(axes: Axes, rows: Sequence[Row], metric: Metric, along: str, colour: Any, name: str) -> list[Sample]:
    """Medians with a band from the smallest to the largest; what was drawn."""
    known = [(row.point[along], _scaled(row.sample(metric), metric)) for row in rows]
    drawn = sorted((place, sample) for place, sample in known if sample is not None)
    places, samples = [place for place, _ in drawn], [sample for _, sample in drawn]
    axes.plot(places, [sample.median for sample in samples], marker="o", color=colour, label=name)
    low, high = [sample.low for sample in samples], [sample.high for sample in samples]
    axes.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
    return samples


def _mark_failures(axes: Axes, rows: Sequence[Row], along: str, colour: Any) -> None:
    """A dotted line where a cell failed; each reason once below the picture."""
    named = set()
    for row in rows:
        if row.failed is not None:
            reason = row.failed["failure"]
            label = None if reason in named else f"failed: {reason}"
            axes.axvline(row.point[along], color=colour, linestyle=":", linewidth=1.5, label=label)
            named.add(reason)


def _heading(title: str, samples: Sequence[Sequence[Sample | None]]) -> str:
    """The metric, and how often each cell was read."""
    counts = sorted({sample.n for line in samples for sample in line if sample is not None})
    return f"{title} (n = {'–'.join(map(str, counts))})" if counts else title


def _limits(values: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Where the colours begin and end: never closer than a share of the figures, or mere noise would fill the scale."""
    known = [value for line in values for value in line if not math.isnan(value)]
    low, high = min(known), max(known)
    slack = max(0.0, LEAST_RANGE * max(abs(low), abs(high)) - (high - low)) / 2
    return low - slack, high + slack


def _scaled(sample: Sample | None, metric: Metric) -> Sample | None:
    if sample is None:
        return None
    return Sample(sample.median * metric.scale, sample.low * metric.scale, sample.high * metric.scale, sample.n)


def _ratio(row: Row | None, metric: Metric, other: Table) -> float:
    beside = same_point(other.rows, row.point) if row is not None else None
    ours, theirs = row and row.sample(metric), beside and beside.sample(metric)
    return ours.median / theirs.median if ours and theirs and ours.median > 0 and theirs.median > 0 else math.nan


def _text(sample: Sample) -> str:
    """Median, with the smallest and largest below it when there are several readings."""
    spread = f"\n{number(sample.low)} – {number(sample.high)}" if sample.n > 1 else ""
    return number(sample.median) + spread


def _tick(value: Any) -> str:
    return (
        "" if value is None else f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    )


def _set_title(figure: Figure, title: str) -> None:
    """Over the whole picture, so that a long device name has room; broken where it has not."""
    width = int(figure.get_figwidth() * CHARACTERS_AN_INCH)
    figure.suptitle("\n".join(textwrap.fill(line, width) for line in title.splitlines()), fontsize=12)


def _say_better(axes: Axes, *, top: bool) -> None:
    """At the good end of the colour bar."""
    place: Mapping[str, Any] = {"y": 1.02, "va": "bottom"} if top else {"y": -0.02, "va": "top"}
    axes.text(0.5, s="better", ha="center", fontsize=9, transform=axes.transAxes, **place)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    _pyplot().close(figure)
    return path
