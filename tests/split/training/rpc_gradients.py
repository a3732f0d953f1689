"""Gradients over torch's RPC beside those of the whole model, each group in processes of its own.

`python -m tests.split.training.rpc_gradients FOLDER` prints a JSON line a case. It forks before torch has started a
thread, so that a group is up in a second.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.rpc as torch_rpc
from torch import Tensor

from lab.command.entry import compose_settings
from lab.settings import Dtype, ModelSettings, NetworkSettings
from split.chain.open import free_port
from split.training.autograd import AutogradBackward, AutogradRpcShard
from split.training.messages import Apply, Recipe
from split.training.schedule import Schedule
from split.training.settings import SplitTrainSettings
from split.training.trainer import Backward, ExplicitBackward, Shards
from split.transport.base import ChainLost, ShardLost
from split.transport.rpc import RpcChain, serve_rpc_shard
from tests.split.training.unsplit import (
    ADAPTER,
    EVERYTHING,
    OPTIMIZATION,
    Unsplit,
    load_plain,
    model_settings,
    ranges,
    stage,
    trainer,
)


@dataclass(frozen=True)
class Case:
    """One group."""

    cuts: tuple[int, ...]
    dtype: Dtype
    backward: str = "autograd"
    recipe: Recipe = EVERYTHING
    micro_batches: int = 1
    steps_before: int = 1
    max_gradient_norm: float = 0.0
    tied: bool = False


CASES = [
    Case((0, 2, 4), Dtype.float32),
    Case((0, 1, 3, 4), Dtype.float32),
    Case((0, 2, 4), Dtype.float64),
    Case((0, 1, 3, 4), Dtype.float64, steps_before=0),
    Case((0, 1, 3, 4), Dtype.float32, micro_batches=4, steps_before=0),
    Case((0, 1, 3, 4), Dtype.float64, micro_batches=4, steps_before=0),
    Case((0, 1, 3, 4), Dtype.float64, micro_batches=4, steps_before=5, max_gradient_norm=0.5),
    Case((0, 2, 4), Dtype.float64, recipe=ADAPTER, micro_batches=2, steps_before=3),
    Case((0, 1, 3, 4), Dtype.float64, tied=True, steps_before=3),
    Case((0, 1, 3, 4), Dtype.float32, backward="explicit"),
    Case((0, 2, 4), Dtype.float32, backward="detached"),
]


class ShowingShard(AutogradRpcShard):
    """A shard that shows its gradients, and may forget to send any back."""

    detached = False
    gradient_seconds = 5.0

    def gradients(self) -> dict[str, Tensor]:
        weights = self.stage.shard.weights.items()
        return {name: weight.grad for name, weight in weights if weight.grad is not None}

    def forward(self, step: int, micro_batch: int, states: Any, *rest: Any) -> Tensor:
        if self.detached and isinstance(states, torch_rpc.PyRRef):
            states = states.to_here().detach()
        return super().forward(step, micro_batch, states, *rest)


def learner(case: Case, settings: ModelSettings, network: NetworkSettings, rank: int) -> None:
    """One member of a group."""
    layers = ranges(case.cuts)[rank - 1]
    made = stage(settings, layers, Path(settings.cache_dir), load_plain)
    member = ShowingShard(made, str(rank), 4, {"model": "tests"})
    if case.backward == "detached":
        member.detached, member.gradient_seconds = True, 0.5  # for what never comes
    serve_rpc_shard(member, rank, len(case.cuts), network)


def lead(case: Case, settings: ModelSettings, network: NetworkSettings, rank: int) -> None:
    """The trainer of a group."""
    transport = RpcChain(
        len(case.cuts), network, network.port, {"model": "tests"}, AutogradRpcShard.worker_threads, start_seconds=60.0
    )
    optimization = replace(OPTIMIZATION, max_gradient_norm=case.max_gradient_norm)

    def backward(shards: Shards) -> Backward:
        return ExplicitBackward(shards) if case.backward == "explicit" else AutogradBackward(shards, case.recipe)

    checkpoints = Path(settings.cache_dir)
    made = trainer(
        transport, checkpoints, recipe=case.recipe, optimization=optimization, micro_batches=case.micro_batches,
        backward=backward, schedule=Schedule.gpipe,
    )  # fmt: skip
    try:
        figures = [made.train_step() for _ in range(case.steps_before)]
    except ShardLost as error:
        transport.shutdown()
        print(json.dumps({"backward": case.backward, "error": str(error)}), flush=True)
        return
    if figures:
        made.save()
    found: dict[str, Tensor] = {}

    def keep(step: int, apply: Apply) -> None:
        for member in transport.members:
            found.update(member.rpc_sync().gradients())

    made._backward.apply = keep  # type: ignore[method-assign]
    figures.append(made.train_step())
    lost = ""
    try:
        transport.restore(0.0)
    except (ChainLost, ShardLost) as error:
        lost = str(error)
    transport.shutdown()

    def whole() -> Unsplit:
        return Unsplit(settings, recipe=case.recipe, optimization=optimization, micro_batches=case.micro_batches)

    theirs = whole().train(len(figures), 8)
    expected = whole().gradients(after=case.steps_before)
    missing = sorted(expected.keys() - found.keys())
    worst = max(float((found[name] - g).abs().max() / g.abs().max()) for name, g in expected.items() if name in found)
    largest = max(abs(mine.loss - other.loss) for mine, other in zip(figures, theirs, strict=True))
    norms = max(abs(mine.gradient_norm / other.gradient_norm - 1) for mine, other in zip(figures, theirs, strict=True))
    row = {
        "backward": case.backward, "shards": len(case.cuts) - 1, "dtype": case.dtype.name, "worst": worst,
        "loss_difference": largest, "norm_difference": norms, "missing": missing, "lost": lost,
        "held": figures[-1].held, "boundary_bytes": figures[-1].boundary_bytes, "tied": case.tied,
        "delta": made.weights_delta_norms, "steps_before": case.steps_before,
    }  # fmt: skip
    print(json.dumps(row), flush=True)


def run(target: Callable[..., None], case: Case, settings: ModelSettings, network: NetworkSettings, rank: int) -> None:
    torch.set_num_threads(1)
    try:
        target(case, settings, network, rank)
    except BaseException:
        traceback.print_exc()
        raise


def main(folder: Path) -> None:
    network = compose_settings("split_train", "", SplitTrainSettings).network
    context = multiprocessing.get_context("fork")
    settings = {
        (dtype, tied): model_settings(folder / f"{dtype.name}-{tied}", dtype, tied)
        for dtype in (Dtype.float32, Dtype.float64)
        for tied in (False, True)
    }
    for case in CASES:
        here = replace(network, port=free_port(), request_timeout_seconds=30.0)
        common = (case, settings[case.dtype, case.tied], here)
        members = [context.Process(target=run, args=(learner, *common, rank)) for rank in range(1, len(case.cuts))]
        members.append(context.Process(target=run, args=(lead, *common, 0)))
        for member in members:
            member.start()
        members[-1].join(60)
        for member in members[:-1]:
            member.join(10)
        for member in members:
            if member.is_alive():
                member.kill()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
