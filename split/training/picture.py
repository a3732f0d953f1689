"""The pictures of split training: the losses, and a step as it ran."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lab.drawing import count_in_whole_numbers, drawn
from split.training.schedule import Phase, Timeline, even_bubble
from split.training.trainer import StepFigures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {Phase.forward: "#4c72b0", Phase.backward: "#55a868"}
MOST_LABELLED = 24
"""With more operations in a row, their numbers are not drawn."""


def draw_losses(losses: Sequence[float], unsplit: Sequence[float], title: str, path: Path) -> Path:
    """Draw the training loss by step as a PNG at `path`, with the unsplit run's if there is one."""
    with drawn(path, size=(7 if unsplit else 11, 4.5), panels=2 if unsplit else 1, title=title) as panels:
        loss, width = panels[0], 3.5 if unsplit else 1.8
        loss.plot(losses, linewidth=width, color="#4c72b0", alpha=0.6 if unsplit else 1, label="split")
        if unsplit:
            loss.plot(unsplit, linewidth=1.2, color="black", linestyle="--", label="unsplit, in one process")
            apart = [abs(a - b) for a, b in zip(losses, unsplit)]
            panels[1].plot(apart, ".", color="#c44e52")
            panels[1].set(xlabel="optimizer step", ylabel="|difference| (nats per token)")
            panels[1].set_title(f"Difference: {max(apart):.2g} at most")
        loss.set(xlabel="optimizer step", ylabel="training loss (nats per token)", title="Loss before each step")
        loss.legend(frameon=False)
        for panel in panels:
            count_in_whole_numbers(panel)
    return path


def draw_timeline(figures: StepFigures, title: str, path: Path) -> Path:
    """Draw one step as a PNG at `path`: a row for each shard, a box for each operation, white while it waits."""
    timeline = figures.timeline
    assert timeline is not None
    count = max(span.operation.micro_batch for span in timeline.shards[0]) + 1
    even = even_bubble(len(timeline.shards), count)
    title = f"{title}: step {figures.step} as it ran, bubble {figures.bubble_fraction:.1%} (equal shards: {even:.1%})"
    with drawn(path, size=(11, 1.6 + 0.7 * len(timeline.shards)), title=title) as (axes,):
        _draw_timeline(axes, timeline)
    return path


def _draw_timeline(axes: Axes, timeline: Timeline) -> None:
    begin = min(shard[0].begin for shard in timeline.shards)
    for place, shard in enumerate(timeline.shards):
        for span in shard:
            left, width = 1000 * (span.begin - begin), 1000 * (span.end - span.begin)
            axes.barh(place, width, left=left, color=COLORS[span.operation.phase], edgecolor="white", linewidth=0.8)
            if len(shard) <= MOST_LABELLED:
                text = str(span.operation.micro_batch)
                axes.text(left + width / 2, place, text, ha="center", va="center", color="white", fontsize=9)
    for phase, color in COLORS.items():
        axes.barh(0, 0, color=color, label=f"{phase.name} of micro-batch")
    axes.set(
        yticks=range(len(timeline.shards)),
        yticklabels=[f"shard {place + 1}" for place in range(len(timeline.shards))],
        xlabel="milliseconds since the step's first operation",
    )
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.32), ncols=2, frameon=False)
