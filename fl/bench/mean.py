"""Benchmarks of the right mean: `python -m fl.bench.mean`; sizes in conf/fed_mean_bench.yaml.

svd         the best part of a sum of products (`fl.aggregation.rules`), from the replies of many sites to the next
            adapter of one module, on one thread; compared with the decomposition of the dense sum, in the same run.
            Seconds are those of the processor: what else the machine does counts little.
uplink      one reply with the update of a model's adapter as Flower serialises it, in every format, compared with the
            reply that holds the adapter in float32; from conf/model alone.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from fl.adapters import Adapter, AdapterIndex, PackedAdapter
from fl.aggregation.parts import A, B, factors_of
from fl.aggregation.rules import Aggregator, make_aggregator
from fl.bench.__main__ import adapter_of
from fl.bench.settings import FederatedMeanBenchSettings, MeanBenchProjectSettings
from fl.compression.codec import Coder
from fl.compression.messages import to_update_records
from fl.messages import message_bytes, to_records
from fl.settings import Aggregation, Codec, FederatedSettings, WireDtype
from lab.bench import Row, Sample, judged, pinned, run_parts
from lab.command import entry

Result = TypeVar("Result")

MODULE = "base_model.model.layer"


def run(settings: FederatedMeanBenchSettings, place: entry.Run) -> dict[str, Any]:
    """Measure the parts that are asked for; write the report and return it for the last line."""
    project = settings.project
    return run_parts(
        "fed_mean",
        {"svd": svd, "uplink": uplink},
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


LARGEST_SHARE = {Codec.bf16: 0.51, Codec.int8: 0.26, Codec.int4: 0.14, Codec.topk_int8: 0.08}
"""Largest size of a reply, against float32, that the formats were made for."""


def uplink(project: MeanBenchProjectSettings) -> list[Row]:
    """Bytes of one reply in every format."""
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 0  # Flower makes no message outside a run
    settings = entry.compose_settings("fed_learn", f"model={project.uplink_model}", FederatedSettings)
    adapter = adapter_of(settings.model, settings.project.lora.rank)
    index = AdapterIndex.of(adapter, WireDtype.float32)
    packed = PackedAdapter.pack(adapter, index)
    whole = message_bytes(Message(to_records(packed), 1, "train"))
    return [
        reply_bytes(Coder(codec, settings.project.compression.topk_fraction), packed, whole) for codec in LARGEST_SHARE
    ]


def reply_bytes(coder: Coder, packed: PackedAdapter, whole: int) -> Row:
    """Bytes of the reply in one format; random values, which no later layer could compress further."""
    payload = coder.encode(packed.to_float32())
    sent = message_bytes(Message(to_update_records(payload, packed.index), 1, "train"))
    most = LARGEST_SHARE[coder.codec]
    row: Row = {
        "name": coder.codec.name,
        "adapter_bytes": packed.index.tensor_bytes,
        "message_bytes": sent,
        "float32_message_bytes": whole,
        "share": sent / whole,
    }
    return judged(f"uplink {coder.codec.name}", row, f"share at most {most}", sent <= most * whole)


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
    """Seconds of the processor that `work` takes, and its result."""
    begin = time.process_time()
    result = work()
    return time.process_time() - begin, result


main = entry.command("fed_mean_bench", FederatedMeanBenchSettings, run)

if __name__ == "__main__":
    main()
