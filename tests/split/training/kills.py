"""Shards that learn killed with SIGKILL at random steps: one function for 2 kills in `test` and 10 in `soak`."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[3]
STEPS_PER_KILL = 6
_STEP = re.compile(r"^step (\d+)/\d+ after")


@dataclass(frozen=True)
class Killed:
    """What came of it."""

    kills: int
    result: dict[str, Any]
    folder: Path

    @property
    def same_losses(self) -> bool:
        """Whether every step's loss is that of the whole model, which nobody killed, to the bit."""
        same: bool = self.result["loss_by_step"] == self.result["unsplit_loss_by_step"]
        return same


def kill_while_training(kills: int, seed: int, folder: Path, words: list[str]) -> Killed:
    """A run over two local shards, of which one is killed while a step is under way, so many times."""
    generator = random.Random(seed)
    steps = STEPS_PER_KILL * (kills + 1)
    points = sorted(generator.sample(range(1, steps - 1), kills))
    command = [
        sys.executable, "-m", "split.train", "model=random", "project.local_shards=2", f"project.steps={steps}",
        "project.checkpoint_every=4", "project.micro_batches=1", "project.train=everything",
        "project.optimization.max_gradient_norm=0.0", "project.baseline=unsplit", "project.data.sequence_length=64",
        "project.data.max_examples=64", f"hydra.run.dir={folder / 'run'}", *words,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    lines: list[str] = []
    killed: list[int] = []

    def follow() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            found = _STEP.match(line)
            if found and points and int(found[1]) >= points[0]:
                points.pop(0)
                killed.append(_kill_a_learner(process.pid, generator))

    follower = threading.Thread(target=follow)
    follower.start()
    try:
        assert process.stdout is not None
        output = process.stdout.read()
        code = process.wait(timeout=60)
    finally:
        process.kill()
        follower.join(10)
    assert code == 0, "".join(lines)
    return Killed(len(killed), json.loads(output.splitlines()[-1]), folder)


def _kill_a_learner(pid: int, generator: random.Random) -> int:
    learners = sorted(
        child.pid for child in psutil.Process(pid).children() if "split.learn" in " ".join(child.cmdline())
    )
    victim = generator.choice(learners)
    os.kill(victim, signal.SIGKILL)
    return victim
