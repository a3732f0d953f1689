"""One federated run from its first adapter to its last line: strategy, checkpoints, tracking, picture.

Knows nothing about where the clients are; a Grid reaches them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.serverapp import Grid

from fl.adapters import AdapterIndex
from fl.checkpoint import AdapterFolders, BaseModel, load_adapter
from fl.plots import draw_run
from fl.report import RoundFigures, history, summary
from fl.settings import FederatedSettings
from fl.sizes import base_bytes
from fl.strategy import RoundReport, WeightedFedAvg
from lab.device import open_device, read_memory
from lab.entry import Run
from lab.environment import commit
from lab.lora import fresh_adapter, lora_config
from lab.models import load_config, model_identity
from lab.settings import UserError
from lab.tracking import Tracker, progress

log = logging.getLogger(__name__)


def serve(grid: Grid, settings: FederatedSettings, place: Run) -> dict[str, Any]:
    """Runs all rounds over `grid` and returns the figures of the last line.

    Raises RoundFailed or NodesMissing (fl/strategy.py); every finished round's adapter is on disk then.
    """
    begin = time.perf_counter()
    project, device = settings.project, open_device(settings.device)
    initial = first_adapter(settings)
    index = AdapterIndex.of(initial, project.wire_dtype)
    folders = adapter_folders(settings, place)
    written = [folders.write(0, initial, {})]
    reports: list[RoundReport] = []
    with Tracker(settings, "fed_learn", place.folder) as tracker:
        with progress("client reply", replies_expected(settings), settings.tracking.progress) as counter:

            def on_round(report: RoundReport) -> None:
                card = {
                    "train_loss": report.train["train_loss"],
                    "eval_loss_before_round": report.evaluate["eval_loss"],
                }
                written.append(folders.write(report.round, report.adapter, card))
                reports.append(replace(report, adapter={}))  # the history keeps figures, no tensors
                tracker.log(report.round, **row(report), server_rss_bytes=read_memory(device).rss_bytes)
                log.info(
                    "round %d of %d: held-out loss was %.4f",
                    report.round,
                    project.rounds,
                    card["eval_loss_before_round"],
                )

            run = strategy(settings, index).run(
                grid,
                initial,
                num_rounds=project.rounds,
                train_config={},
                evaluate_config={},
                on_round=on_round,
                on_reply=counter.advance,
            )
        figures = finish(settings, place, history(reports, run), index, written[-1])
        figures |= {"wall_seconds": time.perf_counter() - begin}
        tracker.result(figures)
    return figures


def replies_expected(settings: FederatedSettings) -> int:
    """Messages of a whole run: one a client a round, and the evaluation after the last."""
    return (settings.project.rounds + 1) * max(1, round(settings.project.fraction * settings.project.num_clients))


def row(report: RoundReport) -> dict[str, Any]:
    """One round's figures for metrics.jsonl; held-out figures are those of the adapter the round began with."""
    return {
        **report.train,
        **{f"{key}_before": value for key, value in report.evaluate.items()},
        "uplink_bytes": report.uplink_bytes,
        "downlink_bytes": report.downlink_bytes,
        "round_seconds": report.round_seconds,
        "aggregate_seconds": report.aggregate_seconds,
        "replies": len(report.clients),
        "refused": len(report.refused),
    }


def finish(
    settings: FederatedSettings, place: Run, states: Sequence[RoundFigures], index: AdapterIndex, adapter: Path
) -> dict[str, Any]:
    """Draws the picture and returns what `states` say for the last line."""
    project = settings.project
    how = "central" if project.baseline.name == "central" else f"{project.num_clients} clients"
    title = (
        f"{settings.model.name} ({settings.model.quantization.name}, {settings.model.dtype.name}), {how}, "
        f"{project.rounds} rounds, commit {commit()}"
    )
    picture = draw_run(states, title, base_bytes(settings.model), place.folder / "federated.png")
    return {
        "model": settings.model.name,
        "dtype": settings.model.dtype.name,
        "baseline": project.baseline.name,
        "num_clients": project.num_clients,
        **summary(states, index.tensor_bytes, adapter, [picture]),
    }


def strategy(settings: FederatedSettings, index: AdapterIndex) -> WeightedFedAvg:
    """The run's strategy, for our own loop or Flower's `start()`."""
    project = settings.project
    return WeightedFedAvg(
        index,
        num_clients=project.num_clients,
        fraction=project.fraction,
        seed=settings.seed,
        message_ttl_seconds=project.reply_timeout_seconds,
        register_timeout_seconds=project.node_timeout_seconds,
        poll_seconds=project.poll_seconds,
    )


def first_adapter(settings: FederatedSettings) -> dict[str, torch.Tensor]:
    """A fresh adapter, or that of `project.warm_start`."""
    if settings.project.warm_start is not None:
        folder = Path(settings.project.warm_start).expanduser()
        try:
            lora = lora_config(settings.model.lora_targets, settings.project.lora)
            return load_adapter(folder, base_model(settings), lora, load_config(settings.model))
        except UserError:
            raise
        except ValueError as error:
            raise UserError(
                f"project.warm_start must be an adapter of this run's kind, got {str(folder)!r}: {error}"
            ) from None
    return fresh_adapter(settings.model, settings.project.lora, settings.seed)


def adapter_folders(settings: FederatedSettings, place: Run) -> AdapterFolders:
    """Where the run's adapters go: one PEFT folder a round."""
    project = settings.project
    return AdapterFolders(
        place.folder / "adapters",
        lora=lora_config(settings.model.lora_targets, project.lora),
        base=base_model(settings),
        data_source=project.data.source.name,
        num_clients=project.num_clients,
        commit=commit() or "unknown",
    )


def base_model(settings: FederatedSettings) -> BaseModel:
    """What an adapter of this run belongs to."""
    return BaseModel(name=settings.model.repo or settings.model.name, digest=model_identity(settings.model))
