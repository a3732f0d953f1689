"""The baseline of a federation: the same number of steps on the union of its data, in one place.

R rounds x H steps at batch N x b, for the N clients of a round, on the same examples, schedule and seed, with one
optimizer that keeps its state.
"""

import time
from dataclasses import replace
from typing import Any

from fl.adapters import AdapterIndex, load_into, read_from
from fl.aggregation.exact import MetricMean
from fl.checkpoint import latest_adapter
from fl.client import Base, open_base, read_all, weight_of
from fl.report import RoundFigures
from fl.server import SiteLog, adapter_folders, first_adapter, run_result
from fl.settings import FederatedProjectSettings, FederatedSettings
from lab.command.entry import Run
from lab.files import require_writable
from lab.learning.examples import Example, Split, batches
from lab.learning.training import adamw, derive_seed, evaluate, train_steps
from lab.models.sources import load_tokenizer_only
from lab.settings import OptimizationSettings
from lab.tracking import Tracker, progress


def train_centrally(settings: FederatedSettings, place: Run) -> dict[str, Any]:
    """Train in this process and return the figures of the last line, the same as those of a federated run."""
    begin = time.perf_counter()
    project = settings.project
    require_writable(place.folder, "hydra.run.dir")
    splits = read_all(settings, load_tokenizer_only(settings.model))
    base = open_base(settings)
    sites = SiteLog(settings)
    initial = first_adapter(settings)
    load_into(base.model, initial)
    folders = adapter_folders(settings, place)
    optimization = union_batches(project.optimization, project.asked)
    optimizer = adamw(base.model, optimization)
    everything: list[Example] = [example for split in splits for example in split.train]
    order = batches(everything, optimization.batch_size, derive_seed(settings.seed, "order", "central"))
    states = [state(0, base, splits, project)]
    place.so_far = lambda: {
        "rounds_completed": len(states) - 1,
        "train_loss_by_round": [after.train_loss for after in states[1:]],
        "eval_loss_by_round": [after.eval_loss for after in states[1:]],
        "adapter_path": latest_adapter(folders.root),
    }
    with Tracker(settings, "fed_learn", place.folder) as tracker:
        with progress("round", project.rounds, settings.tracking.progress) as advance:
            for number in range(1, project.rounds + 1):
                figures = train_steps(
                    base.model,
                    order,
                    optimization,
                    first_step=(number - 1) * project.local_steps,
                    total_steps=project.rounds * project.local_steps,
                    steps=project.local_steps,
                    seed=derive_seed(settings.seed, "dropout", number, "central"),
                    optimizer=optimizer,
                )
                after = state(number, base, splits, project)
                states.append(replace(after, train_loss=figures.loss, train_seconds={0: figures.seconds}))
                losses = {"train_loss": figures.loss, "eval_loss": after.eval_loss or 0.0}
                written = folders.write(number, read_from(base.model), losses)
                new = sites.add({str(index): split.counts for index, split in enumerate(splits)}) if number == 1 else {}
                tracker.log(number, **losses, **({"sites": new} if new else {}))
                advance(", ".join(f"{name} {value:.4f}" for name, value in losses.items()))
        index = AdapterIndex.of(initial, project.wire_dtype)
        result = run_result(settings, place, states, index, written, sites.counts)
        result |= {"wall_seconds": time.perf_counter() - begin, "report": None}
        tracker.result(result)
    return result


def union_batches(optimization: OptimizationSettings, num_clients: int) -> OptimizationSettings:
    """Batch N x b as N times the accumulation: the same gradient in the memory of one client."""
    return replace(optimization, accumulation=optimization.accumulation * num_clients)


def state(number: int, base: Base, splits: list[Split], project: FederatedProjectSettings) -> RoundFigures:
    """Held-out loss of the model in its present state, per client and weighted as in a federation."""
    losses = {}
    mean = MetricMean()
    for index, split in enumerate(splits):
        if split.held_out:
            losses[index] = evaluate(base.model, split.held_out, project.optimization.batch_size)
            mean.fold({"eval_loss": losses[index]}, weight_of(split.held_out, project.weighting))
    return RoundFigures(
        round=number, eval_loss=mean.means()["eval_loss"], client_losses=losses, eval_sites=sorted(losses)
    )
