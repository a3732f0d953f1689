"""A slow, narrow or failing link as a command: `python simulations/link.py project.up.delay_seconds=0.05`."""

from __future__ import annotations

import json
import math
import socket
import sys
from typing import Any

from lab.command import entry
from lab.link import Cut, LinkSettings, OneWay
from lab.link import run as be_a_link
from lab.network import address_for_peers, cannot_listen
from lab.settings import UserError
from simulations.link_settings import LinkProjectSettings, LinkRunSettings, OneWaySettings


def run(settings: LinkRunSettings, place: entry.Run) -> dict[str, Any]:
    """Carry bytes until Ctrl+C, then report their number."""
    project, network = settings.project, settings.network

    def announce(host: str, port: int) -> None:
        print(json.dumps({"status": "listening", "role": "link", "host": host, "port": port}), flush=True)
        words = f"network.host={address_for_peers(host)} network.port={port}"
        print(f"connect to it instead of the target: {words}", file=sys.stderr, flush=True)

    try:
        socket.getaddrinfo(project.target_host, project.target_port)
    except (OSError, ValueError) as error:
        raise UserError(
            f"project.target_host must be a name that resolves, got {project.target_host!r} ({error})"
        ) from None
    try:
        traffic = be_a_link(
            (project.target_host, project.target_port),
            link_settings(project, settings.seed),
            host=network.host,
            port=network.port,
            announce=announce,
        )
    except OSError as error:
        raise cannot_listen(network, error) from None
    return {"role": "link", **vars(traffic)}


def link_settings(project: LinkProjectSettings, seed: int) -> LinkSettings:
    """These settings as `lab.link` takes them."""
    return LinkSettings(
        up=_one_way(project.up),
        down=_one_way(project.down),
        buffer_bytes=project.buffer_bytes,
        seed=seed,
        cuts=tuple(Cut(**vars(cut)) for cut in project.cuts),
    )


def _one_way(settings: OneWaySettings) -> OneWay:
    return OneWay(
        delay_seconds=settings.delay_seconds,
        jitter_seconds=settings.jitter_seconds,
        bytes_per_second=settings.bytes_per_second or math.inf,
    )


def main() -> None:
    """Run with `conf/link.yaml`."""
    entry.main("link", LinkRunSettings, run)


if __name__ == "__main__":
    main()
