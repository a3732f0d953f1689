"""The drafter: guesses on this machine, has the verifier check, shows the text. `python -m speculative.drafter`."""

from __future__ import annotations

from typing import Any

from lab.command import entry
from speculative.settings import SpeculativeSettings


def run(settings: SpeculativeSettings, place: entry.Run) -> dict[str, Any]:
    """One text; the figures of the last line."""
    # Here, because torch reads some of what `entry.main` puts into the environment when it is loaded.
    from lab.network import is_users_to_mend
    from lab.settings import UserError
    from lab.wire import WireError
    from speculative.drafter.loop import RequestFailed, RequestRefused
    from speculative.drafter.session import draft

    try:
        return draft(settings, place)
    except RequestRefused as error:
        raise UserError(str(error)) from None
    except (WireError, RequestFailed) as error:
        if isinstance(error, WireError) and is_users_to_mend(error):
            raise UserError(str(error)) from None
        raise entry.Unfinished(str(error), 1, entry.EndedBy.lost) from None


def main() -> None:
    """Composes `conf/spec_decoding.yaml` and runs."""
    entry.main("spec_decoding", SpeculativeSettings, run)


if __name__ == "__main__":
    main()
