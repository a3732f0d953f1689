"""One shard of a split model behind a port. `python -m split.serve project.layers=15:30`."""

from typing import Any

from lab.command import entry
from split.settings import SplitSettings


def run(settings: SplitSettings, place: entry.Run) -> dict[str, Any]:
    """Serve until Ctrl+C; return the figures of the last line."""
    from split.inference.open import host

    return host(settings)


main = entry.command("split_inf", SplitSettings, run)

if __name__ == "__main__":
    main()
