"""Time per token of a model that is split over shards, at the end of full context windows.

`python -m split.decode project.local_shards=2 project.context=1024 project.sessions=4`
"""

from typing import Any

from lab.command import entry
from split.settings import SplitSettings


def run(settings: SplitSettings, place: entry.Run) -> dict[str, Any]:
    """Time `project.sessions` texts of `project.context` tokens; return the figures of the last line."""
    from lab.decode import room_for_texts, time_tokens
    from lab.device import open_device, read_memory
    from lab.models.sources import load_tokenizer_only
    from lab.settings import user_errors
    from lab.text.generation import sampling_of
    from lab.tracking import Tracker
    from split.inference.open import sharded_model

    project, device = settings.project, open_device(settings.device)
    with (
        Tracker(settings, "split-decode", place.folder) as tracker,
        sharded_model(settings, device, place.folder) as engine,
    ):
        with user_errors("project.max_new_tokens and project.context do not fit: "), room_for_texts():
            tokenizer, prompt_tokens = load_tokenizer_only(settings.model), engine.context - project.max_new_tokens
            figures = time_tokens(
                engine,
                context=engine.context,
                sessions=project.sessions,
                new_tokens=project.max_new_tokens,
                sampling=sampling_of(project, settings.seed, tokenizer, max(0, prompt_tokens)),
            )
        memory = read_memory(device)
        figures |= {"client_peak_rss_bytes": memory.peak_rss_bytes, "peak_device_bytes": memory.device_peak_bytes}
        tracker.result(figures)
    return figures


main = entry.command("split_inf", SplitSettings, run)

if __name__ == "__main__":
    main()
