"""Pictures as PNG files, drawn without a screen. matplotlib and seaborn are imported with the first picture."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 100
"""Pixels of an inch in every picture."""


@contextmanager
def drawing_style(style: str = "whitegrid") -> Iterator[None]:
    """Draw and save within the block in this style of seaborn; matplotlib's own settings are as before after it."""
    import matplotlib as mpl
    import seaborn as sns

    with mpl.rc_context(), warnings.catch_warnings():
        sns.set_theme(style=style, rc={"text.parse_math": False})  # a `$` in a model's name is a letter like any other
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box in the picture; results and tables have the text
        yield


@contextmanager
def drawn(
    path: Path, size: tuple[float, float], panels: int = 1, columns: int = 3, title: str = ""
) -> Iterator[list[Axes]]:
    """The panels of a picture, a list of matplotlib's axes, to draw into; the PNG is at `path` when the block ends.

    `size`: inches of one panel. `columns`: most panels in a line.
    """
    from matplotlib.figure import Figure

    with drawing_style():
        columns = min(panels, columns)
        lines = -(-panels // columns)
        figure = Figure(figsize=(size[0] * columns, size[1] * lines), layout="constrained")
        yield list(figure.subplots(lines, columns, squeeze=False).flat)[:panels]
        if title:  # an empty one would take room, too
            figure.suptitle(title)
        save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write `figure` as a PNG, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def count_in_whole_numbers(axes: Axes) -> None:
    """Put the numbers along the x axis at whole numbers only: rounds, steps."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
