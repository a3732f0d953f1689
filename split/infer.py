"""Text from a model that is split over machines. `python -m split.infer prompt="..." project.local_shards=2`."""

from typing import Any

from lab.command import entry
from split.settings import SplitSettings


def run(settings: SplitSettings, place: entry.Run) -> dict[str, Any]:
    """Generate one text; return the figures of the last line."""
    from lab.device import open_device
    from lab.engine.kv import CacheFull
    from lab.settings import UserError
    from lab.tracking import Tracker
    from split.inference.generate import generate
    from split.inference.open import sharded_model

    device = open_device(settings.device)
    try:
        with (
            sharded_model(settings, device, place.folder) as engine,
            Tracker(settings, "split", place.folder) as tracker,
        ):
            figures = generate(settings, engine, tracker, place)
            tracker.result(figures)
            return figures
    except CacheFull as full:
        raise UserError(
            f"project.cache_limit_bytes and sessions of the shards must have room for this text: {full}"
        ) from None


main = entry.command("split_inf", SplitSettings, run)

if __name__ == "__main__":
    main()
