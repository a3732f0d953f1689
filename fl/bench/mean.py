"""Benchmarks of the right mean: `python -m fl.bench.mean`; sizes in conf/fed_mean_bench.yaml.

svd         the best part of a sum of products (`fl.aggregation.rules`), from the replies of many sites to the next
            adapter of one module, on one thread; compared with the decomposition of the dense sum, in the same run.

`load_average` says how quiet the machine was.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from fl.adapters import Adapter, AdapterIndex, PackedAdapter
from fl.aggregation.parts import A, B, factors_of
from fl.aggregation.rules import Aggregator, make_aggregator
from fl.bench.settings import FederatedMeanBenchSettings, MeanBenchProjectSettings
from fl.settings import Aggregation, WireDtype
from lab.bench import Row, Sample, judged, pinned, run_parts
from lab.command import entry

Result = TypeVar("Result")

MODULE = "base_model.model.layer"


def run(settings: FederatedMeanBenchSettings, place: entry.Run) -> dict[str, Any]:
    """Measure the parts that are asked for; write the report and return it for the last line."""
    project = settings.project
    return run_parts(
        "fed_mean",
        {"svd": svd},
        project.parts,
        one_thread(project),
        settings=settings,
        place=place,
        report=Path(project.report),
    )


@contextmanager
def one_thread(project: MeanBenchProjectSettings) -> Iterator[MeanBenchProjectSettings]:
    """The settings, while this process has one core and one thread."""
    torch.set_num_threads(1)
    with pinned(0):
        yield project


def svd(project: MeanBenchProjectSettings) -> Row:
    """Time and error of the factored decomposition, next to the dense one."""
    width, rank, sites = project.width, project.rank, project.sites
    sent = new_adapter(width, rank, 0)
    replies = [trained(sent, 1 + site) for site in range(sites)]
    timed = [seconds_of(lambda: next_adapter(sent, replies)) for _ in range(1 + project.turns)][1:]
    state = timed[0][1].unpack()
    dense = sum((1 / sites) * product(reply) for reply in replies)
    assert isinstance(dense, torch.Tensor)
    dense_seconds, values = seconds_of(lambda: torch.linalg.svd(dense, full_matrices=False)[1])
    tail = float(values[rank:].norm())
    error = abs(float(torch.linalg.norm(dense - product(state))) - tail) / tail
    row: Row = {
        "width": width,
        "rank": rank,
        "sites": sites,
        "factored_seconds": Sample.of([seconds for seconds, _ in timed]),
        "dense_seconds": dense_seconds,
        "speed": Sample.of([dense_seconds / seconds for seconds, _ in timed]),
        "tail_error": error,
    }
    holds = row["factored_seconds"].median < 0.5 and row["speed"].median >= 20 and error <= 1e-4
    return judged("svd", row, "factored_seconds below 0.5, speed at least 20, tail_error at most 1e-4", holds)


def new_adapter(width: int, rank: int, seed: int) -> dict[str, torch.Tensor]:
    """A new adapter of one square module."""
    A_RI = torch.randn(rank, width, generator=torch.Generator().manual_seed(seed)) / width**0.5
    return {f"{MODULE}{A}weight": A_RI, f"{MODULE}{B}weight": torch.zeros(width, rank)}


def trained(sent: Adapter, seed: int) -> dict[str, torch.Tensor]:
    """A site's reply: what it was sent, changed everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return {name: x + 0.02 * torch.randn(x.shape, generator=generator) for name, x in sent.items()}


def product(state: Adapter) -> torch.Tensor:
    """B A, dense, in float64."""
    B_OR, A_RI = factors_of(state, MODULE)
    return B_OR.double() @ A_RI.double()


def next_adapter(sent: Adapter, replies: list[dict[str, torch.Tensor]]) -> PackedAdapter:
    """What the server does with the replies of a round, from packed adapters to a packed adapter."""
    aggregator: Aggregator = make_aggregator(
        Aggregation.svd,
        index := AdapterIndex.of(sent, WireDtype.float32),
        rank=len(factors_of(sent, MODULE)[1]),
        scale=1.0,
        site_ranks=(),
        residual_rank=0,
        fresh=lambda server_round: sent,
    )
    total = aggregator.begin(1, PackedAdapter.pack(sent, index))
    for site, reply in enumerate(replies):
        total.fold(PackedAdapter.pack(reply, index), site, 1)
    return total.result()


def seconds_of(work: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds that `work` takes, and its result."""
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


main = entry.command("fed_mean_bench", FederatedMeanBenchSettings, run)

if __name__ == "__main__":
    main()
