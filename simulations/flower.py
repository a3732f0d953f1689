"""The one seam around Flower's simulation, which is deprecated upstream: swap it here when it goes.

Every client is a message to one of `project.workers` long-lived Ray workers; each worker holds one base model. A worker
that dies is replaced, and its message tried again: a client keeps nothing between messages, so its answer is the same.
"""

import io
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

import psutil
import torch
from flwr.app import Context
from flwr.serverapp import Grid

from fl.client import read_all
from fl.client_app import make_client_app
from fl.partition import client_documents
from fl.rounds import NodesMissing, RoundFailed
from fl.server import first_adapter, serve
from fl.server_app import make_server_app, unfinished
from fl.settings import FederatedSettings
from lab.command import entry
from lab.command.ending import told
from lab.command.ray_signals import ray_leaves_signals_alone
from lab.device import check_dtype, open_device
from lab.files import require_writable
from lab.learning.data import open_source
from lab.models.sources import load_tokenizer_only, quantization_config
from lab.settings import DataSource
from simulations import worker_log

log = logging.getLogger(__name__)


def simulate(settings: FederatedSettings, place: entry.Run) -> dict[str, Any]:
    """Runs the federation here and returns the figures of the last line.

    Raises what the server raises, Fault when the clients cannot go on, and what a signal raises when every worker
    has ended.
    """
    require_writable(place.folder, "hydra.run.dir")
    check(settings)
    warnings = place.folder / worker_log.FILE
    # A long-lived worker that loads and trains in turn otherwise keeps much of what it freed (glibc's arenas). A low
    # MALLOC_TRIM_THRESHOLD_ would give back more, and double a step of SmolLM2 in 4 bits: every tensor is fresh pages.
    os.environ.setdefault("MALLOC_ARENA_MAX", "2")
    from flwr.simulation import run_simulation

    figures: dict[str, Any] = {}
    stop = threading.Event()

    def work(grid: Grid, context: Context) -> None:
        figures.update(serve(grid, settings, place, stop.is_set))
        place.so_far = lambda: figures

    def in_worker(context: Context) -> FederatedSettings:
        worker_log.send_warnings(warnings)
        return settings

    ray_output = UntilEnding(lambda: stop.is_set() or bool(figures))
    with quiet_flower(), redirect_stdout(ray_output), interruptible(stop), worker_log.warnings_from(warnings):
        try:
            run_simulation(
                make_server_app(work),
                make_client_app(in_worker),
                num_supernodes=settings.project.num_clients,
                backend_config=backend(settings),
            )
        except (RoundFailed, NodesMissing) as error:
            raise unfinished(error, place.folder) from None
    return figures


def check(settings: FederatedSettings) -> None:
    """UserError now for what clients or server would run into later: data, model, adapter, device."""
    project = settings.project
    if project.data.source is DataSource.python_stdlib:  # it has no malformed line, and takes seconds to read
        client_documents(open_source(project.data), 0, project.num_clients, project.partition_by, settings.seed)
    else:
        read_all(settings, load_tokenizer_only(settings.model))
    device = open_device(settings.device)
    quantization_config(settings.model, device, check_dtype(device, settings.model.dtype))
    first_adapter(settings)


def backend(settings: FederatedSettings) -> dict[str, Any]:
    """Ray's resources: one core a worker, and an equal share of the GPUs where there are any.

    `client_resources` reach Ray as the options of its actors. Without the last two Flower would go on giving messages
    to a worker that is no more, and each would fail.
    """
    clients = settings.project.num_clients
    workers = min(settings.project.workers or os.cpu_count() or 1, clients)
    gpus = torch.cuda.device_count() if open_device(settings.device).type == "cuda" else 0
    log.info("simulating %d clients on %d Ray workers (1 core, %.2f GPU each)", clients, workers, gpus / workers)
    return {
        "init_args": {
            "address": "local",  # also where a cluster runs already, which takes no `num_cpus` from us
            "num_cpus": workers,
            "num_gpus": gpus,
            "logging_level": "ERROR",
            "log_to_driver": False,
        },
        "client_resources": {
            "num_cpus": 1,
            "num_gpus": gpus / workers,
            "max_restarts": -1,  # as often as it takes
            "max_task_retries": settings.project.worker_retries,
        },
    }


WORKERS = ("ray::ClientAppActor", "ray::IDLE")
"""How Ray names its processes that serve clients, or are about to."""
WORKERS_SECONDS = 0.5
"""Pause between two looks for them."""


@contextmanager
def interruptible(stop: threading.Event) -> Iterator[None]:
    """On a signal: stops the server and ends the workers, whatever they are computing. The signal is raised at the end
    of the block, in the place of what workers that are killed end in.

    Ray itself goes afterwards, by Flower's hand: a `ray.get` that waits while Ray is shut down waits for ever, and so
    would Flower's threads, which is why the signal is not raised into them.
    """
    done = threading.Event()
    threading.Thread(target=end_workers, args=[stop, done], daemon=True).start()
    try:
        with told(stop.set), ray_leaves_signals_alone():
            yield
    finally:
        done.set()


def end_workers(stop: threading.Event, done: threading.Event) -> None:
    """From `stop` on kills Ray's workers below this process until `done`: one may still be starting."""
    while not stop.wait(WORKERS_SECONDS):
        if done.is_set():
            return
    replace_no_worker()
    while not done.is_set():
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):  # it is gone already
                if " ".join(process.cmdline()).startswith(WORKERS):  # a process that is ending has none
                    process.kill()
        done.wait(WORKERS_SECONDS)


def replace_no_worker() -> None:
    """Kills Ray's actors for good: one whose process alone dies comes back, and its message waits for that."""
    import ray
    from ray._private import state, worker  # the public ways need a handle, which Flower keeps, or a dashboard

    if ray.is_initialized():
        ours = worker.global_worker
        for actor in state.actors(job_id=ours.current_job_id):
            ours.core_worker.kill_actor(ray.ActorID.from_hex(actor), True)  # True: no restart


class UntilEnding(io.TextIOBase):
    """A stdout for Ray, which prints there when a worker ends: to stderr, and no more once it is we who end them."""

    def __init__(self, ending: Callable[[], bool]) -> None:
        self._ending = ending

    def write(self, text: str) -> int:
        """Hands `text` on to stderr."""
        return len(text) if self._ending() else sys.stderr.write(text)


@contextmanager
def quiet_flower() -> Iterator[None]:
    """Flower logs every step, its deprecation, and pages for a client that fails; the strategy says that in a line."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
