"""What splitting costs and gains, on this machine: `python -m split.bench`; sizes in conf/project/split_bench.yaml.

Two shard processes of one thread each, this process beside them with the whole model on one thread. Readings are
interleaved, and compared turn by turn.

added     a token's time over two shards less that of the same two slices in this process without a network: what the
          boundary costs, with two crossings of the network a token (to the second shard, and back to the client)
link      token time against the round trip of a link that carries 1 -> 2 and 2 -> client; the slope is in round trips
prefill   the prompt in chunks that overlap on the shards, over the prompt in one pass
batch     tokens a second of four texts at once over one
plan      the planner's token time from slices timed alone, over the measured one

Absolute times hold for a quiet machine; `load_average` says how quiet it was.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Any

from lab import entry
from split.bench_settings import SplitBenchSettings

log = logging.getLogger(__name__)

Row = dict[str, Any]


def run(settings: SplitBenchSettings, place: entry.Run) -> dict[str, Any]:
    """Measures the parts that are asked for; the rows are the result."""
    from lab.bench import write_report
    from split.benching import Bench

    rows: list[Row] = []
    with contextlib.closing(Bench(settings, place.folder)) as bench:
        for name in settings.project.parts:
            log.info("measuring %s", name)
            rows.append({"row": name, **getattr(bench, name)(), "load_average": os.getloadavg()[0]})
    document = write_report(Path(settings.project.report or place.folder / "bench.json"), "split", rows)
    return {"benchmark": document["benchmark"], "rows": document["rows"]}


def main() -> None:
    """Composes `conf/split_bench.yaml` and runs."""
    entry.main("split_bench", SplitBenchSettings, run)


if __name__ == "__main__":
    main()
