"""Cost and gain of training across a cut, on this machine: `python -m split.bench.training`.

Shard processes have a core and a thread each; the whole model, in this process, has the first core while they wait.
Sizes are in conf/split_train_bench.yaml. Every row has its target (`target`) and whether it meets it (`holds`).

pipeline    a step's time as a replay of the schedule with the measured stage times predicts it, over its whole time
            (optimizer and all), and the bubble, at several numbers of micro-batches of the same size; stage times are
            medians of the same run
throughput  tokens a second over two shards over those of the whole model on one core, turn by turn
boundary    bytes that shards sent each other over those of the hidden states and gradients themselves
memory      peak memory of a shard's process above one with the same imports, over the sizes of all that it holds
adapter     a LoRA adapter on real text, as `split.train` trains it, over two shards and unsplit: the largest difference
            of a loss

Absolute times hold for a quiet machine; `load_average` says how quiet it was.
"""

from pathlib import Path
from typing import Any

from lab.command import entry
from split.bench.settings import SplitTrainBenchSettings


def run(settings: SplitTrainBenchSettings, place: entry.Run) -> dict[str, Any]:
    """Measure the chosen parts; return the figures of the last line."""
    from lab.bench import run_parts
    from split.bench.training_rows import PARTS, TrainingRig

    project = settings.project
    report = Path(project.report or place.folder / "bench.json")
    rig = TrainingRig(settings, place.folder)
    return run_parts("split_train", PARTS, project.parts, rig, settings=settings, place=place, report=report)


main = entry.command("split_train_bench", SplitTrainBenchSettings, run)

if __name__ == "__main__":
    main()
