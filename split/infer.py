"""Text from a model that is split over machines. `python -m split.infer prompt="..." project.local_shards=2`."""

from __future__ import annotations

from typing import Any

from lab import entry
from lab.device import open_device
from lab.tracking import Tracker
from split.generating import generate
from split.opening import sharded_model
from split.settings import SplitSettings


def run(settings: SplitSettings, place: entry.Run) -> dict[str, Any]:
    """Generates one text; the figures of the last line."""
    device = open_device(settings.device)
    with (
        sharded_model(settings, device, place.folder) as engine,
        Tracker(settings, "split", place.folder) as tracker,
    ):
        figures = generate(settings, engine, tracker, place.folder)
        tracker.result(figures)
        return figures


def main() -> None:
    """Composes `conf/split_inf.yaml` and runs."""
    entry.main("split_inf", SplitSettings, run)


if __name__ == "__main__":
    main()
