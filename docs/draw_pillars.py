"""Draws docs/images/pillars.png, the picture of the README: `python docs/draw_pillars.py`.

Four pillars side by side, each with its machines and with what travels between them, over the packages of `lab`.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

INK, GREY = "#1f2933", "#66727f"
PILLARS = ("#2f6fb0", "#2a8a5e", "#b0632f", "#8a3f8f")
PACKAGES = ("command", "models", "engine", "text", "learning", "wire")


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str, fill: str) -> None:
    """A machine or a package: a box with its centre at (x, y), and text in it."""
    style = "round,pad=0,rounding_size=0.12"
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, edgecolor=colour, facecolor=fill, lw=1.4))
    axes.text(x, y, text, ha="center", va="center", fontsize=9, color=INK, linespacing=1.35)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    """An arrow from `start` to `end`."""
    axes.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.5, "shrinkA": 2, "shrinkB": 2}
    )


def label(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    """The name of what travels along an arrow."""
    axes.text(x, y, text, ha="center", va="center", fontsize=8.5, color=colour, style="italic")


def pillar(axes: Axes, x: float, title: str, folder: str, colour: str) -> None:
    """The frame of a pillar, centred at x, with its title and folder."""
    axes.add_patch(FancyBboxPatch((x - 1.95, 2.0), 3.9, 5.3, boxstyle="round,pad=0,rounding_size=0.15",
                                  edgecolor="#d5dbe1", facecolor="#fbfcfd", lw=1.2))  # fmt: skip
    axes.text(x, 6.85, title, ha="center", va="center", fontsize=11.5, color=colour, weight="bold")
    axes.text(x, 6.42, folder, ha="center", va="center", fontsize=9, color=GREY, family="monospace")


def draw(path: Path) -> None:
    """Write the picture to `path`."""
    figure, axes = plt.subplots(figsize=(13, 5.6))
    axes.set(xlim=(0, 16.6), ylim=(0, 7.5))
    axes.axis("off")
    blue, green, orange, purple = PILLARS

    pillar(axes, 2.2, "federated fine-tuning", "fl/", blue)
    box(axes, 2.2, 5.55, 3.3, 0.8, "server\nexact mean of the adapters", blue, "#e8f0f8")
    for x, name in ((0.95, "site 1"), (2.2, "site 2"), (3.45, "site 3")):
        box(axes, x, 3.0, 1.05, 1.1, f"{name}\nits text\nmodel", blue, "white")
        arrow(axes, (x - 0.12, 3.58), (2.05 + (x - 2.2) * 0.55, 5.13), blue)
        arrow(axes, (2.35 + (x - 2.2) * 0.55, 5.13), (x + 0.12, 3.58), blue)
    label(axes, 2.2, 2.22, "LoRA adapters travel, text stays", blue)

    pillar(axes, 6.25, "speculative decoding", "speculative/", green)
    box(axes, 6.25, 5.55, 3.3, 0.8, "verifier: large model\nchecks many tokens at once", green, "#e7f4ee")
    box(axes, 6.25, 3.0, 2.9, 1.1, "drafter: your machine\ndrafts ahead,\nshows the text", green, "white")
    arrow(axes, (5.7, 3.58), (5.7, 5.13), green)
    arrow(axes, (6.8, 5.13), (6.8, 3.58), green)
    label(axes, 5.02, 4.35, "draft\ntokens", green)
    label(axes, 7.5, 4.35, "verdicts", green)
    label(axes, 6.25, 2.22, "same text as the large model alone", green)

    pillar(axes, 10.3, "split inference", "split/inference/", orange)
    box(axes, 9.27, 5.55, 1.6, 0.8, "shard 1\nlayers 0:15", orange, "#f9eee6")
    box(axes, 11.33, 5.55, 1.6, 0.8, "shard 2\nlayers 15:30", orange, "#f9eee6")
    box(axes, 10.3, 3.0, 2.9, 1.1, "client: no weights\nholds the token ids,\nrebuilds a lost shard", orange, "white")
    arrow(axes, (9.3, 3.58), (9.3, 5.13), orange)
    arrow(axes, (10.05, 5.55), (10.55, 5.55), orange)
    arrow(axes, (11.3, 5.13), (11.3, 3.58), orange)
    label(axes, 8.92, 4.35, "ids", orange)
    label(axes, 10.3, 4.85, "hidden states", orange)
    label(axes, 11.78, 4.35, "token", orange)
    label(axes, 10.3, 2.22, "a model too large for one machine", orange)

    pillar(axes, 14.35, "split training", "split/training/", purple)
    box(axes, 13.3, 5.55, 1.65, 0.8, "shard 1\ntrains 0:15", purple, "#f5eaf6")
    box(axes, 15.4, 5.55, 1.65, 0.8, "shard 2\ntrains 15:30", purple, "#f5eaf6")
    box(axes, 14.35, 3.0, 2.9, 1.1, "trainer: no weights\nholds data, schedule,\ncheckpoint manifests", purple, "white")
    arrow(axes, (14.1, 5.68), (14.6, 5.68), purple)
    arrow(axes, (14.6, 5.4), (14.1, 5.4), purple)
    arrow(axes, (13.35, 3.58), (13.35, 5.13), purple)
    arrow(axes, (15.25, 3.58), (15.25, 5.13), purple)
    arrow(axes, (15.55, 5.13), (15.55, 3.58), purple)
    label(axes, 12.97, 4.35, "ids", purple)
    label(axes, 14.25, 4.8, "hidden states,\ngradients", purple)
    label(axes, 14.86, 4.0, "labels", purple)
    label(axes, 15.86, 4.35, "loss", purple)
    label(axes, 14.35, 2.22, "same steps as the unsplit model", purple)

    axes.text(0.27, 1.52, "lab/   shared by all four", fontsize=10, color=INK, weight="bold", va="center")
    width = 16.0 / len(PACKAGES)
    for at, package in enumerate(PACKAGES):
        box(axes, 0.3 + width * (at + 0.5), 0.95, width - 0.15, 0.55, package, GREY, "#eef1f4")
    axes.text(0.27, 0.3, "matrix/   runs any of them over a grid of settings, in a new process for each cell",
              fontsize=10, color=INK, weight="bold", va="center")  # fmt: skip
    figure.savefig(path, dpi=110, bbox_inches="tight", pad_inches=0.08, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).parent / "images" / "pillars.png")
