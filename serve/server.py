"""A running server: socket, models, routes, and an end that finishes what runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil
import uvicorn

from lab.files import path_of
from lab.network import cannot_listen, shared_key
from lab.settings import UserError
from serve.app import State, all_counts, make_app
from serve.connection import connection_class
from serve.gate import Gate
from serve.journal import Journals
from serve.metrics import Metrics
from serve.models.adapters import Adapters, Turns, root_of
from serve.models.opening import open_first
from serve.models.served import Models
from serve.settings import ServeProjectSettings, ServeSettings

log = logging.getLogger(__name__)

BACKLOG = 128
LOOK_SECONDS = 0.05


@dataclass
class Served:
    """Figures of the server's last line."""

    models: list[str] = field(default_factory=list)
    about: Callable[[], dict[str, Any]] = dict

    def figures(self) -> dict[str, Any]:
        """The figures so far."""
        return {"role": "server", "models": self.models, **self.about()}


class _Uvicorn(uvicorn.Server):
    """Uvicorn without its own signal handlers: `lab.command.ending` has them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        """Nothing is captured."""
        yield


async def serve(
    settings: ServeSettings, tls: ssl.SSLContext | None, served: Served, announce: Callable[[str, int, Models], None]
) -> None:
    """Serve until cancelled; `announce(host, port, models)` is called when it listens.

    After a cancellation, requests that run are finished within `project.grace_seconds`.

    Raises:
        UserError: an address that cannot be listened on, a folder that cannot be written, a model that cannot run.
        Exception: what ended a model's engine.
    """
    project, network = settings.project, settings.network
    loop = asyncio.get_running_loop()
    journals = _journals(settings)
    if project.adapters is not None:
        root_of(settings)
    with _listen(settings) as listener:  # before the model is loaded: the port may be taken
        turns = Turns()
        broken: asyncio.Future[None] = loop.create_future()

        def broke(error: BaseException) -> None:
            loop.call_soon_threadsafe(lambda: None if broken.done() else broken.set_exception(error))

        models = Models(int(time.time()), broke=broke)
        state = _state(settings, models, journals)
        gate = Gate(
            make_app(state),
            key=shared_key(network),
            host=network.host,
            origins=project.cors_origins,
            most=project.max_connections,
        )
        server = _uvicorn(gate, project, tls)
        tasks = [asyncio.create_task(server.serve(sockets=[listener]))]
        try:
            opened = await asyncio.to_thread(open_first, settings, loop.call_soon_threadsafe, turns)
            models.add(opened.model)
            if opened.base is not None:
                state.adapters = Adapters(settings, opened.base, models, turns, loop.call_soon_threadsafe, state.uses)
                await state.adapters.look()
                tasks.append(asyncio.create_task(state.adapters.follow(project.follow_seconds)))
            served.models, served.about = list(models.by_id), lambda: _totals(models)
            gate.is_loading = False
            while not server.started and not tasks[0].done():
                await asyncio.sleep(LOOK_SECONDS / 10)
            announce(network.host, int(listener.getsockname()[1]), models)
            done, _ = await asyncio.wait([*tasks, broken], return_when=asyncio.FIRST_COMPLETED)
            for one in done:
                one.result()
        except asyncio.CancelledError:
            await _finish(state)
            raise
        finally:
            state.is_ending = True
            for generation in list(state.running.values()):
                generation.leave()
            server.should_exit = True
            for task in tasks[1:]:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait(tasks)
            for model in models.all():
                await asyncio.to_thread(model.writer.close)


def _uvicorn(app: Gate, project: ServeProjectSettings, tls: ssl.SSLContext | None) -> uvicorn.Server:
    config = uvicorn.Config(
        app,
        http=connection_class(project.request_seconds),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=project.connection_idle_seconds,  # type: ignore[arg-type]  # goes to `call_later` as it is
        timeout_graceful_shutdown=1,
        ws="none",
    )
    if tls is not None:
        config.load()
        config.ssl = tls
    return _Uvicorn(config)


def _listen(settings: ServeSettings) -> socket.socket:
    network = settings.network
    try:
        family = socket.getaddrinfo(network.host, network.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((network.host, network.port))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        raise cannot_listen(network, error) from None
    return listener


def _journals(settings: ServeSettings) -> Journals | None:
    project = settings.project
    folder = path_of(project.journal, "project.journal")
    try:
        return Journals.of(folder, project.keep_seconds, project.journal_bytes)
    except OSError as error:
        rule = "project.journal must be a folder that can be written"
        raise UserError(f"{rule}, got {str(folder)!r} ({error.strerror})") from None


def _state(settings: ServeSettings, models: Models, journals: Journals | None) -> State:
    began = time.monotonic()

    def about() -> dict[str, Any]:
        found = {}
        for name, model in models.by_id.items():
            counts = model.writer.counts()
            found[name] = {
                **asdict(counts),
                "fingerprint": model.fingerprint,
                "context": model.writer.context,
                "places": [asdict(place) for place in model.writer.places()],
            }
        return {
            "engine": settings.project.engine.name,
            "uptime_seconds": time.monotonic() - began,
            "rss_bytes": psutil.Process().memory_info().rss,
            "models": found,
        }

    metrics = Metrics(settings.project.metrics_prefix, lambda: all_counts(models))
    return State(settings.project, models, journals, metrics, about)


def _totals(models: Models) -> dict[str, Any]:
    """Counts of all models together."""
    every = [model.writer.counts() for model in models.by_id.values()]
    names = ("passes", "drafts_checked", "drafts_accepted", "prefix_asked", "prefix_found")
    return {name: sum(getattr(one, name) for one in every) for name in names}


async def _finish(state: State) -> None:
    """Refuse new requests, and wait for those that run."""
    state.is_ending = True
    deadline = time.monotonic() + state.project.grace_seconds
    if state.running:
        log.info("ending: %d requests may go on for %g s", len(state.running), state.project.grace_seconds)
    while state.running and time.monotonic() < deadline:
        await asyncio.sleep(LOOK_SECONDS)
