"""A shard's process from its settings: loads the layers, serves until it is told to end."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import threading
from typing import Any

from lab.device import open_device
from lab.network import address_for_peers, client_side_tls, listener_tls
from lab.settings import UserError
from split.address import Address
from split.joining import fingerprints, make_side
from split.opening import load_stage, model_layers
from split.serving import ShardServer
from split.settings import SplitSettings, TransportKind, parse_layers
from split.stage import Stage

log = logging.getLogger(__name__)


def host(settings: SplitSettings) -> dict[str, Any]:
    """Serves until Ctrl+C; the figures of the last line. UserError for what cannot be served."""
    project, network = settings.project, settings.network
    if project.layers is None:
        raise UserError("project.layers must be set for a shard, as first:last, got null")
    if project.transport is TransportKind.rpc:
        return _serve_group(settings)
    tls = listener_tls(network)  # before a model is loaded for nothing
    layers = parse_layers(project.layers)
    stage = load_stage(settings, open_device(settings.device), layers)
    server = ShardServer(
        stage,
        name=f"{settings.model.name} {project.layers}",
        model_layers=model_layers(settings),
        endpoint=make_side(settings.model, network, project.boundary, "shard"),
        next_addresses=[Address.parse(project.next)] if project.next else [],
        client_tls=client_side_tls(network),
        awake_seconds=project.awake_seconds,
    )
    listen_for_the_end(project.follow_stdin)
    try:
        asyncio.run(_serve(server, settings, tls))
    except KeyboardInterrupt:
        log.info("stopped")
    return _result(project.layers, stage)


def _serve_group(settings: SplitSettings) -> dict[str, Any]:
    """A shard in a group of torch's RPC."""
    from split.transport.rpc import Place, Seat, check_master, serve_seat  # some systems lack it

    project = settings.project
    assert project.layers is not None
    check_master(settings.network)
    if not 1 <= project.rank < project.world_size:
        raise UserError(f"project.rank must be in [1, world_size={project.world_size}), got {project.rank}")
    stage = load_stage(settings, open_device(settings.device), parse_layers(project.layers))
    place = Place(
        name=f"{settings.model.name} {project.layers}",
        layers=stage.shard.layers,
        model_layers=model_layers(settings),
        context=stage.shard.limits.context,
        fingerprints=fingerprints(settings.model, project.boundary),
    )
    listen_for_the_end(project.follow_stdin)
    try:
        serve_seat(Seat(stage, place, project.awake_seconds), project.rank, project.world_size, settings.network)
    except KeyboardInterrupt:
        log.info("stopped")
    return _result(project.layers, stage)


def _result(layers: str, stage: Stage) -> dict[str, Any]:
    return {"role": "shard", "layers": layers, "weights_bytes": stage.shard.weights_bytes}


def listen_for_the_end(follow_stdin: bool) -> None:
    """End like Ctrl+C on SIGTERM, and with standard input where that is followed."""
    signal.signal(signal.SIGTERM, lambda *_: _interrupt())
    if follow_stdin:
        threading.Thread(target=_end_with_stdin, daemon=True).start()


async def _serve(server: ShardServer, settings: SplitSettings, tls: Any) -> None:
    network = settings.network

    def announce(port: int) -> None:
        ready = {"status": "listening", "role": "shard", "host": network.host, "port": port}
        print(json.dumps(ready | {"layers": settings.project.layers}), flush=True)
        address = f"{address_for_peers(network.host)}:{port}"
        print(f"this shard's address in the client's project.shards=[...]: {address}", file=sys.stderr, flush=True)

    try:
        await server.serve(
            host=network.host,
            port=network.port,
            max_connections=settings.project.max_connections,
            tls=tls,
            announce=announce,
        )
    except OSError as error:
        raise UserError(f"network.port must be free on {network.host}, got {network.port} ({error})") from None


def _interrupt() -> None:
    raise KeyboardInterrupt


def _end_with_stdin() -> None:
    """The process that started us holds the other end of the pipe: when it is gone, however, so are we."""
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)
