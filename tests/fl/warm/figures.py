"""Figures of a real deployment of two sites: warm against cold, and kills of workers, SuperNodes and the server."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import psutil

from fl.run.folders import latest_rounds, round_folders
from tests.fl.deployment import Deployment, adapters, copy_checkout, deployed, wait_for
from tests.fl.two_sites import SITES

RUN_SECONDS = 3000.0
BOTH = f"project.num_clients={len(SITES)}"


def warm_over_cold(folder: Path, rounds: int, *words: str) -> dict[str, Any]:
    """Median seconds of a round with warm workers over those with a process per message, one run after the other."""
    with deployed(folder, copy_checkout(folder / "checkout")) as here:
        seconds, found = {}, {}
        for name, warm in (("cold", "false"), ("warm", "true")):
            run = here.watch(folder / name, BOTH, f"project.rounds={rounds}", f"project.warm={warm}", *words)
            assert run.wait(RUN_SECONDS) == 0, run.text
            rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
            # The first round starts the worker.
            seconds[name] = [row["round_seconds"] for row in rows if row.get("step", 0) > 1]
            found[name] = adapters(folder / name)
    ratio = statistics.median(seconds["warm"]) / statistics.median(seconds["cold"])
    return {"round_seconds": seconds, "warm_over_cold": ratio, "same_adapters": found["warm"] == found["cold"]}


def kill_sites(folder: Path, kills: int, rounds: int, seed: int) -> dict[str, Any]:
    """SIGKILL of a site's worker, of its SuperNode, or of both, at random points of a run; SuperNodes start again."""
    moments, killed = random.Random(seed), {"worker": 0, "supernode": 0, "both": 0}
    with deployed(folder, copy_checkout(folder / "checkout")) as here:
        words = [BOTH, f"project.rounds={rounds}", "project.max_failures=99", "project.quorum=1"]
        run = here.watch(folder / "run", *words, "project.reply_timeout_seconds=120")
        wait_for("round 1", lambda: (latest_rounds(folder / "run") or Path("none")).exists(), run)
        while sum(killed.values()) < kills and run.process.poll() is None:
            time.sleep(moments.uniform(0, 20))
            kind, site = moments.choice([*killed]), moments.choice(SITES)
            if kind in ("worker", "both"):
                for worker in here.workers():
                    if str(here.nodes[site].process.pid) in worker.cmdline():
                        worker.kill()
            if kind in ("supernode", "both"):
                os.kill(here.nodes[site].process.pid, signal.SIGKILL)
                here.nodes[site].kill()
                here.nodes[site] = _again(here, site)
            killed[kind] += 1
        code = run.wait(RUN_SECONDS)
        result = json.loads((folder / "run" / "result.json").read_text())
        for node in here.nodes.values():
            node.end(signal.SIGTERM)
        deadline = time.monotonic() + 30
        while (left := here.workers()) and time.monotonic() < deadline:
            time.sleep(0.2)
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {
        "kills": killed,
        "exit_code": code,
        "rounds_completed": result["rounds_completed"],
        "most_lost_in_a_round": max(row["refused"] for row in rows if "refused" in row and "step" in row),
        "attempts": result["attempts"],
        "left_running": len(left),
    }


def _again(here: Deployment, site: str) -> Any:
    """The SuperNode of a site once the server takes it again: after a kill, not before its heartbeats have run out."""
    deadline = time.monotonic() + 180
    while True:
        node = here.node(site)
        time.sleep(5)
        if node.process.poll() is None:
            return node
        assert time.monotonic() < deadline, node.text


def kill_servers(folder: Path, kills: int, rounds: int, seed: int) -> dict[str, Any]:
    """SIGKILL of the server's process at random points, resumed by `python -m fl.run`; the same run left alone."""
    moments, killed = random.Random(seed), []
    with deployed(folder, copy_checkout(folder / "checkout")) as here:
        whole = here.watch(folder / "whole", BOTH, f"project.rounds={rounds}")
        assert whole.wait(RUN_SECONDS) == 0, whole.text
        run = here.watch(folder / "run", BOTH, f"project.rounds={rounds}", f"project.attempts={kills + 1}")
        while len(killed) < kills and run.process.poll() is None:
            servers = [p for p in here.superlink.family() if "flwr-serverapp" in "".join(_words(p))]
            if not servers:
                time.sleep(0.2)
                continue
            time.sleep(moments.uniform(0, 25))
            if servers[0].is_running():
                servers[0].kill()
                best = latest_rounds(folder / "run")
                killed.append(max(round_folders(best / "adapters")) if best else -1)
                psutil.wait_procs(servers, timeout=60)
        code = run.wait(RUN_SECONDS)
        same = adapters(folder / "run") == adapters(folder / "whole")
    return {"kills": len(killed), "rounds_at_kill": killed, "exit_code": code, "same_adapters": same}


def _words(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []
