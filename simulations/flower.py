"""The only module that uses Flower's simulation, which Flower has deprecated: replace it here once it is removed.

Messages for all clients are handled by `project.workers` long-lived Ray workers, each with one base model. A worker
that dies is replaced, and its message tried again: a client keeps no state between messages, so its reply is the same.
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
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fl.client import read_all
from fl.client_app import make_client_app
from fl.partition import client_documents
from fl.rounds import NodesMissing, RoundFailed
from fl.server import serve, starting_point
from fl.server_app import make_server_app, unfinished
from fl.settings import FederatedSettings
from lab.command import entry
from lab.command.ending import calling_on_signal
from lab.command.ray_signals import ray_leaves_signals_alone
from lab.device import check_dtype, open_device
from lab.files import require_writable
from lab.learning.data import open_source
from lab.models.sources import load_tokenizer_only, quantization_config
from lab.settings import DataSource
from simulations import worker_log

log = logging.getLogger(__name__)


def simulate(settings: FederatedSettings, place: entry.Run) -> dict[str, Any]:
    """Simulate the federation on this machine and return the figures of the last line.

    Raises what the server raises, Fault when no client can continue, and the exception of a signal once every worker
    has ended.
    """
    require_writable(place.folder, "hydra.run.dir")
    check(settings)
    warnings = place.folder / worker_log.FILE
    figures: dict[str, Any] = {}
    stop = threading.Event()

    def work(grid: Grid, context: Context) -> None:
        figures.update(serve(grid, settings, place, stop.is_set))
        place.so_far = lambda: figures

    def in_worker(context: Context) -> FederatedSettings:
        worker_log.send_warnings(warnings)
        return settings

    ray_output = WorkerOutput(lambda: stop.is_set() or bool(figures))
    with quiet_flower(), redirect_stdout(ray_output), interruptible(stop), worker_log.warnings_from(warnings):
        try:
            run_apps(make_server_app(work), make_client_app(in_worker), settings)
        except (RoundFailed, NodesMissing) as error:
            raise unfinished(error, place.folder) from None
    return figures


def run_apps(server_app: ServerApp, client_app: ClientApp, settings: FederatedSettings) -> None:
    """Run both apps, the client's once for each site, until the server's ends."""
    # Otherwise a long-lived worker that loads and trains in turn keeps much of the memory it freed (glibc's arenas). A
    # low MALLOC_TRIM_THRESHOLD_ would return more, but double a step of SmolLM2 in 4 bits: all tensors need new pages.
    os.environ.setdefault("MALLOC_ARENA_MAX", "2")
    # Ray gives its workers a low priority (nice 15), next to which any other program of a busy machine takes 30 times
    # as much of a core, while the time to live of their messages goes on: clients would be left out for that alone.
    os.environ.setdefault("RAY_worker_niceness", "0")
    from flwr.simulation import run_simulation

    run_simulation(
        server_app, client_app, num_supernodes=settings.project.num_clients, backend_config=backend(settings)
    )


def check(settings: FederatedSettings) -> None:
    """UserError now for faults that clients or server would find later: data, model, adapter, device."""
    project = settings.project
    if project.data.source is DataSource.python_stdlib:  # always well formed, and takes seconds to read
        client_documents(open_source(project.data), 0, project.num_clients, project.partition_rule, settings.seed)
    else:
        read_all(settings, load_tokenizer_only(settings.model))
    device = open_device(settings.device)
    quantization_config(settings.model, device, check_dtype(device, settings.model.dtype))
    starting_point(settings)


def backend(settings: FederatedSettings) -> dict[str, Any]:
    """Ray's resources: one core for each worker, and an equal share of the GPUs, if there are any.

    `client_resources` are options of Ray's actors. Without the last two, Flower would send further messages to a worker
    that is gone, and each would fail.
    """
    clients = settings.project.num_clients
    workers = min(settings.project.workers or os.cpu_count() or 1, clients)
    gpus = torch.cuda.device_count() if open_device(settings.device).type == "cuda" else 0
    log.info("simulating %d clients on %d Ray workers (1 core, %.2f GPU each)", clients, workers, gpus / workers)
    return {
        "init_args": {
            "address": "local",  # even if a cluster is running: it would not accept our `num_cpus`
            "num_cpus": workers,
            "num_gpus": gpus,
            "logging_level": "ERROR",
            "log_to_driver": False,
            "include_dashboard": False,
        },
        "client_resources": {
            "num_cpus": 1,
            "num_gpus": gpus / workers,
            "max_restarts": -1,  # without limit
            "max_task_retries": settings.project.worker_retries,
        },
    }


WORKERS = ("ray::ClientAppActor", "ray::IDLE")
"""Ray's names for processes that serve clients, or will."""
WORKERS_SECONDS = 0.5
"""Pause between two searches for them."""


@contextmanager
def interruptible(stop: threading.Event) -> Iterator[None]:
    """On a signal, stop the server and end the workers, even in the middle of a computation. The signal's exception is
    raised at the end of the block, in place of the errors of the killed workers.

    Flower shuts Ray down afterwards. While Ray is shut down, a waiting `ray.get` would wait for ever, and so would
    Flower's threads: that is why the signal is not raised in them.
    """
    done = threading.Event()
    threading.Thread(target=end_workers, args=[stop, done], daemon=True).start()
    try:
        with calling_on_signal(stop.set), ray_leaves_signals_alone():
            yield
    finally:
        done.set()


def end_workers(stop: threading.Event, done: threading.Event) -> None:
    """From `stop` until `done`, kill Ray's workers below this process, including those that are just starting."""
    while not stop.wait(WORKERS_SECONDS):
        if done.is_set():
            return
    replace_no_worker()
    while not done.is_set():
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):  # already gone
                if " ".join(process.cmdline()).startswith(WORKERS):  # empty for a process that is ending
                    process.kill()
        done.wait(WORKERS_SECONDS)


def replace_no_worker() -> None:
    """Kill Ray's actors for good: an actor whose process alone dies is restarted, and its message waits for it."""
    import ray
    from ray._private import state, worker  # the public API needs a handle, which only Flower has, or a dashboard

    if ray.is_initialized():
        ours = worker.global_worker
        for actor in state.actors(job_id=ours.current_job_id):
            ours.core_worker.kill_actor(ray.ActorID.from_hex(actor), True)  # True: no restart


class WorkerOutput(io.TextIOBase):
    """A stdout for Ray, which reports ended workers there: passes text on to stderr, until we end the workers."""

    def __init__(self, ending: Callable[[], bool]) -> None:
        self._ending = ending

    def write(self, text: str) -> int:
        """Pass `text` on to stderr."""
        return len(text) if self._ending() else sys.stderr.write(text)


@contextmanager
def quiet_flower() -> Iterator[None]:
    """Silence Flower, which logs every step, its deprecation, and pages for a failing client."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
