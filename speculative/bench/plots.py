"""The pictures of the benchmark: speed-up over delay, acceptance by position, busy times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.drawing import drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from speculative.bench.timeline import Timeline

Row = Mapping[str, Any]
COLOURS = {"target_only": "0.45", "sync": "#dd8452", "async": "#4c72b0", "assisted": "#55a868"}
NAMES = {"target_only": "target alone", "sync": "sync", "async": "async", "assisted": "transformers, co-located"}
PANEL_INCHES = (6.0, 4.6)
SHOWN_PLACES = 12
"""Positions of a run that are drawn: few draft tokens come later."""
SHOWN_SECONDS = 0.7
"""Share of a text that is drawn, from its second epoch on."""


def draw_speedups(path: Path, rows: Sequence[Row], title: str) -> Path:
    """Draw measured speed-up over the delay, and the predicted one if a row has it; acceptance by position."""
    by_place = [row for row in rows if row.get("alpha_by_position")]
    with drawn(path, PANEL_INCHES, 2 if by_place else 1) as axes:
        loops = dict.fromkeys((row["mode"], row["draft_length"]) for row in rows)
        for (mode, length), marker in zip(loops, "os^Dv"):
            own = [row for row in rows if (row["mode"], row["draft_length"]) == (mode, length)]
            _draw_loop(axes[0], own, mode, NAMES[mode] + (f", k = {length}" if length else ""), marker)
        axes[0].set(xlabel="round trip (ms)", ylabel="speed over the target alone", ylim=(0, None), title=title)
        axes[0].legend(fontsize="small")
        curves: dict[tuple[float, ...], list[str]] = {}
        for row in by_place:  # the same text at every delay has the same wrong draft tokens: one curve
            curves.setdefault(tuple(row["alpha_by_position"][:SHOWN_PLACES]), []).append(
                f"{row['rtt_seconds'] * 1000:g}"
            )
        for rates, delays in curves.items():
            axes[1].plot(range(1, len(rates) + 1), rates, marker="o", label=f"{', '.join(delays)} ms")
        if by_place:
            axes[1].set(
                xlabel="place of the draft token in its run", ylabel="right, when all before it were", ylim=(0, 1.02)
            )
            axes[1].set_title("acceptance by place")
            axes[1].legend(title="round trip", fontsize="small")
    return path


def draw_texts(path: Path, rows: Sequence[Row]) -> Path:
    """Draw speed-up over the delay, one panel for each text."""
    names = list(dict.fromkeys(row["text"] for row in rows))
    with drawn(path, PANEL_INCHES, len(names)) as axes:
        for panel, name in zip(axes, names):
            for mode in dict.fromkeys(row["mode"] for row in rows):
                own = [row for row in rows if row["text"] == name and row["mode"] == mode]
                _draw_loop(panel, own, mode, NAMES[mode])
            panel.set(xlabel="round trip (ms)", ylabel="speed over the target alone", ylim=(0, None), title=name)
            panel.legend(fontsize="small")
    return path


def draw_timelines(path: Path, timelines: Mapping[str, Timeline], rtt_seconds: float) -> Path:
    """Draw passes of the target above the drafter's steps; verdicts as lines that take half the round trip."""
    with drawn(path, (13, 2.6), len(timelines), columns=1) as axes:
        for panel, (name, timeline) in zip(axes, timelines.items()):
            begin = next((at for at, _, wrong in timeline.verdicts if wrong), 0.0) - rtt_seconds
            _draw_timeline(panel, timeline, rtt_seconds)
            panel.set(xlim=(max(0.0, begin), max(0.0, begin) + SHOWN_SECONDS), ylim=(-0.2, 2.4), title=name)
            panel.set_yticks([0.4, 1.8], ["drafter", "target"])
            panel.grid(visible=False, axis="y")
        axes[-1].set_xlabel(
            f"seconds; round trip {rtt_seconds * 1000:g} ms; numbers: tokens in a pass; dashed: a verdict that rejects"
        )
    return path


def _draw_loop(axes: Axes, rows: Sequence[Row], mode: str, label: str, marker: str = "o") -> None:
    if not rows:
        return
    colour = COLOURS[mode]
    if mode == "assisted":  # it has no link
        axes.axhline(rows[0]["speedup"]["median"], color=colour, linestyle=":", label=label)
        return
    delays = [row["rtt_seconds"] * 1000 for row in rows]
    speeds = [row["speedup"] for row in rows]
    middle = [speed["median"] for speed in speeds]
    spread = [[s["median"] - s["low"] for s in speeds], [s["high"] - s["median"] for s in speeds]]
    axes.errorbar(delays, middle, yerr=spread, color=colour, marker=marker, linestyle="", capsize=3, label=label)
    predicted = [row["predicted_speedup"] for row in rows]
    if all(value is not None for value in predicted):
        axes.plot(delays, predicted, color=colour, linestyle="--", linewidth=1)
    elif mode == "target_only":
        axes.axhline(1.0, color=colour, linewidth=1)
    else:
        axes.plot(delays, middle, color=colour, linewidth=1)


def _draw_timeline(axes: Axes, timeline: Timeline, rtt_seconds: float) -> None:
    for (begin, end), rows in zip(timeline.passes, timeline.rows):
        axes.broken_barh([(begin, end - begin)], (1.4, 0.8), facecolors=COLOURS["async"], edgecolor="white")
        axes.annotate(str(rows), ((begin + end) / 2, 1.8), ha="center", va="center", color="white", fontsize=8)
    steps = [(begin, end - begin) for begin, end in timeline.steps]
    axes.broken_barh(steps, (0.0, 0.8), facecolors=COLOURS["sync"], edgecolor="white", linewidth=0.3)
    for at, _, wrong in timeline.verdicts:
        style, colour = ("--", "crimson") if wrong else ("-", "0.5")
        axes.plot([at - rtt_seconds / 2, at], [1.4, 0.8], linewidth=1, linestyle=style, color=colour)
