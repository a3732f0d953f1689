"""Two shards train one adapter; the losses are those of the unsplit model. `python examples/split_train.py`"""

import sys
import tempfile
from pathlib import Path

from lab.command.entry import Run, compose_settings
from split.training.run import run_training
from split.training.settings import SplitTrainSettings

OVERRIDES = [
    "project.transport=inproc",  # both shards in this process; tcp puts each in one of its own
    "project.local_shards=2",
    "project.baseline=unsplit",  # the same steps of the whole model afterwards, to compare with
    "project.steps=5",
    "project.micro_batches=2",
    "tracking=none",
]
settings = compose_settings("split_train", [*OVERRIDES, *sys.argv[1:]], SplitTrainSettings)
with tempfile.TemporaryDirectory() as folder:
    figures = run_training(settings, Run(Path(folder)))
pairs = zip(figures["loss_by_step"], figures["unsplit_loss_by_step"], strict=True)
for step, (split, unsplit) in enumerate(pairs, start=1):
    print(f"step {step}: loss {split:.6f} over two shards, {unsplit:.6f} unsplit")
    assert abs(split - unsplit) < 1e-4
