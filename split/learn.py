"""One shard of a model in training, behind a port. `python -m split.learn project.layers=15:30`."""

from typing import Any

from lab.command import entry
from split.training.settings import SplitTrainSettings


def run(settings: SplitTrainSettings, place: entry.Run) -> dict[str, Any]:
    """Serve until Ctrl+C; return the figures of the last line."""
    from split.training.open import host

    return host(settings, place.folder)


main = entry.command("split_train", SplitTrainSettings, run)

if __name__ == "__main__":
    main()
