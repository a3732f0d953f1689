"""The picture of a split run: memory per node, and a token's time by hop."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.drawing import drawn
from split.inference.messages import Report
from split.inference.times import PassParts
from split.transport.base import ShardReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PARTS = ("compute", "serialise", "queue", "wire", "wait")
_LEGEND: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 5, "frameon": False}
"""Below its panel, over nothing."""


def draw(reports: Sequence[ShardReport[Report]], apart: Sequence[PassParts], path: Path, title: str) -> Path:
    """Two panels as a PNG at `path`."""
    with drawn(path, size=(6.5, 5), panels=2, title=f"{title} on {len(reports)} shards") as (memory, seconds):
        _draw_memory(memory, reports)
        _draw_seconds(seconds, reports, apart)
    return path


def _labels(reports: Sequence[ShardReport[Report]]) -> list[str]:
    return [f"layers {report.layers.start}:{report.layers.stop}\n{report.figures.device}" for report in reports]


def _draw_memory(axes: Axes, reports: Sequence[ShardReport[Report]]) -> None:
    weights = [report.figures.weights_bytes / 2**20 for report in reports]
    cache = [report.figures.kv_bytes / 2**20 for report in reports]
    labels = _labels(reports)
    axes.bar(labels, weights, label="weights")
    axes.bar(labels, cache, bottom=weights, label="KV cache")
    axes.scatter(
        labels, [report.figures.rss_bytes / 2**20 for report in reports], color="0.2", marker="_", s=900, label="RSS"
    )
    axes.set_ylabel("MiB")
    axes.set_title("memory per node")
    axes.legend(**_LEGEND)


def _draw_seconds(axes: Axes, reports: Sequence[ShardReport[Report]], apart: Sequence[PassParts]) -> None:
    if not apart:
        return
    labels = [*_labels(reports), "answer"]
    bottom = [0.0] * len(labels)
    for part in _PARTS:
        medians = [
            1000 * statistics.median(getattr(parts.hops[place], part) for parts in apart)
            for place in range(len(reports))
        ]
        back = 1000 * statistics.median(parts.answer_wire for parts in apart) if part == "wire" else 0.0
        heights = [*medians, back]
        axes.bar(labels, heights, bottom=bottom, label=part)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    axes.set_ylabel("ms of a token (median)")
    axes.set_title("a token's time by hop")
    axes.legend(**_LEGEND)
