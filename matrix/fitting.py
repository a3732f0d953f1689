"""Texts that fit into a picture: shortened, smaller, turned, or left out."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

SMALLEST_POINTS = 6.0
"""Smallest legible size."""

MARGIN = 6.0
"""Pixels between a text and the edges of its cell, both sides together; also between two names at an axis."""


def shortened(text: str, longest: int) -> str:
    """The text on one line; if it is too long, without its middle, since both ends tell names apart."""
    text = "".join(sign if sign.isprintable() else " " for sign in text)
    text = " ".join(text.split())
    tail = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[: longest - 1 - tail]}…{text[-tail:]}"


def told_apart(texts: Sequence[str], longest: int) -> list[str]:
    """Shortened texts; if two become equal, without their common start; if they are still equal, numbered."""
    short = [shortened(text, longest) for text in texts]
    if len(set(short)) < len(texts):
        whole = [shortened(text, max(map(len, texts))) for text in texts]
        common = max(0, _same_start(whole) - longest // 2)
        ends = [f"…{text[common:]}" if common else text for text in whole]
        short = [text if len(text) <= longest else f"{text[: longest - 1]}…" for text in ends]
    found: list[str] = []
    for text in short:
        count = sum(text in (one, one.rpartition(" (")[0]) for one in found)
        found.append(f"{text} ({count + 1})" if count else text)
    return found


def _same_start(texts: Sequence[str]) -> int:
    """Number of characters that all texts begin with."""
    return sum(1 for _ in itertools.takewhile(lambda signs: len(set(signs)) == 1, zip(*texts)))


def lines_of(title: str, width: int) -> str:
    """A title, wrapped into lines of at most `width` characters."""
    return "\n".join(textwrap.fill(line, width) for line in title.splitlines())


def fit_cells(axes: Axes, texts: Sequence[Text], least: float = SMALLEST_POINTS) -> bool:
    """Shrink texts in cells of size 1, all to the same size, until they fit. If that would be below `least` points,
    leave them as they are and return False. Needs a picture that was laid out."""
    (left, low), (right, high) = axes.transData.transform([(0, 0), (1, 1)])
    width, height = abs(right - left) - MARGIN, abs(high - low) - MARGIN / 2
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    if not boxes:
        return True
    if min(width, height) <= 0:
        return False
    over = max(max(box.width / width, box.height / height) for box in boxes)
    size = math.floor(2 * min(text.get_fontsize() for text in texts) / max(1.0, over)) / 2
    for text in texts if size >= least else ():
        text.set_fontsize(size)
    return bool(size >= least)


def name_across(axes: Axes, names: Sequence[str], tallest: float) -> None:
    """Write names below the columns; upright if they are wider than these, with the picture made taller by as much."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    axes.set_xticks([place + 0.5 for place in range(len(names))], names, rotation=0)
    figure.draw_without_rendering()  # for the layout
    (left, _), (right, _) = axes.transData.transform([(0, 0), (1, 0)])
    widest = max(label.get_window_extent().width for label in axes.get_xticklabels())
    if widest + MARGIN > right - left:
        axes.tick_params(axis="x", rotation=90)
        figure.set_figheight(min(tallest, figure.get_figheight() + widest / figure.dpi))
        figure.draw_without_rendering()


def fit_ticks(axes: Axes, which: str) -> None:
    """Remove names that would overlap the one before. Needs a picture that was laid out."""
    along, axis = (0, axes.xaxis) if which == "x" else (1, axes.yaxis)
    end = -math.inf
    labels = [tick.label1 for tick in axis.get_major_ticks()]
    boxes = sorted(((label.get_window_extent(), label) for label in labels), key=lambda found: found[0].min[along])
    for box, label in boxes:
        if box.min[along] < end + MARGIN / 2:
            label.set_visible(False)
        else:
            end = box.max[along]
