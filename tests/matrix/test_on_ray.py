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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from lab.settings import UserError
from matrix.on_ray import check_answers
from tests.matrix.sweeps import command, environment, started, sweep_here

DEADLINE = 120.0
AXES: dict[str, list[Any]] = {"prompt": ["ok", "slow"], "model.seed": [1, 2]}

TWO_NODES = """
import sys
from ray.cluster_utils import Cluster
memory = {"object_store_memory": 80 * 2**20}
soon = {"health_check_period_ms": 500}
head = {"num_cpus": 0, "include_dashboard": False, "_system_config": soon, **memory}
cluster = Cluster(initialize_head=True, head_node_args=head)
nodes = [cluster.add_node(num_cpus=1, memory=2**31, **memory) for _ in range(2)]
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
"""Cells run on the two nodes behind the head, which takes one for lost after five unanswered checks."""


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


def wait_for_worker(
    sweep: subprocess.Popen[str], log: Path, but: set[str]
) -> tuple[str, psutil.Process, psutil.Process]:
    """A slow cell that is not one of `but`: what it was told, the Ray worker that has it, its process."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        assert sweep.poll() is None
        for line in log.read_text().splitlines() if log.exists() else []:
            told, _, number = line.rpartition(" ")
            if told.startswith("slow") and told not in but:
                cell = psutil.Process(int(number))
                return told, next(one for one in cell.parents() if "ray::" in " ".join(one.cmdline())), cell
        time.sleep(0.02)
    raise AssertionError("no worker took the slow cell")


@pytest.mark.real
def test_what_is_lost_costs_only_its_cell_which_runs_again(tmp_path: Path, cluster: str) -> None:
    """One of the slow cells loses its worker, the other its node."""
    on_ray = ("matrix.launcher=ray", f"matrix.address={cluster}", "matrix.memory_limit_gib=1")
    sweep = subprocess.Popen(
        command(tmp_path, AXES, *on_ray), cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    lost: dict[str, psutil.Process] = {}
    try:
        for what in ("worker", "node"):
            told, worker, lost[told] = wait_for_worker(sweep, tmp_path / "log", set(lost))
            for victim in [worker] if what == "worker" else [worker.parents()[0], worker]:  # a node: its raylet, too
                victim.kill()
        assert not psutil.wait_procs(list(lost.values()), timeout=15)[1], "a cell outlived its worker"
        out, errors = sweep.communicate(timeout=DEADLINE)
    finally:
        sweep.kill()
    assert sweep.returncode == 0, errors
    last = json.loads(out.splitlines()[-1])
    assert (last["cells"], last["ok"], last["failed"]) == (4, 4, 0)
    counts = {line: started(tmp_path).count(line) for line in started(tmp_path)}
    assert counts == {"ok 1 0": 1, "ok 2 0": 1, "slow 1 0": 2, "slow 2 0": 2}
    again = sweep_here(tmp_path, AXES, f"matrix.results={tmp_path}/results/matrix")
    assert again.skipped == 4, "the same signatures on Ray and here"
    here = sweep_here(tmp_path / "here", AXES).document["results"]
    assert [result["figures"] for result in again.document["results"]] == [result["figures"] for result in here]


@pytest.mark.real
def test_an_address_that_does_not_answer_is_named_in_time() -> None:
    """A closed port, and one that takes connections and says nothing; at once, since each takes all of its time."""

    def ask(server: socket.socket) -> None:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(UserError, match=rf"matrix.address must be a Ray cluster that answers.*, got '{address}'"):
            check_answers(address, timeout_seconds=6.0)
        assert time.monotonic() - began < 20

    with socket.socket() as closed, socket.socket() as silent, ThreadPoolExecutor(2) as pool:
        for server in (closed, silent):
            server.bind(("127.0.0.1", 0))
        silent.listen()
        assert list(pool.map(ask, (closed, silent))) == [None, None]
