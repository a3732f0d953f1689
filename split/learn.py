"""One shard of a model that learns, behind a port. `python -m split.learn project.layers=15:30`."""

from __future__ import annotations

from typing import Any

from lab.command import entry
from split.training.settings import SplitTrainSettings


def run(settings: SplitTrainSettings, place: entry.Run) -> dict[str, Any]:
    """Serves until Ctrl+C; the figures of the last line."""
    from split.training.open import host  # loads torch, which reads what `entry.main` puts into the environment

    return host(settings, place.folder)


def main() -> None:
    """Composes `conf/split_train.yaml` and serves."""
    entry.main("split_train", SplitTrainSettings, run)


if __name__ == "__main__":
    main()
