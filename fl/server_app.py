"""Flower's side of the server: a ServerApp around `fl.server.serve`, for a simulation or a deployment."""

import logging
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fl.checkpoint import latest_adapter
from fl.client_app import log_beside_flower, settings_from_run
from fl.rounds import NodesMissing, RoundFailed
from fl.server import serve
from lab.command.entry import Run, finish
from lab.faults import Fault, Lost
from lab.settings import UserError

log = logging.getLogger(__name__)

MAX_REASONS = 3
"""Different reasons that a failed run's last words quote; every one is in the log."""


def make_server_app(work: Callable[[Grid, Context], None]) -> ServerApp:
    """A ServerApp whose main is `work`."""
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        work(grid, context)

    return server_app


def deployed(grid: Grid, context: Context) -> None:
    """A run started by `flwr run`: settings from its configuration, results below the SuperLink's working folder.

    Raises the error that ended the run: an exit code would be lost, and Flower would take the run for one that is
    still going on. A run that has begun leaves its last line and result.json all the same.
    """
    log_beside_flower()
    try:
        settings = settings_from_run(context)
        name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{context.run_id}"
        place = Run(Path("results/fed_learn").absolute() / name)
        # Flower carries the code itself and leaves the checkout behind: its hash says which code ran.
        code = {"fab_hash": grid.run.fab_hash}
        try:
            figures = serve(grid, settings, place)
        except (RoundFailed, NodesMissing) as error:
            end = unfinished(error, place.folder)
            about = {"status": "failed", "error": str(end), "ended_by": end.ended_by}
            finish(place.so_far() | about | code, settings, place)
            raise
        finish(figures | code, settings, place)
    except (UserError, Fault) as error:
        log.error("the run failed: %s", error)  # before Flower prints a traceback of it
        raise


def unfinished(error: RoundFailed | NodesMissing, folder: Path) -> Fault:
    """The end of a run in one line: each reason once, and the adapter that is left in its folder."""
    left = f"the last good adapter is {latest_adapter(folder / 'adapters')}"
    if isinstance(error, NodesMissing):
        return Lost(f"{error}; {left}")
    reasons = Counter(refusal.reason for refusal in error.refused).most_common()
    told = [f"{count} of {len(error.refused)} clients {reason}" for reason, count in reasons[:MAX_REASONS]]
    more = [f"{len(reasons) - MAX_REASONS} more reasons"] if len(reasons) > MAX_REASONS else []
    return Fault(f"round {error.server_round} had no good reply: {'; '.join(told + more)}; {left}")


app = make_server_app(deployed)
