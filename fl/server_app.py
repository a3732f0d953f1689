"""The Flower app of the server: a ServerApp around `fl.server.serve`, for a simulation or a deployment."""

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
from fl.run.folders import claim
from fl.server import serve
from lab.command.entry import Run, finish
from lab.faults import EndedBy, Fault, Lost
from lab.settings import UserError

log = logging.getLogger(__name__)

MAX_REASONS = 3
"""Most reasons that the message of a failed run quotes; all are in the log."""


def make_server_app(work: Callable[[Grid, Context], None]) -> ServerApp:
    """A ServerApp whose main is `work`."""
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        work(grid, context)

    return server_app


def deployed(grid: Grid, context: Context) -> None:
    """A run started by `flwr run`: settings from its configuration, results below the SuperLink's working folder.

    Raises the error that ended the run: an exit code would be lost, and Flower would list the run as still running.
    A run that has begun still leaves its last line and result.json.
    """
    log_beside_flower()
    try:
        settings = settings_from_run(context)
        name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{context.run_id}"
        place = Run(Path(str(context.run_config.get("folder") or f"results/fed_learn/{name}")).absolute())
        try:
            claim(place.folder, str(context.run_id))
        except FileExistsError:
            raise UserError(f"folder must be of no other run, got {str(place.folder)!r}") from None
        # Flower sends the code itself, not the checkout: the hash of that code says what ran.
        code = {"fab_hash": grid.run.fab_hash}
        try:
            figures = serve(grid, settings, place)
        except (UserError, Fault) as error:
            end = unfinished(error, place.folder) if isinstance(error, RoundFailed | NodesMissing) else error
            ended_by = end.ended_by if isinstance(end, Fault) else EndedBy.refused
            about = {"status": "failed", "error": str(end), "ended_by": ended_by}
            if not (place.folder / "result.json").exists():  # of another run, which refuses this one
                finish(place.so_far() | about | code, settings, place)
            raise
        finish(figures | code, settings, place)
    except (UserError, Fault) as error:
        log.error("the run failed: %s", error)  # before Flower prints a traceback of it
        raise


def unfinished(error: RoundFailed | NodesMissing, folder: Path) -> Fault:
    """The message of a run that ended early: each reason once, and the folder of the last adapter."""
    left = f"the last good adapter is {latest_adapter(folder / 'adapters')}; continue with project.resume={folder}"
    if isinstance(error, NodesMissing):
        return Lost(f"{error}; {left}")
    reasons = Counter(refusal.reason for refusal in error.refused).most_common()
    counted = [f"{count} of {len(error.refused)} clients {reason}" for reason, count in reasons[:MAX_REASONS]]
    more = [f"{len(reasons) - MAX_REASONS} more reasons"] if len(reasons) > MAX_REASONS else []
    return Fault(f"round {error.server_round} ended {error.ended}: {'; '.join(counted + more)}; {left}")


app = make_server_app(deployed)
