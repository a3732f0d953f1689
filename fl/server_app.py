"""Flower's side of the server: a ServerApp around `fl.server.serve`, for a simulation or a deployment."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fl.client_app import settings_from_run
from fl.server import serve
from lab.entry import Run, finish, log_to_stderr


def make_server_app(work: Callable[[Grid, Context], None]) -> ServerApp:
    """A ServerApp whose main is `work`."""
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        work(grid, context)

    return server_app


def deployed(grid: Grid, context: Context) -> None:
    """A run started by `flwr run`: settings from its configuration, results below the SuperLink's working folder."""
    log_to_stderr()
    settings = settings_from_run(context)
    place = Run(Path("results/fed_learn").absolute() / time.strftime("%Y-%m-%d_%H-%M-%S"))
    place.folder.mkdir(parents=True, exist_ok=True)
    finish(serve(grid, settings, place), settings, place)


app = make_server_app(deployed)
