"""Flower's side of the server: a ServerApp around `fl.server.serve`, for a simulation or a deployment."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fl.client_app import log_beside_flower, settings_from_run
from fl.server import serve
from lab.command.entry import Run, finish
from lab.faults import Fault
from lab.settings import UserError

log = logging.getLogger(__name__)


def make_server_app(work: Callable[[Grid, Context], None]) -> ServerApp:
    """A ServerApp whose main is `work`."""
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        work(grid, context)

    return server_app


def deployed(grid: Grid, context: Context) -> None:
    """A run started by `flwr run`: settings from its configuration, results below the SuperLink's working folder.

    Raises what went wrong: an exit code would be lost, and Flower would take the run for one that is still going on.
    """
    log_beside_flower()
    try:
        settings = settings_from_run(context)
        name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{context.run_id}"
        place = Run(Path("results/fed_learn").absolute() / name)
        # Flower carries the code itself and leaves the checkout behind: its hash says which code ran.
        finish(serve(grid, settings, place) | {"fab_hash": grid.run.fab_hash}, settings, place)
    except (UserError, Fault) as error:
        log.error("the run failed: %s", error)  # before Flower prints a traceback of it
        raise


app = make_server_app(deployed)
