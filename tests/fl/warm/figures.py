"""Figures of a real deployment of two sites: warm against cold, and kills of workers, SuperNodes and the server."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fl.run.folders import latest_rounds, round_folders
from fl.run.state import RECORD
from tests.fl.deployment import (
    DEADLINE_SECONDS,
    Deployment,
    Program,
    adapters,
    copy_checkout,
    deployed,
    running,
    wait_for,
)
from tests.fl.two_sites import SITES

RUN_SECONDS = 3000.0
ROUNDS_PER_KILL = 4
"""A SuperNode that was killed is away for two or three rounds."""
BOTH = f"project.num_clients={len(SITES)}"


@dataclass(frozen=True)
class Kill:
    """A kill of a site's processes."""

    site: str
    before: int
    """Rounds that had ended at the kill."""
    after: int
    """Rounds that had ended when the site was back."""

    @property
    def next_round(self) -> int:
        """The first round that begins with the site back: the one after the round that it came back in."""
        return self.after + 2


def warm_over_cold(folder: Path, turns: int, *words: str) -> dict[str, Any]:
    """Median seconds of a round with warm workers over those with a process per message, in runs that take turns."""
    seconds: dict[str, list[float]] = {"cold": [], "warm": []}
    found: list[dict[str, bytes]] = []
    with deployed(folder, copy_checkout(folder / "checkout")) as here:
        for turn in range(turns):
            for name in seconds:
                path = folder / f"{name}-{turn}"
                run = here.watch(path, BOTH, "project.rounds=2", f"project.warm={name == 'warm'}", *words)
                assert run.wait(RUN_SECONDS) == 0, run.text
                found.append(adapters(path))
                begin = 1 if turn == 0 else 0  # the first round starts the workers
                seconds[name] += [row["round_seconds"] for row in rows_of(path)[begin:]]
        leaking = here.leaking()
    return {
        "round_seconds": seconds,
        "warm_over_cold": statistics.median(seconds["warm"]) / statistics.median(seconds["cold"]),
        "same_adapters": all(one == found[0] for one in found),
        "files_with_a_sites_text": leaking,
    }


def kill_sites(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """SIGKILL of a site's worker, of its SuperNode, or of both, at random points of a run; SuperNodes start again, and
    the next kill comes when a round has ended since."""
    moments, killed, done = random.Random(seed), {"worker": 0, "supernode": 0, "both": 0}, list[Kill]()
    with deployed(folder, copy_checkout(folder / "checkout")) as here:
        path = folder / "run"
        words = [BOTH, f"project.rounds={ROUNDS_PER_KILL * kills}", "project.max_failures=99", "project.quorum=1"]
        run = here.watch(path, *words, "project.reply_timeout_seconds=120")
        for _ in range(kills):
            _wait_for_round(rounds_of(path) + 1, path, run)
            time.sleep(moments.uniform(0, rows_of(path)[-1]["round_seconds"] if rows_of(path) else 0))
            kind, site = moments.choice([*killed]), moments.choice(SITES)
            before = rounds_of(path)
            if kind in ("worker", "both"):
                for worker in here.workers():
                    if str(here.nodes[site].process.pid) in worker.cmdline():
                        worker.kill()
            if kind in ("supernode", "both"):
                os.kill(here.nodes[site].process.pid, signal.SIGKILL)
                here.nodes[site].kill()
                here.nodes[site] = _again(here, site)
            killed[kind] += 1
            done.append(Kill(site, before, rounds_of(path)))
        code = run.wait(RUN_SECONDS)
        result = json.loads((path / "result.json").read_text())
        for node in here.nodes.values():
            node.end(signal.SIGTERM)
        deadline = time.monotonic() + 30
        while (left := here.workers()) and time.monotonic() < deadline:
            time.sleep(0.2)
    refused = [row["refused"] for row in rows_of(path)]
    replied = {row["step"]: [SITES[int(number)] for number in row["by_site"]] for row in rows_of(path)}
    return {
        "kills": killed,
        "exit_code": code,
        "rounds_completed": result["rounds_completed"],
        "most_lost_in_a_round": max(refused),
        "rounds_with_a_loss": sum(count > 0 for count in refused),
        "all_replied_again": all_replied_again(done, replied, result["rounds_completed"]),
        "attempts": result["attempts"],
        "left_running": len(left),
    }


def all_replied_again(kills: Sequence[Kill], replied: Mapping[int, Container[str]], rounds: int) -> bool:
    """Whether every site gave a good reply in the first round that began with it back, of a run of so many rounds.

    Args:
        kills: In the order of time. One with no such round left in the run does not count, nor one whose site was
            killed again by the end of that round: then the later kill tells.
        replied: The sites with a good reply, by round.
    """
    for number, kill in enumerate(kills):
        is_last = not any(later.site == kill.site and later.before < kill.next_round for later in kills[number + 1 :])
        if is_last and kill.next_round <= rounds and kill.site not in replied.get(kill.next_round, ()):
            return False
    return True


def _again(here: Deployment, site: str) -> Program:
    """The SuperNode of a site once the server takes it again: after a kill, not before its heartbeats have run out."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        node = here.node(site)
        while node.process.poll() is None:
            if "SuperNode ID" in node.text:
                return node
            time.sleep(0.1)
        assert time.monotonic() < deadline, node.text


def kill_servers(folder: Path, kills: int, rounds: int, seed: int) -> dict[str, Any]:
    """SIGKILL of the server's process at random points, resumed by `python -m fl.run`; the same run left alone."""
    moments, rounds_at_kill = random.Random(seed), []
    finished: dict[int, float] = {}
    with deployed(folder, copy_checkout(folder / "checkout")) as here:
        whole = here.watch(folder / "whole", BOTH, f"project.rounds={rounds}")
        assert whole.wait(RUN_SECONDS) == 0, whole.text
        seconds = statistics.median(row["round_seconds"] for row in rows_of(folder / "whole"))
        run = here.watch(folder / "run", BOTH, f"project.rounds={rounds}", f"project.attempts={kills + 1}")
        for least in sorted(moments.choices(range(-1, rounds), k=kills)):
            _wait_for_round(least, folder / "run", run)
            server = wait_for("server", lambda: _server(here), run)
            time.sleep(moments.uniform(0, seconds))
            kill(server)
            rounds_at_kill.append(rounds_of(folder / "run"))
            finished |= seconds_of(folder / "run")
        code = run.wait(RUN_SECONDS)
        same = adapters(folder / "run") == adapters(folder / "whole")
        kept = seconds_of(folder / "run")
        attempts = json.loads((folder / "run" / "result.json").read_text())["attempts"]
    return {
        "kills": len(rounds_at_kill),
        "rounds_at_kill": rounds_at_kill,
        "exit_code": code,
        "attempts": attempts,  # Flower itself replaces a process that is killed before it has begun
        "same_adapters": same,
        # a round that was worked on again would have the same adapter, and would have taken other seconds
        "rounds_lost": sorted(number for number, seconds in finished.items() if kept.get(number) != seconds),
        "rounds_finished_at_a_kill": len(finished),
    }


def kill(process: psutil.Process, seconds: float = 60) -> None:
    """SIGKILL, until the process runs no more. As a zombie it may stay for long: Flower reaps it at its next look."""
    process.kill()
    wait_for("end of the process", lambda: not running(process), seconds=seconds)


def rounds_of(run: Path) -> int:
    """Number of the last finished round of a run that is watched; -1 before its start."""
    latest = latest_rounds(run)
    return max(round_folders(latest / "adapters")) if latest else -1


def seconds_of(run: Path) -> dict[int, float]:
    """What each finished round of a run that is watched took, from its record; that of round 0 has none."""
    latest = latest_rounds(run)
    folders = round_folders(latest / "adapters") if latest else {}
    reports = {number: json.loads((folder / RECORD).read_text())["report"] for number, folder in folders.items()}
    return {number: report["round_seconds"] for number, report in reports.items() if report}


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The figures of the finished rounds of a run."""
    file = (latest_rounds(run) or run) / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [row for row in rows if row.get("step", 0) > 0]


def _wait_for_round(number: int, path: Path, run: Program) -> None:
    wait_for(f"round {number}", lambda: rounds_of(path) >= number, run, seconds=RUN_SECONDS)


def _server(here: Deployment) -> psutil.Process | None:
    return next((process for process in here.superlink.family() if "flwr-serverapp" in "".join(_words(process))), None)


def _words(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []
