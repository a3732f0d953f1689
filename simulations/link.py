"""A slow, narrow or failing link as a command: `python simulations/link.py project.up.delay_seconds=0.05`."""

import socket
from contextlib import suppress
from typing import Any

from lab.command import entry
from lab.command.processes import say_listening
from lab.link import Link, LinkSettings
from lab.network import address_for_peers, cannot_listen
from lab.settings import UserError
from simulations.link_settings import LinkProjectSettings, LinkRunSettings


def run(settings: LinkRunSettings, place: entry.Run) -> dict[str, Any]:
    """Carry bytes until Ctrl+C, then report their number."""
    project, network = settings.project, settings.network
    target = project.target_host, project.target_port
    try:
        socket.getaddrinfo(*target)
    except (OSError, ValueError) as error:
        raise UserError(
            f"project.target_host must be a name that resolves, got {project.target_host!r} ({error})"
        ) from None
    try:
        with Link(target, link_settings(project, settings.seed), host=network.host, port=network.port) as link:
            words = f"network.host={address_for_peers(network.host)} network.port={link.port}"
            say_listening("link", network.host, link.port, f"connect to it instead of the target: {words}")
            with suppress(KeyboardInterrupt):
                link.wait()
            return {"role": "link", **vars(link.traffic)}
    except OSError as error:
        raise cannot_listen(network, error) from None


def link_settings(project: LinkProjectSettings, seed: int) -> LinkSettings:
    """These settings as `lab.link` takes them."""
    return LinkSettings(
        up=project.up, down=project.down, buffer_bytes=project.buffer_bytes, seed=seed, cuts=tuple(project.cuts)
    )


main = entry.command("link", LinkRunSettings, run)

if __name__ == "__main__":
    main()
