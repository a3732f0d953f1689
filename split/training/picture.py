"""The pictures of split training: the losses, and a step as it really ran."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from split.training.schedule import Phase, even_bubble
from split.training.trainer import StepFigures

COLORS = {Phase.forward: "#4c72b0", Phase.backward: "#55a868"}
MOST_LABELLED = 24
"""Operations of a shard beyond which numbers would not be read."""


def draw_losses(losses: Sequence[float], unsplit: Sequence[float], title: str, path: Path) -> Path:
    """Training loss by step as a PNG at `path`, beside the unsplit run's where there is one."""
    figure, panels = _figure(2 if unsplit else 1)
    panels[0].plot(
        losses, linewidth=3.5 if unsplit else 1.8, color="#4c72b0", alpha=0.6 if unsplit else 1, label="split"
    )
    if unsplit:
        panels[0].plot(unsplit, linewidth=1.2, color="black", linestyle="--", label="unsplit, in one process")
        panels[1].plot([abs(a - b) for a, b in zip(losses, unsplit)], ".", color="#c44e52")
        largest = max(abs(a - b) for a, b in zip(losses, unsplit))
        panels[1].set(
            xlabel="optimizer step", ylabel="|difference| (nats per token)", title=f"Difference: {largest:.2g} at most"
        )
    panels[0].set(xlabel="optimizer step", ylabel="training loss (nats per token)", title="Loss before each step")
    panels[0].legend(frameon=False)
    for panel in panels:
        panel.xaxis.set_major_locator(_whole_numbers())
    return _save(figure, title, path)


def draw_timeline(figures: StepFigures, title: str, path: Path) -> Path:
    """One step as a PNG at `path`: a row a shard, a box an operation, white where it waits."""
    timeline = figures.timeline
    assert timeline is not None
    figure, panels = _figure(1, height=1.6 + 0.7 * len(timeline.shards))
    axes = panels[0]
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
    count = max(span.operation.micro_batch for span in timeline.shards[0]) + 1
    even = even_bubble(len(timeline.shards), count)
    title = f"{title}: step {figures.step} as it ran, bubble {figures.bubble_fraction:.1%} (equal shards: {even:.1%})"
    return _save(figure, title, path)


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)


def _figure(panels: int, height: float = 4.5) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="notebook")
    figure, axes = plt.subplots(1, panels, figsize=(7 * panels if panels > 1 else 11, height), layout="constrained")
    return figure, list(axes) if panels > 1 else [axes]


def _save(figure: Any, title: str, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path
