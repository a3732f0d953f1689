"""Time per token of a model that is split over shards, at the end of full context windows.

`python -m split.decode project.local_shards=2 project.context=1024 project.sessions=4`
"""

from __future__ import annotations

from typing import Any

from lab.command import entry
from split.settings import SplitSettings


def run(settings: SplitSettings, place: entry.Run) -> dict[str, Any]:
    """Time `project.sessions` texts of `project.context` tokens; return the figures of the last line."""
    from lab.decode import time_tokens
    from lab.device import open_device, read_memory
    from lab.engine.kv import CacheFull
    from lab.models.sources import load_tokenizer_only
    from lab.settings import UserError
    from lab.text.asking import asked_sampling
    from lab.tracking import Tracker
    from split.inference.open import sharded_model

    project, device = settings.project, open_device(settings.device)
    with (
        Tracker(settings, "split-decode", place.folder) as tracker,
        sharded_model(settings, device, place.folder) as engine,
    ):
        try:
            tokenizer, prompt_tokens = load_tokenizer_only(settings.model), engine.context - project.max_new_tokens
            figures = time_tokens(
                engine,
                context=engine.context,
                sessions=project.sessions,
                new_tokens=project.max_new_tokens,
                sampling=asked_sampling(project, settings.seed, tokenizer, max(0, prompt_tokens)),
            )
        except CacheFull as full:
            raise UserError(f"project.cache_limit_bytes must have room for these texts: {full}") from None
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"project.max_new_tokens and project.context do not fit: {error}") from None
        memory = read_memory(device)
        figures |= {"client_peak_rss_bytes": memory.peak_rss_bytes, "peak_device_bytes": memory.device_peak_bytes}
        tracker.result(figures)
    return figures


def main() -> None:
    """Run with `conf/split_inf.yaml`."""
    entry.main("split_inf", SplitSettings, run)


if __name__ == "__main__":
    main()
