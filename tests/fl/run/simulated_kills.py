"""A whole simulation, on Ray, whose server process is killed (SIGKILL) at random points and resumed each time.

The killed ones are forks of this process: the imports of the command take longer than all of its rounds.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import psutil

from simulations import fed_sim
from tests.federated import on_jsonl, write_dialogues
from tests.fl.run.kills import Killed, adapters, kill_at_random

ROOT = Path(__file__).resolve().parents[3]
CLIENTS, ROUNDS = 4, 6
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
JOIN_SECONDS = 300.0
IMPORTS = ("simulations.flower", "flwr.simulation", "ray", "fl.plots")
"""What the command imports later on."""


@dataclass
class Simulation:
    """A fork of this process that runs the command in a session of its own."""

    process: ForkProcess

    def is_alive(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> None:
        self.process.kill()

    def join(self) -> None:
        """Waits for the process; then ends Ray's agents, which may live on for a minute after a SIGKILL."""
        assert self.process.pid is not None
        self.process.join(JOIN_SECONDS)
        for process in session(self.process.pid):
            process.kill()


def session(leader: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.Error):
            pass
    return found


def words_of(data: Path, folder: Path, *overrides: str) -> list[str]:
    """What the command is told. With one worker: a start, which is most of the time, costs the imports of each."""
    words = on_jsonl(data, CLIENTS, f"project.rounds={ROUNDS}", "project.fraction=0.5", f"hydra.run.dir={folder}")
    return [*words, "project.workers=1", *overrides]


def begin(data: Path, folder: Path, overrides: Sequence[str]) -> Simulation:
    process = multiprocessing.get_context("fork").Process(
        target=run_command, args=[words_of(data, folder, *overrides), folder.with_suffix(".log")]
    )
    process.start()
    return Simulation(process)


def run_command(words: Sequence[str], output: Path) -> None:
    """The command in this process, with its output in a file."""
    os.setsid()
    with output.open("wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ |= ENVIRONMENT
    sys.argv = ["simulations.fed_sim", *words]
    fed_sim.main()


def kill_simulations(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Compares a run that is killed `kills` times with one that is left alone."""
    data = write_dialogues(folder / "data.jsonl", 40)
    command = [sys.executable, "-m", "simulations.fed_sim", *words_of(data, folder / "whole")]
    subprocess.run(command, env=os.environ | ENVIRONMENT, check=True, capture_output=True, timeout=JOIN_SECONDS)
    for name in IMPORTS:
        import_module(name)
    rounds = sorted((folder / "whole/adapters").iterdir())
    seconds = rounds[-1].stat().st_mtime - rounds[0].stat().st_mtime
    came: Killed = kill_at_random(kills, seed, folder, ROUNDS, seconds, lambda where, words: begin(data, where, words))
    whole = adapters(folder / "whole")
    differing = [
        f"{attempt.name}: {name}"
        for attempt in sorted(folder.glob("attempt-*/"))
        for name, held in adapters(attempt).items()
        if whole[name] != held
    ]
    same = came.adapters == whole and len(whole) == ROUNDS + 1 and not differing
    figures = {key: value for key, value in asdict(came).items() if key != "adapters"}
    return {"same_adapters": same, "differing": differing, **figures}
