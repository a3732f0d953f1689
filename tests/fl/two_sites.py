"""A small federation of two sites, each with a file of its own: what every way to run it is told."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from unittest.mock import patch

from fl.partition import client_documents
from fl.settings import FederatedSettings
from lab.command.entry import compose_settings
from lab.learning.data import open_source
from simulations import fed_sim
from tests.federated import CANARY
from tests.in_process import exit_code

ROOT = Path(__file__).resolve().parents[2]
SITES = ("alice", "bob")
SEED = 5
OVERRIDES = [
    "model=random",
    "model.quantization=none",
    "device.threads=1",
    "tracking=none",
    f"seed={SEED}",
    "project.rounds=2",
    "project.local_steps=3",
    "project.poll_seconds=0.2",  # each look is a call over TLS, and it is client processes that take the time
    "project.optimization.batch_size=2",
    "project.data.source=jsonl",
    "project.data.sequence_length=64",
    "project.data.held_out_fraction=0.3",
]


def write_data(folder: Path) -> Path:
    """A shared file for the simulation; for each site a file with just the lines that the simulation gives it."""
    shared = folder / "shared.jsonl"
    rows = [{"prompt": f"What is {n} times {n}?", "response": f"{CANARY} {n * n}" + "!" * (n % 7)} for n in range(30)]
    shared.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    overrides = shlex.join([*OVERRIDES, f"project.data.path={shared}"])
    project = compose_settings("fed_learn", overrides, FederatedSettings).project
    source, text = open_source(project.data), shared.read_bytes()
    for index, site in enumerate(SITES):
        documents = client_documents(source, index, len(SITES), project.partition_rule, SEED)
        lines = [text[document.position :].splitlines(keepends=True)[0] for document in documents]
        (folder / f"{site}.jsonl").write_bytes(b"".join(lines))
    return shared


def words(shared: Path) -> list[str]:
    """What a run on one machine is told."""
    return [*OVERRIDES, f"project.num_clients={len(SITES)}", "project.workers=1", f"project.data.path={shared}"]


def simulate(folder: Path) -> None:
    """The run on a Ray worker, commanded from this process; `folder` gets its data and becomes its run folder."""
    with patch.dict(os.environ, PYTHONPATH=str(ROOT)):
        assert exit_code(fed_sim.main, *words(write_data(folder)), f"hydra.run.dir={folder}") == 0
