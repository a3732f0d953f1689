"""The picture of a federated run: held-out loss per round and client, bytes on the wire, time by phase."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fl.report import RoundFigures
from lab.drawing import count_in_whole_numbers, drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_LABELLED_CLIENTS = 12
"""More lines than this are drawn in grey without a legend."""


def draw_run(states: Sequence[RoundFigures], title: str, base_bytes: int, path: Path) -> Path:
    """Draw three panels as a PNG at `path`; `base_bytes` is the size of the base model, which was not sent."""
    with drawn(path, size=(5.3, 5), panels=3, title=title) as (loss, sizes, seconds):
        _draw_loss(loss, states)
        _draw_bytes(sizes, states, base_bytes)
        _draw_seconds(seconds, states)
    return path


def _draw_loss(axes: Axes, states: Sequence[RoundFigures]) -> None:
    clients = sorted({client for state in states for client in state.client_losses})
    crowd = len(clients) > MAX_LABELLED_CLIENTS
    for client in clients:
        known = [(state.round, state.client_losses[client]) for state in states if client in state.client_losses]
        style = {"color": "0.75", "linewidth": 0.7} if crowd else {"linewidth": 1.2, "alpha": 0.8}
        axes.plot(*zip(*known), marker="" if crowd else ".", label=None if crowd else f"client {client}", **style)
    everyone = [(state.round, state.eval_loss) for state in states if state.eval_loss is not None]
    axes.plot(
        [at for at, _ in everyone],
        [mean for _, mean in everyone],
        color="black",
        linewidth=2.5,
        marker="o",
        label="weighted mean",
    )
    axes.set(
        xlabel="round (0: before training)", ylabel="held-out loss (nats per token)", title="Loss: lower is better"
    )
    count_in_whole_numbers(axes)
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)


def _draw_bytes(axes: Axes, states: Sequence[RoundFigures], base_bytes: int) -> None:
    up = sum(state.uplink_bytes for state in states) / 1e6
    down = sum(state.downlink_bytes for state in states) / 1e6
    names, values = ["up, all rounds", "down, all rounds", "base model\n(stays)"], [up, down, base_bytes / 1e6]
    bars = axes.barh(names, values, color=["#4c72b0", "#55a868", "0.75"])
    axes.bar_label(bars, labels=[f" {value:,.1f} MB" for value in values])
    axes.invert_yaxis()
    axes.margins(x=0.35)
    axes.set(xlabel="megabytes (1 MB = 10⁶ bytes)", title="What travelled")


def _draw_seconds(axes: Axes, states: Sequence[RoundFigures]) -> None:
    rounds = [state.round for state in states[1:]]
    slowest = [max(state.train_seconds.values(), default=0.0) for state in states[1:]]
    aggregate = [state.aggregate_seconds for state in states[1:]]
    rest = [max(0.0, state.round_seconds - a - b) for state, a, b in zip(states[1:], slowest, aggregate, strict=True)]
    below = [0.0] * len(rounds)
    parts = {"training (slowest client)": slowest, "evaluating, loading, waiting": rest, "aggregating": aggregate}
    for name, values in parts.items():
        axes.bar(rounds, values, bottom=below, label=name, width=0.6)
        below = [a + b for a, b in zip(below, values, strict=True)]
    axes.set(xlabel="round", ylabel="seconds", title="Where the time went")
    count_in_whole_numbers(axes)
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
