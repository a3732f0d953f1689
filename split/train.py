"""Fine-tuning of a model that is split over machines. `python -m split.train project.local_shards=2`."""

from typing import Any

from lab.command import entry
from split.training.settings import SplitTrainSettings


def run(settings: SplitTrainSettings, place: entry.Run) -> dict[str, Any]:
    """Train; return the figures of the last line."""
    from split.training.run import run_training

    return run_training(settings, place)


main = entry.command("split_train", SplitTrainSettings, run)

if __name__ == "__main__":
    main()
