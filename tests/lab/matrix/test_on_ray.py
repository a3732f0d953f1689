"""The same cells on Ray: same figures; a worker that is killed costs only its cell; an address that does not answer."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from lab.matrix.on_ray import check_answers
from lab.settings import UserError
from tests.lab.matrix.sweeps import command, environment, started, sweep_here

ON_RAY = ("matrix.launcher=ray", "matrix.address=local", "matrix.memory_limit_gib=1")
DEADLINE = 120.0


def wait_for_worker(sweep: subprocess.Popen[Any], log: Path) -> tuple[psutil.Process, psutil.Process]:
    """The Ray worker that has a slow cell, and that cell."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        assert sweep.poll() is None
        slow = (
            [line.split() for line in log.read_text().splitlines() if line.startswith("slow")] if log.exists() else []
        )
        if slow:
            cell = psutil.Process(int(slow[0][-1]))
            return next(one for one in cell.parents() if "ray::" in " ".join(one.cmdline())), cell
        time.sleep(0.02)
    raise AssertionError("no worker took the slow cell")


@pytest.mark.real
def test_a_killed_worker_costs_only_its_cell_which_runs_again(tmp_path: Path) -> None:
    axes: dict[str, list[Any]] = {"prompt": ["ok", "slow"], "project.matrix_size": [1, 2]}
    sweep = subprocess.Popen(
        command(tmp_path, axes, *ON_RAY), cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    worker, cell = wait_for_worker(sweep, tmp_path / "log")
    os.kill(worker.pid, signal.SIGKILL)
    assert not psutil.wait_procs([cell], timeout=10)[1], "the cell outlived its worker"
    out, errors = sweep.communicate(timeout=DEADLINE)
    assert sweep.returncode == 0, errors
    assert '"cells": 4, "ok": 4, "failed": 0' in out
    counts = {line: started(tmp_path).count(line) for line in started(tmp_path)}
    assert sorted(counts.values()) == [1, 1, 1, 2], counts
    on_ray = sweep_here(tmp_path, axes, f"matrix.results={tmp_path}/results/matrix")
    here = sweep_here(tmp_path / "here", axes)
    assert on_ray.skipped == 4, "the same signatures"
    assert [r["figures"] for r in on_ray.document["results"]] == [r["figures"] for r in here.document["results"]]


@pytest.mark.real
@pytest.mark.parametrize("listens", [False, True])
def test_an_address_that_does_not_answer_is_named_in_time(listens: bool) -> None:
    """A closed port, and one that takes connections and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(UserError, match=rf"matrix.address must be a Ray cluster that answers.*, got '{address}'"):
            check_answers(address, timeout_seconds=6.0)
        assert time.monotonic() - began < 20
