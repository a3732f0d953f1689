"""The HTTP server: an OpenAI-compatible endpoint and a chat page. `python -m serve`, then http://127.0.0.1:8000."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from typing import TYPE_CHECKING, Any

from lab.command import entry
from lab.command.ending import allow_grace, run_async
from lab.files import path_of
from lab.network import address_for_peers, listener_tls
from serve.settings import ServeSettings

if TYPE_CHECKING:
    from serve.models.served import Models

log = logging.getLogger(__name__)


def run(settings: ServeSettings, place: entry.Run) -> dict[str, Any]:
    """Serve until Ctrl+C; return the figures of the last line."""
    tls = listener_tls(settings.network)  # before loading a model
    from serve.server import Served, serve

    allow_grace(settings.project.grace_seconds)
    served = Served()
    place.so_far = served.figures
    scheme = "http" if tls is None else "https"

    def listening(host: str, port: int, models: Models) -> None:
        announce(f"{scheme}://{_in_url(address_for_peers(host))}:{port}", models, settings)

    try:
        run_async(serve(settings, tls, served, listening))
    except KeyboardInterrupt:
        log.info("stopped")
    return served.figures()


def announce(address: str, models: Models, settings: ServeSettings) -> None:
    """Print one JSON line on stdout for programs; on stderr a command to try, and the page."""
    first = next(iter(models.by_id.values()))
    line = {
        "status": "listening",
        "role": "server",
        "base_url": f"{address}/v1",
        "host": settings.network.host,
        "port": int(address.rpartition(":")[2]),
        "models": list(models.by_id),
        "engine": settings.project.engine.name,
        "system_fingerprint": first.fingerprint,
    }
    print(json.dumps(line), flush=True)
    file = settings.network.key_file and str(path_of(settings.network.key_file, "network.key_file"))
    key = f'-H "Authorization: Bearer $(cat {shlex.quote(file)})" ' if file else ""  # no shell expands a quoted ~
    question = {"role": "user", "content": "Why is the sky blue?"}
    body = json.dumps({"model": first.id, "messages": [question], "max_tokens": 100})  # a few seconds on a laptop
    hint = f"try it: curl {address}/v1/chat/completions {key}-H 'Content-Type: application/json' -d {shlex.quote(body)}"
    print(f"{hint}\nchat page: {address}/", file=sys.stderr, flush=True)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


main = entry.command("serve", ServeSettings, run)

if __name__ == "__main__":
    main()
