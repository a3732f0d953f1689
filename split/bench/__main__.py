"""What splitting costs and gains, on this machine: `python -m split.bench`; sizes in conf/split_bench.yaml.

Shard processes, links and this one, with the whole model, have a core and a thread each (a core is shared where there
are fewer; of two neighbours in a chain only one computes). Readings are interleaved, and compared turn by turn. Every
row says what it is to show (`target`) and whether it does (`holds`); the last line counts those that do not (`missed`).

added_tcp    a token's time over two shards less that of the whole model: what the one boundary costs; also less that
             of the same two slices in this process, without a network, on one core and on a core each: a core that has
             waited for the other computes more slowly at first
added_rpc    the same over torch.distributed.rpc
link         token time against the round trip of a link with 1 -> 2 and 2 -> client in it; the slope, in round trips
prefill      the prompt in chunks that overlap on the shards, over the prompt in one pass
batch        tokens a second of four texts at once over one, and whether they say what each says alone
plan         the planner's token time, from two slices timed alone, over the measured one, at several cuts
boundary     bytes of a token there and back; bytes and perplexity in each encoding of the boundary
times        what the parts of a token's time add up to over its wall time at the client
speculation  a split target behind a verifier, with a drafter of known acceptance over without, 50 ms between the shards
memory       peak memory of shards of a large random model over that of a tiny one's

Absolute times hold for a quiet machine; `load_average` says how quiet it was.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.command import entry
from split.bench.settings import SplitBenchSettings

log = logging.getLogger(__name__)

Row = dict[str, Any]


def run(settings: SplitBenchSettings, place: entry.Run) -> dict[str, Any]:
    """Measures the parts that are asked for; the rows are the result."""
    from lab.bench import missed, write_report
    from lab.tracking import Tracker
    from split.bench import inference_rows as benching
    from split.bench.rig import Rig

    rows: list[Row] = []
    place.so_far = lambda: {"rows": rows}
    path = Path(settings.project.report or place.folder / "bench.json")
    kept = _kept(path, settings.project.parts)
    with contextlib.closing(Rig(settings, place.folder)) as rig, Tracker(settings, "split", place.folder) as tracker:
        for index, name in enumerate(settings.project.parts):
            log.info("measuring %s", name)
            row = {"row": name, **getattr(benching, name)(rig), "load_average": os.getloadavg()[0]}
            tracker.log(index, **row)
            rows.append(row)
            write_report(path, "split", [*kept, *rows])  # now: what follows may fail
    return {"benchmark": "split", "report": path, "missed": missed(rows), "rows": rows}


def _kept(path: Path, parts: Sequence[str]) -> list[Row]:
    """Rows of other parts that were measured before."""
    rows: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in rows if row["row"] not in parts]


def main() -> None:
    """Composes `conf/split_bench.yaml` and runs."""
    entry.main("split_bench", SplitBenchSettings, run)


if __name__ == "__main__":
    main()
