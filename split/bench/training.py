"""What training across a cut costs and gains, on this machine: `python -m split.bench.training`.

Shard processes have a core and a thread each; the whole model, in this process, has the first core while they wait.
Sizes are in conf/split_train_bench.yaml. Every row says what it is to show (`target`) and whether it does.

pipeline    what a replay of the schedule with the measured stage times predicts over a step's whole time (optimizer and
            all), and the bubble, at several numbers of micro-batches of the same size; stage times are medians of the
            same run
throughput  tokens a second over two shards over those of the whole model on one core, turn by turn
boundary    bytes that shards sent each other over those of the hidden states and gradients themselves
memory      peak memory of a shard's process above one with the same imports, over what it has to hold
adapter     a LoRA adapter on real text, as `split.train` trains it, over two shards and unsplit: the largest difference
            of a loss

Absolute times hold for a quiet machine; `load_average` says how quiet it was.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Any

from lab.command import entry
from split.bench.training_settings import SplitTrainBenchSettings

log = logging.getLogger(__name__)


def run(settings: SplitTrainBenchSettings, place: entry.Run) -> dict[str, Any]:
    """Measures the parts that are asked for; the rows are the result, and how many of them do not hold."""
    from lab.bench import missed, write_report
    from split.bench.training_rows import TrainBench

    rows: list[dict[str, Any]] = []
    place.so_far = lambda: {"rows": rows}
    with contextlib.closing(TrainBench(settings, place.folder)) as bench:
        for name in settings.project.parts:
            log.info("measuring %s", name)
            row = {"row": name, **getattr(bench, name)(), "load_average": os.getloadavg()[0]}
            log.info("%s: %s (%s)", name, "holds" if row["holds"] else "DOES NOT HOLD", row["target"])
            rows.append(row)
    path = Path(settings.project.report or place.folder / "bench.json")
    write_report(path, "split_train", rows)
    return {"benchmark": "split_train", "report": path, "missed": missed(rows), "rows": rows}


def main() -> None:
    """Composes `conf/split_train_bench.yaml` and runs."""
    entry.main("split_train_bench", SplitTrainBenchSettings, run)


if __name__ == "__main__":
    main()
