"""A whole simulation, on Ray, whose server process is killed (SIGKILL) at random points and resumed each time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.federated import on_jsonl, write_dialogues
from tests.fl.run.kills import Killed, adapters, kill_at_random

ROOT = Path(__file__).resolve().parents[3]
CLIENTS, ROUNDS = 4, 6


@dataclass
class Simulation:
    """The command in a session of its own."""

    process: subprocess.Popen[bytes]

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()

    def join(self) -> None:
        """Waits for the process; then ends Ray's agents, which may live on for a minute after a SIGKILL."""
        self.process.wait(300)
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


def begin(data: Path, folder: Path, overrides: Sequence[str]) -> Simulation:
    words = on_jsonl(data, CLIENTS, f"project.rounds={ROUNDS}", "project.fraction=0.5", f"hydra.run.dir={folder}")
    command = [sys.executable, "-m", "simulations.fed_sim", *words, *overrides]
    output = folder.with_suffix(".log").open("wb")
    quiet = {"stdout": output, "stderr": subprocess.STDOUT}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return Simulation(subprocess.Popen(command, start_new_session=True, env=environment, **quiet))  # type: ignore[call-overload]


def kill_simulations(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Compares a run that is killed `kills` times with one that is left alone."""
    data = write_dialogues(folder / "data.jsonl", 40)
    begin(data, folder / "whole", []).join()
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
