"""Simulations whose sites are slow, or are killed: `python -m tests.fl.run.vanishing slow|killed|refusing <overrides>`.

Run as a command it is `simulations/fed_sim.py` with other clients; `stragglers` and `killed_sites` run it and compare.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fl.client_app import make_client_app
from fl.messages import CONFIG, SERVER_ROUND
from fl.settings import FederatedSettings
from lab.command.processes import run_to_end
from tests.federated import on_jsonl, write_dialogues
from tests.fl.run.kills import adapters

FAST_SECONDS, SLOW_SECONDS = 0.5, 5.0
KILLED_SHARE = 0.3
KIND, MARKS = "LAB_TEST_KIND", "LAB_TEST_MARKS"


def killed_in(server_round: int, partition: int, sites: int) -> bool:
    """Whether a site is among the 30 % that a round loses."""
    lost = random.Random(server_round).sample(range(sites), round(KILLED_SHARE * sites))
    return partition in lost


def changed_app(settings_of: Callable[[Context], FederatedSettings]) -> ClientApp:
    """Clients as ever, of which some are slow, killed, or refuse to work; the environment says which."""
    inner, client_app, kind = make_client_app(settings_of), ClientApp(), os.environ[KIND]

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(str(context.node_config["partition-id"]))
        if kind == "slow":
            time.sleep(SLOW_SECONDS if partition == 0 else FAST_SECONDS)
        else:
            config = message.content.config_records[CONFIG]
            sites = settings_of(context).project.num_clients
            if killed_in(int(str(config[SERVER_ROUND])), partition, sites):
                mark = Path(os.environ[MARKS]) / f"{config[SERVER_ROUND]}-{partition}"
                if kind == "killed" and not mark.exists():  # once: the message is tried again, for other sites' sake
                    mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError("this site takes no part")
        return inner(message, context)

    client_app.evaluate()(lambda message, context: inner(message, context))
    client_app.query()(lambda message, context: inner(message, context))
    return client_app


def stragglers(folder: Path, rounds: int) -> dict[str, Any]:
    """Rounds per hour with one site of six that takes 10 times as long: waiting, with a deadline, with oversampling."""
    ways = {
        "waiting": ["project.fraction=0.84"],
        "deadline": ["project.fraction=0.84", "project.quorum=3", "project.round_deadline_seconds=1.0"],
        "oversampling": ["project.fraction=0.84", "project.oversample=1"],
    }
    per_hour = {way: 3600 / _round_seconds(folder / way, "slow", rounds, words) for way, words in ways.items()}
    gains = {f"{way}_gain": per_hour[way] / per_hour["waiting"] for way in ("deadline", "oversampling")}
    return {"rounds_per_hour": per_hour, **gains}


def _round_seconds(folder: Path, kind: str, rounds: int, words: list[str]) -> float:
    _run(folder, kind, 6, rounds, ["project.workers=6", "seed=3", *words])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # The first rounds load the models of all workers.
    return statistics.median(row["round_seconds"] for row in rows if row.get("step", 0) > rounds // 2)


def killed_sites(folder: Path, sites: int, rounds: int) -> dict[str, Any]:
    """30 % of the sites killed (SIGKILL) in each round, against the same sites that refuse to work."""
    words = ["project.workers=2", "project.max_failures=99", "project.worker_retries=5"]
    killed, refusing = (_run(folder / kind, kind, sites, rounds, words) for kind in ("killed", "refusing"))
    return {
        "sites": sites,
        "rounds_completed": killed["rounds_completed"],
        "refused": len(killed["refused"]),
        "perplexity_ratio": math.exp(killed["eval_loss_after"] - refusing["eval_loss_after"]),
        "same_adapters": adapters(folder / "killed") == adapters(folder / "refusing"),
    }


def _run(folder: Path, kind: str, sites: int, rounds: int, words: list[str]) -> dict[str, Any]:
    folder.mkdir(parents=True)
    data = write_dialogues(folder / "data.jsonl", 10 * sites)
    os.environ[KIND], os.environ[MARKS] = kind, str(folder)
    words = [*on_jsonl(data, sites, f"project.rounds={rounds}"), *words]
    return run_to_end("tests.fl.run.vanishing", words, folder, 1800.0)[1]


if __name__ == "__main__":
    from simulations import flower
    from simulations.fed_sim import main
    from tests.fl.run import vanishing

    flower.make_client_app = vanishing.changed_app  # by reference: Ray's workers import it
    sys.exit(main())
