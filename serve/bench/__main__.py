"""Speed of the HTTP server, beside its own engine and beside other servers: `python -m serve.bench`.

overhead     seconds of a token through HTTP, less those of the same engine driven by its scheduler alone: one stream,
             the model of the settings and `model=random`, without draft tokens; all seconds of a request, shared by
             its tokens
second_turn  time to the first token of a chat's second turn, over that of a server without a prefix cache
schema       JSON documents under schemas, a slow link between server and verifier: how many are valid, and tokens a
             second, prompts included, over the same without speculation
load         tokens a second, and the 95th percentile of the time to the first token, of concurrent streams, beside
             llama.cpp's server (`pip install '.[peers]'`) with the same GGUF file and `transformers serve` with the
             same weights unpacked. `serve_plain` is this server without its own draft tokens

On Linux the process that holds the model has one core, and what sends the requests has the other; readings are
interleaved. Requests are greedy streams. A peer that cannot run here is left out, and the row says why.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab.bench import Row, run_parts
from lab.command import entry
from lab.settings import UserError
from serve.bench.chats import second_turn
from serve.bench.documents import schema
from serve.bench.load import load
from serve.bench.overhead import overhead
from serve.bench.peers import PEERS
from serve.bench.rig import Rig
from serve.bench.settings import ServeBenchSettings

PARTS: dict[str, Callable[[Rig], Row | list[Row]]] = {
    part.__name__: part for part in (overhead, second_turn, schema, load)
}


def run(settings: ServeBenchSettings, place: entry.Run) -> dict[str, Any]:
    """Measure the chosen parts; return the figures of the last line."""
    project = settings.project
    if unknown := sorted(set(project.peers) - PEERS.keys()):
        raise UserError(f"project.peers must be of {', '.join(PEERS)}, got {unknown}")
    report = Path(project.report or place.folder / "bench.json")
    rig = Rig(settings, place.folder)
    return run_parts("serve", PARTS, project.parts, rig, settings=settings, place=place, report=report)


main = entry.command("serve_bench", ServeBenchSettings, run)

if __name__ == "__main__":
    main()
