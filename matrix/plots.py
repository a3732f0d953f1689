"""Pictures of a sweep: a heatmap per metric, or lines for an axis with many numbers; ratios to another sweep.

Yellow is good, whether small or large figures are better. A cell without a figure is hatched, with the reason. If space
is short, texts are shortened or left out (200 figures, a name of 60 letters), but not in the report or results.csv.
"""

from __future__ import annotations

import itertools
import logging
import math
import textwrap
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.bench import Sample
from lab.drawing import drawing_style, save
from lab.figures import number
from matrix.fitting import fit_cells, fit_ticks, lines_of, name_across, shortened, told_apart
from matrix.grid import identity
from matrix.table import Metric, Row, Table, in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

log = logging.getLogger(__name__)

WIDEST_INCHES, TALLEST_INCHES = 12.0, 14.0
"""1200 pixels, 1400 pixels."""

CHARACTERS_AN_INCH = 11
"""Width of a title, and of the names at an axis."""

LONGEST_NAME, LONGEST_TITLE = 28, 100
"""Longest value at an axis, and longest part of a title, in characters."""

MOST_FIGURES = 400
"""With more cells, no figures are written into them."""

MOST_LINES = 10
"""At most this many lines can be told apart by colour and marker; more become a heatmap."""

LEAST_RANGE = 0.2
"""Smallest range of the colour scale, as a share of the largest figure."""

WIDE_RANGE, LONG_AXIS = 1000, 100
"""From this ratio of the largest to the smallest figure, a scale is logarithmic; the same for numbers at an axis."""

GOOD_IS_HIGH, GOOD_IS_LOW = "viridis", "viridis_r"
RATIO_GOOD_IS_HIGH, RATIO_GOOD_IS_LOW = "BrBG", "BrBG_r"
MARKERS = "osD^vP*X<>"
HATCHES = ("///", "\\\\\\", "xxx", "...", "+++", "ooo")
MARKS = "x+1234"
"""Markers and hatches by reason, for lines and heatmaps."""

NO_ROOM = "(no room for the figures: they are in results.csv and in the report's table)"


@dataclass(frozen=True)
class Drawing:
    """One picture, or the reason why it could not be drawn."""

    file: Path
    failure: str | None


@dataclass(frozen=True)
class Picture:
    """One pair of axes, with fixed values of all others."""

    table: Table
    down: str | None
    """Axis of a heatmap's rows, or of the lines."""
    across: str | None
    fixed: dict[str, Any]
    """Values of all other axes."""

    def grid(self) -> list[list[Row | None]]:
        """Cells by value, by row, then by column."""
        return [
            [self.table.cell(self._point(down, across)) for across in self.values(self.across)]
            for down in self.values(self.down)
        ]

    def along(self, axis: str) -> list[tuple[Any, list[Row | None]]]:
        """The cells along an axis, by value of the other axis."""
        lines = self.grid() if axis == self.across else [list(line) for line in zip(*self.grid(), strict=True)]
        return list(zip(self.values(self.down if axis == self.across else self.across), lines, strict=True))

    def values(self, axis: str | None) -> list[Any]:
        """Values of an axis; one empty text if there is no such axis."""
        return [""] if axis is None else self.table.values(axis)

    def label(self, axis: str | None) -> str:
        """Name and unit of an axis."""
        return "" if axis is None else self.table.label(axis)

    def title(self, metric: str) -> str:
        """Title of a picture: metric, fixed values, model, device, commit."""
        fixed = "".join(f", {self.label(key)} = {shortened(name(value), 60)}" for key, value in self.fixed.items())
        return f"{metric}{fixed}\n{_origin(self.table)}"

    def file(self, start: str) -> str:
        """A file name made of the fixed values, as far as they consist of letters and digits."""
        words = [start, *(f"{key.rpartition('.')[2]}-{in_words(value)}" for key, value in self.fixed.items())]
        return "".join(c if c.isalnum() or c in "-." else "_" for c in "_".join(words))

    def _point(self, down: Any, across: Any) -> dict[str, Any]:
        chosen = {self.down: down, self.across: across} | self.fixed
        return {axis: chosen[axis] for axis in self.table.sweep["axes"]}


def name(value: Any) -> str:
    """A value as written at an axis."""
    return f"{value:,.15g}" if _is_number(value) else in_words(value)


def pictures_of(table: Table) -> list[Picture]:
    """The first two axes against each other, once for every combination of the other axes' values that has cells."""
    axes = list(table.sweep["axes"])
    down, across = (axes[0], axes[1]) if len(axes) > 1 else (None, axes[0] if axes else None)
    others = [axis for axis in axes if axis not in (down, across)]
    combinations = ({axis: row.point[axis] for axis in others} for row in table.rows)
    return [Picture(table, down, across, fixed) for fixed in {identity(f): f for f in combinations}.values()]


def draw_sweep(table: Table, folder: Path, lines_from: int, other: Table | None = None) -> list[Drawing]:
    """Draw all pictures of a sweep as PNG files in `folder`: metric by metric, each followed by ratios to `other`."""
    drawn, taken = list[Drawing](), set[str]()

    def add(words: str, draw: Callable[[], Figure]) -> None:
        drawn.append(_draw(draw, folder / _new_name(words, taken)))

    for metric, picture in itertools.product(table.metrics, pictures_of(table)):
        add(picture.file(metric.column), partial(_picture, picture, metric, lines_from))
        if other is not None:
            add(picture.file(f"{metric.column}_ratio"), partial(_ratio_heatmap, picture, metric, other))
    return drawn


def _new_name(words: str, taken: set[str]) -> str:
    """A file name, not too long, that no other picture has, also on file systems that ignore case and accents."""
    whole = unicodedata.normalize("NFKC", words)[:60]
    names = itertools.chain([whole], (f"{whole}_{count}" for count in itertools.count(2)))
    new = next(one for one in names if one.casefold() not in taken)
    taken.add(new.casefold())
    return f"{new}.png"


def _draw(draw: Callable[[], Figure], path: Path) -> Drawing:
    """Draw one picture. A failure affects this picture only."""
    try:
        with drawing_style("white"):
            save(draw(), path)
    except Exception as error:
        failure = " ".join(f"{type(error).__name__}: {error}".split())
        log.warning("%s could not be drawn (%s)", path.name, failure)
        return Drawing(path, failure)
    return Drawing(path, None)


def _picture(picture: Picture, metric: Metric, lines_from: int) -> Figure:
    along = _long_axis(picture, lines_from)
    return _lines(picture, metric, along) if along else _heatmap(picture, metric)


def _long_axis(picture: Picture, lines_from: int) -> str | None:
    """The axis with many numbers, the longer one of two; None if the other axis would make too many lines."""
    counts = {axis: len(picture.values(axis)) for axis in (picture.down, picture.across)}
    numeric = [axis for axis in counts if axis is not None and all(map(_is_number, picture.values(axis)))]
    longest = max(numeric, key=lambda axis: counts[axis], default=None)
    if longest is None or counts[longest] < lines_from:
        return None
    return longest if math.prod(counts.values()) <= MOST_LINES * counts[longest] else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _heatmap(picture: Picture, metric: Metric) -> Figure:
    from matplotlib.colors import LogNorm, Normalize

    grid = picture.grid()
    scaled = [[_scaled(row.sample(metric) if row else None, metric) for row in line] for line in grid]
    middles = [[math.nan if sample is None else sample.median for sample in line] for line in scaled]
    texts = [["" if sample is None else _text(sample) for sample in line] for line in scaled]
    reasons = [[_reason(row, metric) for row in line] for line in grid]
    known = [value for line in middles for value in line if not math.isnan(value)]
    wide = known and min(known) > 0 and max(known) / min(known) >= WIDE_RANGE
    norm = LogNorm(min(known), max(known)) if wide else Normalize(*_limits(known))
    return _draw_grid(
        picture,
        _Grid(middles, texts, reasons),
        colours=GOOD_IS_HIGH if metric.better == "higher" else GOOD_IS_LOW,
        norm=norm,
        label=metric.label,
        title=picture.title(_heading(metric.title, itertools.chain(*scaled))),
        better_is_top=metric.better == "higher",
    )


def _ratio_heatmap(picture: Picture, metric: Metric, other: Table) -> Figure:
    """This sweep's median over the other's, coloured by logarithm, so that half and double look equally strong."""
    from matplotlib.colors import Normalize

    grid = picture.grid()
    ratios = [[_ratio(row, metric, other) for row in line] for line in grid]
    texts = [["" if math.isnan(ratio) else f"{ratio:.3g}×" for ratio in line] for line in ratios]
    reasons = [[_reason_beside(row, metric, other) for row in line] for line in grid]
    doublings = [[math.log2(ratio) for ratio in line] for line in ratios]
    widest = max((abs(value) for line in doublings for value in line if not math.isnan(value)), default=0.0) or 1.0
    return _draw_grid(
        picture,
        _Grid(doublings, texts, reasons),
        colours=RATIO_GOOD_IS_HIGH if metric.better == "higher" else RATIO_GOOD_IS_LOW,
        norm=Normalize(-widest, widest),
        label="log₂ of the ratio (0: equal)",
        title=f"{picture.title(f'{metric.title}, ratio')}\nover {_origin(other)}",
        better_is_top=metric.better == "higher",
    )


@dataclass(frozen=True)
class _Grid:
    """Values and texts in the cells of a heatmap, by row and column."""

    values: list[list[float]]
    texts: list[list[str]]
    reasons: list[list[str | None]]


def _draw_grid(
    picture: Picture, grid: _Grid, *, colours: str, norm: Any, label: str, title: str, better_is_top: bool
) -> Figure:
    import numpy as np
    import seaborn as sns
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    across = told_apart([name(value) for value in picture.values(picture.across)], LONGEST_NAME)
    down = told_apart([name(value) for value in picture.values(picture.down)], LONGEST_NAME)
    columns, lines = len(across), len(down)
    width = min(WIDEST_INCHES, max(8.0, 3.0 + 1.7 * columns + max(map(len, down)) / CHARACTERS_AN_INCH - 1.0))
    title = lines_of(title, int(width * CHARACTERS_AN_INCH))
    height = max(3.6, 2.0 + 0.95 * lines) + 0.22 * max(0, title.count("\n") - 1)
    figure = Figure(figsize=(width, min(TALLEST_INCHES, height)), layout="constrained")
    axes = figure.subplots()
    sns.heatmap(
        np.asarray(grid.values, dtype=float),
        annot=np.asarray(grid.texts, dtype=object) if columns * lines <= MOST_FIGURES else False,
        fmt="",
        cmap=colours,
        norm=norm,
        linewidths=1.5 if max(columns, lines) <= 2 * MOST_LINES else 0.0,
        linecolor="white",
        cbar_kws={"format": FuncFormatter(_at_an_axis)},
        vmin=norm.vmin,
        vmax=norm.vmax,
        annot_kws={"fontsize": 10},
        xticklabels=False,
        yticklabels=False,
        ax=axes,
    )
    bar = axes.collections[0].colorbar
    assert bar is not None
    bar.set_label(textwrap.fill(label, int(figure.get_figheight() * 8)))
    _say_better(bar.ax, top=better_is_top)
    if not any(itertools.chain(*grid.texts)):
        bar.set_ticks([])
    axes.set_xlabel(shortened(picture.label(picture.across), LONGEST_TITLE), labelpad=8)
    axes.set_ylabel(textwrap.fill(picture.label(picture.down), int(figure.get_figheight() * 8)), labelpad=8)
    figure.suptitle(title, fontsize=12)
    figures = list(axes.texts)
    hatched = _hatch(axes, grid.reasons)
    for text in axes.texts:
        text.set_in_layout(False)  # they stay in their cells; laying out 200 of them would take seconds
    axes.set_yticks([place + 0.5 for place in range(lines)], down, rotation=0)
    name_across(axes, across, TALLEST_INCHES)
    if not _fit_reasons(axes, hatched):
        _name_hatches(figure, hatched)
    if columns * lines > MOST_FIGURES or not _fit_figures(axes, figures):
        figure.suptitle(f"{title}\n{NO_ROOM}", fontsize=12)
    figure.draw_without_rendering()
    fit_ticks(axes, "y")
    fit_ticks(axes, "x")
    return figure


def _hatch(axes: Axes, reasons: Sequence[Sequence[str | None]]) -> dict[str, list[Text]]:
    """Hatch every cell without a figure and write the reason into it; returns these texts by reason."""
    from matplotlib.patches import Rectangle

    box = {"facecolor": "white", "edgecolor": "none", "pad": 2.0}
    found: dict[str, list[Text]] = {}
    places = [(down, across, why) for down, line in enumerate(reasons) for across, why in enumerate(line) if why]
    hatches = dict(zip(dict.fromkeys(why for _, _, why in places), itertools.cycle(HATCHES)))
    for down, across, why in places:
        hatch = hatches[why]
        axes.add_patch(Rectangle((across, down), 1, 1, facecolor="0.93", edgecolor="0.6", hatch=hatch, linewidth=0))
        text = axes.text(across + 0.5, down + 0.5, why, ha="center", va="center", fontsize=9, bbox=box)
        found.setdefault(why, []).append(text)
    return found


def _fit_reasons(axes: Axes, hatched: Mapping[str, Sequence[Text]]) -> bool:
    """Write reasons on one line if they fit, else one word per line. False if there is no space for them."""
    every = list(itertools.chain(*hatched.values()))
    if fit_cells(axes, every, least=9.0):
        return True
    for text in every:
        text.set_text(textwrap.fill(text.get_text(), 12))
    return fit_cells(axes, every)


def _fit_figures(axes: Axes, figures: Sequence[Text]) -> bool:
    """Write figures with their spread if they fit, else without. False, and no figures, if there is no space."""
    if fit_cells(axes, figures):
        return True
    for text in figures:
        text.set_text(text.get_text().partition("\n")[0])
    if fit_cells(axes, figures):
        return True
    for text in figures:
        text.set_visible(False)
    return False


def _name_hatches(figure: Figure, hatched: Mapping[str, Sequence[Text]]) -> None:
    """Explain hatches below the picture, if the cells have no space for the reasons."""
    from matplotlib.patches import Patch

    for text in itertools.chain(*hatched.values()):
        text.set_visible(False)
    patches = [
        Patch(facecolor="0.93", edgecolor="0.6", hatch=hatch, label=" ".join(reason.split()))
        for reason, hatch in zip(hatched, itertools.cycle(HATCHES))
    ]
    _legend(figure, patches)


def _legend(figure: Figure, handles: Sequence[Any]) -> None:
    """Draw a legend below the picture, with as many columns as fit."""
    if handles:
        longest = max(len(str(handle.get_label())) for handle in handles)
        room = int(figure.get_figwidth() * CHARACTERS_AN_INCH / (longest + 8))
        columns = max(1, min(3, room))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")


def _reason(row: Row | None, metric: Metric) -> str | None:
    """The reason why a cell has no figure; None if it has one."""
    return "not run" if row is None else row.lacks(metric)


def _reason_beside(row: Row | None, metric: Metric, other: Table) -> str | None:
    """The reason why a cell has no ratio, in this or the other sweep; None if it has one."""
    if (ours := _reason(row, metric)) or not math.isnan(_ratio(row, metric, other)):
        return ours
    assert row is not None
    return f"other sweep:\n{_reason(other.cell(row.point), metric) or 'no ratio to 0'}"


def _lines(picture: Picture, metric: Metric, along: str) -> Figure:
    import seaborn as sns
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    across = picture.down if along == picture.across else picture.across
    lines = picture.along(along)
    names = told_apart([name(value) for value, _ in lines], LONGEST_NAME + 12)
    figure = Figure(figsize=(10.0, 5.6 + 0.25 * max(0, len(lines) - 6) / 2), layout="constrained")
    axes = figure.subplots()
    axes.grid(visible=True, color="0.9")
    samples, handles = list[Sample](), []
    for (_, rows), title, colour, marker in zip(lines, names, sns.color_palette("colorblind"), MARKERS):
        known = [
            (value, _scaled(row.sample(metric) if row else None, metric))
            for value, row in zip(picture.values(along), rows)
        ]
        label = metric.title if across is None else f"{shortened(picture.label(across), 40)} = {title}"
        handles.append(_draw_line(axes, known, colour, marker, label))
        samples += [sample for _, sample in known if sample is not None]
    _scale(axes.set_yscale, [sample.low for sample in samples] + [sample.high for sample in samples], WIDE_RANGE)
    handles += _mark_failures(
        axes, [[_reason(row, metric) for row in rows] for _, rows in lines], picture.values(along)
    )
    axes.set_xlabel(shortened(picture.label(along), LONGEST_TITLE))
    axes.set_ylabel(textwrap.fill(f"{metric.label}, {metric.better} is better", 44))
    axes.yaxis.set_major_formatter(FuncFormatter(_at_an_axis))
    for spine in axes.spines.values():
        spine.set_color("0.8")
    title = picture.title(_heading(metric.title, samples))
    figure.suptitle(lines_of(title, int(figure.get_figwidth() * CHARACTERS_AN_INCH)), fontsize=12)
    if not samples:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no cell has a figure", ha="center", va="center", transform=axes.transAxes)
    _legend(figure, handles)
    _number_axis(figure, axes, picture.values(along))
    return figure


def _draw_line(axes: Axes, known: Sequence[tuple[Any, Sample | None]], colour: Any, marker: str, label: str) -> Any:
    """Draw medians, with a band from the smallest to the largest reading."""
    drawn = sorted((place, sample) for place, sample in known if sample is not None)
    places, samples = [place for place, _ in drawn], [sample for _, sample in drawn]
    (line,) = axes.plot(places, [sample.median for sample in samples], marker=marker, color=colour, label=label)
    low, high = [sample.low for sample in samples], [sample.high for sample in samples]
    axes.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
    return line


def _mark_failures(axes: Axes, reasons: Sequence[Sequence[str | None]], places: Sequence[Any]) -> list[Any]:
    """Mark points without a figure at the foot of the picture, one row per line in its colour; returns legend entries
    for the marks."""
    from matplotlib.lines import Line2D

    failing = [(line, [(at, why) for at, why in zip(places, row) if why]) for line, row in zip(axes.lines[:], reasons)]
    failing = [(line, missing) for line, missing in failing if missing]
    found = dict.fromkeys(why for _, missing in failing for _, why in missing)
    marks = dict(zip(found, itertools.cycle(MARKS)))
    foot = 0.045 * (len(failing) + 0.5) if failing else 0.0
    low, high = axes.transScale.transform([(1, end) for end in axes.get_ylim()])[:, 1]
    bottom = axes.transScale.inverted().transform((1, low - foot * (high - low)))[1]
    axes.set_ylim(bottom=bottom)
    for place, (line, missing) in enumerate(failing):
        height = 0.045 * (place + 0.5) / (1 + foot)
        for at, why in missing:
            mark = {"marker": marks[why], "color": line.get_color(), "markersize": 7, "markeredgewidth": 2}
            axes.plot([at], [height], transform=axes.get_xaxis_transform(), **mark)
    return [
        Line2D([], [], linestyle="none", marker=mark, color="0.3", markeredgewidth=2, label=f"no figure: {why}")
        for why, mark in marks.items()
    ]


def _number_axis(figure: Figure, axes: Axes, values: Sequence[Any]) -> None:
    """Space an axis of powers of two, or of numbers over several decades, evenly, with a tick for each number."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    doubling = min(values) > 0 and len(values) > 2 and all(math.log2(value).is_integer() for value in values)
    if doubling or _scale(axes.set_xscale, values, LONG_AXIS):
        if doubling:
            axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(values), [name(value) for value in sorted(values)])
        axes.xaxis.set_minor_locator(NullLocator())
        figure.draw_without_rendering()
        fit_ticks(axes, "x")
        return
    axes.xaxis.set_major_locator(MaxNLocator(integer=all(isinstance(value, int) for value in values)))
    axes.xaxis.set_major_formatter(FuncFormatter(_at_an_axis))


def _at_an_axis(value: float, _: Any = None) -> str:
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e8 else f"{value:,.4g}"


def _scale(set_scale: Callable[[str], None], values: Sequence[float], span: float) -> bool:
    """Make a scale logarithmic where the largest value is at least `span` times the smallest. Returns whether it is."""
    wide = bool(values) and min(values) > 0 and max(values) / min(values) >= span
    if wide:
        set_scale("log")
    return wide


def _heading(title: str, samples: Iterator[Sample | None] | Sequence[Sample]) -> str:
    """The metric, and the number of runs of each cell."""
    counts = sorted({sample.n for sample in samples if sample is not None})
    return f"{title} (n = {'–'.join(map(str, counts))})" if counts else title


def _limits(known: Sequence[float]) -> tuple[float, float]:
    """Limits of the colour scale: at least a share of the largest figure apart, or mere noise would fill the scale."""
    low, high = min(known, default=0.0), max(known, default=1.0)
    slack = max(0.0, LEAST_RANGE * max(abs(low), abs(high)) - (high - low)) / 2
    return (low - slack, high + slack) if slack or low < high else (low - 1, high + 1)


def _scaled(sample: Sample | None, metric: Metric) -> Sample | None:
    if sample is None:
        return None
    return Sample(sample.median * metric.scale, sample.low * metric.scale, sample.high * metric.scale, sample.n)


def _ratio(row: Row | None, metric: Metric, other: Table) -> float:
    beside = other.cell(row.point) if row is not None else None
    ours, theirs = row and row.sample(metric), beside and beside.sample(metric)
    return ours.median / theirs.median if ours and theirs and ours.median > 0 and theirs.median > 0 else math.nan


def _text(sample: Sample) -> str:
    """Median, with the smallest and largest below it if there are several readings."""
    spread = f"\n{number(sample.low)} – {number(sample.high)}" if sample.n > 1 else ""
    return number(sample.median) + spread


def _origin(table: Table) -> str:
    sweep = table.sweep
    return f"{shortened(sweep['model'], LONGEST_TITLE)} on {sweep['device']}, commit {sweep['commit'] or 'unknown'}"


def _say_better(axes: Axes, *, top: bool) -> None:
    """Write `better` at the good end of the colour bar."""
    place: Mapping[str, Any] = {"y": 1.02, "va": "bottom"} if top else {"y": -0.02, "va": "top"}
    axes.text(0.5, s="better", ha="center", fontsize=9, transform=axes.transAxes, **place)
