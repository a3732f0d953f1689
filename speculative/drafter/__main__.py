"""The drafter: drafts on this machine, lets the verifier check, prints the text. `python -m speculative.drafter`."""

from typing import Any

from lab.command import entry
from speculative.settings import SpeculativeSettings


def run(settings: SpeculativeSettings, place: entry.Run) -> dict[str, Any]:
    """Generate one text; return the figures of the last line."""
    from speculative.drafter.session import draft

    return draft(settings, place)


main = entry.command("spec_decoding", SpeculativeSettings, run)

if __name__ == "__main__":
    main()
