"""The verifier: serves a target on a port, and checks draft tokens. `python -m speculative.verifier`."""

from __future__ import annotations

import logging
import shlex
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig

from lab.command import entry
from lab.command.ending import run_async
from lab.command.processes import say_listening
from lab.network import address_for_peers, listener_tls
from lab.settings import NetworkSettings
from lab.tracking import Tracker
from speculative.settings import SpeculativeSettings

if TYPE_CHECKING:
    from speculative.verifier.target import OpenTarget

log = logging.getLogger(__name__)


def run(settings: SpeculativeSettings, place: entry.Run) -> dict[str, Any]:
    """Serve until Ctrl+C; return the figures of the last line."""
    tls = listener_tls(settings.network)  # before loading a model
    from lab.device import open_device
    from lab.models.sources import load_tokenizer_only
    from speculative.verifier.server import ServerStats, serve
    from speculative.verifier.target import open_target

    target = open_target(settings, open_device(settings.device))
    tokenizer = load_tokenizer_only(settings.model)
    stats = ServerStats()

    def listening(host: str, port: int) -> None:
        announce(settings.network, target, port)

    def figures() -> dict[str, Any]:
        return {"role": "verifier", "target": target.model, "target_dtype": target.dtype, **stats.figures()}

    place.so_far = figures
    with Tracker(settings, "verifier", place.folder) as tracker:
        try:
            run_async(serve(settings, target, tokenizer, tls, tracker, stats, listening))
        except KeyboardInterrupt:
            log.info("stopped")
        result = figures()
        tracker.result(result)
    return result


def announce(network: NetworkSettings, target: OpenTarget, port: int) -> None:
    """Print one JSON line on stdout for programs; on stderr the command for the drafter's machine."""
    overrides = [
        f"network.host={address_for_peers(network.host)}",
        f"network.port={port}",
        *_overrides_for_both_roles(),
    ]
    if network.tls_certificate is not None:
        overrides.append("network.tls_authority=<the authority's certificate>")
    command = " ".join([*(shlex.quote(word) for word in overrides), 'prompt="..."'])
    hint = f"on the drafter's machine: python -m speculative.drafter {command}"
    say_listening(
        "verifier",
        network.host,
        port,
        hint,
        target=target.model,
        target_dtype=target.dtype,
        row_invariant=target.engine.row_invariant,
    )


def _overrides_for_both_roles() -> list[str]:
    """Words of this command line that the drafter needs, too: the model, and where the key is."""
    both = ("model=", "model.source=", "model.repo=", "model.path=", "model.seed=", "network.key_file=")
    return [word for word in HydraConfig.get().overrides.task if word.startswith(both)]


main = entry.command("spec_decoding", SpeculativeSettings, run)

if __name__ == "__main__":
    main()
