"""The same cells on Ray: same figures; what is lost with a worker or node runs again; an address without an answer."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lab.matrix.on_ray import check_answers
from lab.settings import UserError
from tests.lab.matrix.sweeps import command, environment, started, sweep_here

DEADLINE = 120.0
AXES: dict[str, list[Any]] = {"prompt": ["ok", "slow"], "project.matrix_size": [1, 2]}

TWO_NODES = """
import sys
from ray.cluster_utils import Cluster
memory = {"object_store_memory": 80 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **memory})
nodes = [cluster.add_node(num_cpus=1, memory=2**31, **memory) for _ in range(2)]
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
"""Cells run on the two nodes behind the head."""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """The address of a cluster of two nodes on this machine, as processes of its own.

    In a folder of its own, or another test's ray.init() would take it for its own (and a short one: sockets are in it).
    """
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    process = subprocess.Popen(
        [sys.executable, "-c", TWO_NODES], cwd=tmp_path, env=environment(tmp_path) | {"RAY_TMPDIR": folder},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    family: list[psutil.Process] = []
    try:
        address = process.stdout.readline().strip()
        assert address, "the cluster did not start"
        family = psutil.Process(process.pid).children(recursive=True)
        yield address
    finally:
        process.communicate(timeout=60)
        for member in family:
            if member.is_running():
                member.kill()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_worker(sweep: subprocess.Popen[str], log: Path) -> tuple[psutil.Process, psutil.Process]:
    """The Ray worker that has a slow cell, and that cell."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        assert sweep.poll() is None
        for line in log.read_text().splitlines() if log.exists() else []:
            if line.startswith("slow"):
                cell = psutil.Process(int(line.split()[-1]))
                return next(one for one in cell.parents() if "ray::" in " ".join(one.cmdline())), cell
        time.sleep(0.02)
    raise AssertionError("no worker took the slow cell")


@pytest.mark.real
@pytest.mark.parametrize("lost", ["worker", "node"])
def test_what_is_lost_costs_only_its_cell_which_runs_again(tmp_path: Path, cluster: str, lost: str) -> None:
    on_ray = ("matrix.launcher=ray", f"matrix.address={cluster}", "matrix.memory_limit_gib=1")
    sweep = subprocess.Popen(
        command(tmp_path, AXES, *on_ray), cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        worker, cell = wait_for_worker(sweep, tmp_path / "log")
        for victim in [worker] if lost == "worker" else [worker.parents()[0], worker]:  # a node: its raylet, too
            victim.kill()
        assert not psutil.wait_procs([cell], timeout=15)[1], "the cell outlived its worker"
        out, errors = sweep.communicate(timeout=DEADLINE)
    finally:
        sweep.kill()
    assert sweep.returncode == 0, errors
    last = json.loads(out.splitlines()[-1])
    assert (last["cells"], last["ok"], last["failed"]) == (4, 4, 0)
    counts = {line: started(tmp_path).count(line) for line in started(tmp_path)}
    assert sorted(counts.values()) == [1, 1, 1, 2], counts
    again = sweep_here(tmp_path, AXES, f"matrix.results={tmp_path}/results/matrix")
    assert again.skipped == 4, "the same signatures on Ray and here"
    here = sweep_here(tmp_path / "here", AXES).document["results"]
    assert [result["figures"] for result in again.document["results"]] == [result["figures"] for result in here]


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
