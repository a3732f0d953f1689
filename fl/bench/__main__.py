"""Benchmarks of the federated pillar: `python -m fl.bench`; sizes in conf/fed_bench.yaml.

folding     `ExactMean.fold` of float32 adapters compared with a plain float64 `acc += w * x` of the same arrays, in
            turn, on one thread; the speed is the ratio of times of the same turn.
memory      tracemalloc's peak of `aggregate_train` over replies that are generated one by one, for many and for few.
message     one train message as Flower serialises it, compared with its tensors' bytes, from conf/model alone.
scale       a simulation with many clients on Ray, as a separate process: wall time, and the server's resident memory
            after every round.
stock       the same simulation by Flower's own FedAvg (`simulations.stock`), in turn with ours: ratios of wall time and
            of the server's largest resident memory.
many_sites  a simulation of 1,000 sites of which 1 % train in a round: the slope of the server's resident memory over
            the second half of the rounds (least squares), and bytes, seconds and memory of a site and round.
comparison  a federation over identically distributed parts compared with its central baseline, a process for each:
            held-out perplexities, and the one before training, which shows how much training gained.

Absolute times hold for a quiet machine; `load_average` says how quiet it was.
"""

import json
import logging
import math
import os
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Message, MetricRecord
from flwr.supercore.task_identity import TaskIdentity

from fl.adapters import AdapterIndex, PackedAdapter
from fl.aggregation.exact import ExactMean
from fl.bench.settings import FederatedBenchProjectSettings, FederatedBenchSettings
from fl.messages import METRICS, WEIGHT, message_bytes, to_records
from fl.settings import FederatedSettings, WireDtype
from fl.sizes import base_bytes, linear_shapes
from fl.strategy import WeightedFedAvg
from lab.bench import Row, Sample, interleaved, judged, load_average, missed, ratio, write_report
from lab.command import entry
from lab.command.overrides import override
from lab.command.processes import run_to_end
from lab.environment import commit
from lab.files import require_writable
from lab.settings import ModelSettings

log = logging.getLogger(__name__)

SITE_FIGURES = ("uplink_bytes", "train_seconds", "peak_rss_bytes")


def run(settings: FederatedBenchSettings, place: entry.Run) -> dict[str, Any]:
    """Run all parts in turn; write the report and return it for the last line."""
    project = settings.project
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 0  # Flower makes no message outside a run
    torch.set_num_threads(1)
    path = Path(project.report or f"benchmarks/results/fl-{commit() or 'unknown'}.json")
    require_writable(path.parent, "project.report")  # now, not after everything was measured
    rows: list[Row] = []
    place.so_far = lambda: {"rows": rows}
    rows.append(folding(project))
    rows.append(memory(project))
    rows.extend(map(message, project.size_models))
    if project.scale:
        rows.append(scale(project, place.folder / "scale"))
    if project.stock_turns:
        rows.append(stock(project, place.folder / "stock"))
    if project.many_sites:
        rows.append(many_sites(project, place.folder / "many_sites"))
    if project.compare_seeds:
        rows.append(comparison(project, place.folder / "comparison"))
    write_report(path, "fl", rows)
    return {"report": path, "missed": missed(rows), "rows": rows}


def folding(project: FederatedBenchProjectSettings) -> Row:
    """Speed of the exact fold relative to the plain one."""
    values = np.random.default_rng(0).normal(0, 0.02, project.adapter_bytes // 4).astype(np.float32)
    exact = ExactMean(len(values))
    plain = np.zeros(len(values), np.float64)
    weight = np.float64(257)  # float64, or numpy would multiply in float32

    def add() -> None:
        nonlocal plain
        plain += weight * values

    readings = interleaved({"exact": lambda: exact.fold(values, 257), "plain": add}, warmup=1, repeats=project.turns)
    row: Row = {
        "part": "folding",
        "adapter_bytes": values.nbytes,
        "exact_seconds": Sample.of(readings["exact"]),
        "plain_seconds": Sample.of(readings["plain"]),
        "relative_speed": ratio(readings["plain"], readings["exact"]),
    }
    return judged(row["part"], row, "relative_speed at least 0.5", row["relative_speed"].median >= 0.5)


def memory(project: FederatedBenchProjectSettings) -> Row:
    """Growth of the server's peak memory from few replies to many."""
    few, many = (peak_bytes(count, project.adapter_bytes) for count in (project.few_replies, project.many_replies))
    row: Row = {
        "part": "memory",
        "adapter_bytes": project.adapter_bytes,
        "replies": [project.few_replies, project.many_replies],
        "peak_bytes": [few, many],
        "growth_in_adapters": (many - few) / project.adapter_bytes,
    }
    return judged(row["part"], row, "growth_in_adapters at most 2", row["growth_in_adapters"] <= 2)


def peak_bytes(replies: int, adapter_bytes: int) -> int:
    """tracemalloc's peak while the strategy aggregates `replies` generated replies."""
    index = AdapterIndex(("lora",), ((adapter_bytes // 4,),), WireDtype.float32)
    strategy = WeightedFedAvg(
        index,
        num_clients=replies,
        fraction=1.0,
        seed=0,
        message_ttl_seconds=1.0,
        register_timeout_seconds=1.0,
        poll_seconds=1.0,
    )
    log.info("memory: %d replies of %d bytes", replies, adapter_bytes)
    tracemalloc.start()
    try:
        strategy.aggregate_train(1, generated(replies, index))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def generated(count: int, index: AdapterIndex) -> Iterator[Message]:
    """`count` replies, each made on demand."""
    rng = np.random.default_rng(0)
    for number in range(count):
        content = to_records(PackedAdapter(index, rng.standard_normal(index.size, np.float32)))
        content[METRICS] = MetricRecord({WEIGHT: 1 + number})
        yield Message(content, 1, "train")
        del content


def message(name: str) -> Row:
    """Bytes of one message with a model's adapter."""
    settings = entry.compose_settings("fed_learn", f"model={name}", FederatedSettings)
    adapter = adapter_of(settings.model, settings.project.lora.rank)
    index = AdapterIndex.of(adapter, settings.project.wire_dtype)
    sent = message_bytes(Message(to_records(PackedAdapter.pack(adapter, index)), 1, "train"))
    row: Row = {
        "part": "message",
        "model": settings.model.name,
        "rank": settings.project.lora.rank,
        "wire_dtype": index.dtype,
        "tensors": len(index.names),
        "adapter_bytes": index.tensor_bytes,
        "message_bytes": sent,
        "overhead_bytes": sent - index.tensor_bytes,
        "relative_size": sent / index.tensor_bytes,
        "base_bytes": base_bytes(settings.model),
    }
    holds = row["relative_size"] <= 1.01 and row["overhead_bytes"] <= 4096
    return judged(row["part"], row, "relative_size at most 1.01, overhead_bytes at most 4096", holds)


def adapter_of(model: ModelSettings, rank: int) -> dict[str, torch.Tensor]:
    """An adapter under PEFT's names, from the model's sizes alone; random, since Flower sends equal chunks once."""
    numbers = model.architecture
    shapes = linear_shapes(numbers)
    adapter = {}
    for layer in range(numbers.layers):
        for target in model.lora_targets:
            out, into = shapes[target]
            block = "mlp" if target in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            module = f"base_model.model.model.layers.{layer}.{block}.{target}"
            adapter[f"{module}.lora_A.weight"] = torch.randn(rank, into)
            adapter[f"{module}.lora_B.weight"] = torch.randn(out, rank)
    return adapter


def scale(project: FederatedBenchProjectSettings, folder: Path) -> Row:
    """Wall time and server memory of a simulation with many clients."""
    figures = simulate(project.scale, folder, project.run_timeout_seconds)
    memory_by_round = [row["server_rss_bytes"] for row in rounds_of(folder)]
    growth = memory_by_round[-1] / memory_by_round[1] - 1 if len(memory_by_round) > 1 else 0.0
    row: Row = {
        "part": "scale",
        "overrides": project.scale,
        "num_clients": figures["num_clients"],
        "rounds_completed": figures["rounds_completed"],
        "refused": len(figures["refused"]),
        "wall_seconds": figures["wall_seconds"],
        "train_seconds": figures["train_seconds"],
        "aggregate_seconds": figures["aggregate_seconds"],
        "server_rss_bytes": memory_by_round,
        "server_growth": growth,
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }
    holds = figures["wall_seconds"] <= 300 and growth <= 0.05 and not figures["refused"]
    return judged(row["part"], row, "wall_seconds at most 300, server_growth at most 0.05, nobody refused", holds)


def rounds_of(folder: Path) -> list[Row]:
    """The figures of every round of a run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "server_rss_bytes" in row]


def stock(project: FederatedBenchProjectSettings, folder: Path) -> Row:
    """Wall time and server memory relative to Flower's own FedAvg, over the same clients."""
    ours, theirs = [], []
    for turn in range(project.stock_turns):
        place = folder / f"ours-{turn}"
        figures = simulate(project.scale, place, project.run_timeout_seconds)
        ours.append({**figures, "server_rss_bytes": [row["server_rss_bytes"] for row in rounds_of(place)]})
        log.info("running simulations.stock %s", " ".join(project.scale))
        place = folder / f"stock-{turn}"
        theirs.append(run_to_end("simulations.stock", project.scale, place, project.run_timeout_seconds)[1])
    names = ("train_loss_by_round", "eval_loss_by_round")
    losses = [
        pair
        for one, other in zip(ours, theirs, strict=True)
        for name in names
        for pair in zip(one[name], other[name], strict=True)
    ]
    refused = sum(len(each["refused"]) for each in ours)
    row: Row = {
        "part": "stock",
        "overrides": project.scale,
        "wall_seconds": Sample.of(seconds := [each["wall_seconds"] for each in ours]),
        "wall_ratio": ratio(seconds, [each["wall_seconds"] for each in theirs]),
        "server_rss_bytes": Sample.of(largest := [max(each["server_rss_bytes"]) for each in ours]),
        "memory_ratio": ratio(largest, [max(each["server_rss_bytes"]) for each in theirs]),
        "largest_loss_difference": max(abs(a - b) for a, b in losses),
        "refused": refused,
        "load_average": load_average(),
    }
    is_same = row["largest_loss_difference"] <= 1e-3 and not refused  # one that Flower leaves out changes a loss
    target = "wall_ratio and memory_ratio at most 1, largest_loss_difference at most 0.001, nobody refused"
    return judged(row["part"], row, target, is_same and max(row["wall_ratio"].median, row["memory_ratio"].median) <= 1)


def many_sites(project: FederatedBenchProjectSettings, folder: Path) -> Row:
    """Growth of the server's memory from round to round with many sites, and the figures of a site and round."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    data = folder.with_suffix(".jsonl")
    with data.open("w", encoding="utf-8") as file:
        for number in range(project.lines_of_many_sites):
            example = {"prompt": f"What is {number} times {number}?", "response": f"It is {number * number}."}
            file.write(json.dumps(example) + "\n")
    overrides = [*project.many_sites, "project.data.source=jsonl", override("project.data.path", data)]
    figures = simulate(overrides, folder, project.run_timeout_seconds)
    rounds = rounds_of(folder)
    late = rounds[len(rounds) // 2 :]
    slope = float(np.polyfit([row["step"] for row in late], [row["server_rss_bytes"] for row in late], 1)[0])
    sites = [site for row in rounds for site in row["by_site"].values()]
    row: Row = {
        "part": "many_sites",
        "overrides": project.many_sites,
        "num_clients": figures["num_clients"],
        "rounds_completed": figures["rounds_completed"],
        "sites_asked": len(sites),
        "refused": len(figures["refused"]),
        "wall_seconds": figures["wall_seconds"],
        "server_rss_bytes": [each["server_rss_bytes"] for each in rounds],
        "bytes_a_round": slope,
        **{f"{name}_of_a_site": Sample.of([site[name] for site in sites]) for name in SITE_FIGURES},
        "load_average": load_average(),
    }
    holds = slope < 0.5e6 and not figures["refused"]
    return judged(row["part"], row, "bytes_a_round below 500,000, nobody refused", holds)


def comparison(project: FederatedBenchProjectSettings, folder: Path) -> Row:
    """Held-out perplexity of a federation relative to central training, per seed."""
    seeds = [compared(project, seed, folder) for seed in project.compare_seeds]
    row: Row = {"part": "comparison", "overrides": project.compare, "seeds": seeds}
    row["perplexity_ratio"] = Sample.of([seed["perplexity_ratio"] for seed in seeds])
    holds = all(abs(seed["perplexity_ratio"] - 1) <= 0.02 for seed in seeds)
    return judged(row["part"], row, "perplexity_ratio of every seed within 2 %", holds)


def compared(project: FederatedBenchProjectSettings, seed: int, folder: Path) -> Row:
    """One seed, federated and central."""
    federated, central = (
        simulate(
            [*project.compare, f"seed={seed}", f"project.baseline={baseline}"],
            folder / f"{baseline}-{seed}",
            project.run_timeout_seconds,
        )
        for baseline in ("none", "central")
    )
    return {
        "seed": seed,
        "perplexity_before": math.exp(central["eval_loss_before"]),
        "perplexity_federated": math.exp(federated["eval_loss_after"]),
        "perplexity_central": math.exp(central["eval_loss_after"]),
        "perplexity_ratio": math.exp(federated["eval_loss_after"] - central["eval_loss_after"]),
        "untrained_ratio": math.exp(central["eval_loss_before"] - central["eval_loss_after"]),
    }


def simulate(overrides: Sequence[str], folder: Path, timeout_seconds: float) -> dict[str, Any]:
    """The last line of one `simulations/fed_sim.py`, run as a separate process. CalledProcessError when it fails."""
    log.info("running simulations.fed_sim %s", " ".join(overrides))
    return run_to_end("simulations.fed_sim", overrides, folder, timeout_seconds)[1]


main = entry.command("fed_bench", FederatedBenchSettings, run)

if __name__ == "__main__":
    main()
