"""One federated run from its first adapter to its last line: strategy, checkpoints, tracking, picture.

Knows nothing about where the clients are; a Grid reaches them.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.serverapp import Grid

from fl.adapters import Adapter, AdapterIndex
from fl.aggregation.optimizer import ServerOptimizer
from fl.aggregation.rules import Aggregator, make_aggregator
from fl.checkpoint import AdapterFolders, BaseModel, load_adapter
from fl.compression.server import ServerLink
from fl.plots import draw_run
from fl.report import RoundFigures, counts_of, history, summary
from fl.rounds import RoundReport
from fl.run.page import by_site, header, line, write_run_page
from fl.run.sites import SiteRecord, SiteRecords
from fl.run.state import RoundRecord, SavedRun, drop_old_states, saved_run, write_state
from fl.settings import FederatedSettings
from fl.sizes import base_bytes
from fl.strategy import WeightedFedAvg
from lab.command.entry import Run
from lab.device import open_device, read_memory
from lab.environment import commit
from lab.files import path_of, require_writable
from lab.learning.counts import Counts
from lab.learning.training import derive_seed
from lab.models.base_model import base_name, base_origin
from lab.models.lora import fresh_adapter, lora_config
from lab.models.sources import load_config, model_identity
from lab.settings import UserError, to_plain, user_errors
from lab.tracking import Tracker, picture, progress

log = logging.getLogger(__name__)

MEASURED_PER_TRAINED = 8
"""From this number of held-out examples per training example on, evaluation takes a client longer than training: an
evaluated example takes about a third of the time."""


def serve(
    grid: Grid, settings: FederatedSettings, place: Run, stopped: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Run all rounds over `grid` and return the figures of the last line.

    Raises UserError if results cannot be written, and what `WeightedFedAvg.run` raises; by then the adapter of every
    finished round is on disk.
    """
    begin = time.perf_counter()
    require_writable(place.folder, "hydra.run.dir")
    project, device = settings.project, open_device(settings.device)
    initial, saved = starting_point(settings)
    index = AdapterIndex.of(initial, project.wire_dtype)
    known = saved.last.sites if saved else ()
    averaging, folders = strategy(settings, index, known), adapter_folders(settings, place)
    written, reports, sites = folders.root, saved.reports if saved else [], SiteLog(settings)

    def commit_round(number: int, adapter: Adapter, report: RoundReport | None, card: Mapping[str, float]) -> Path:
        record = RoundRecord(
            round=number,
            settings=to_plain(settings),
            base_digest=folders.base.digest,
            report=report,
            first_asked=averaging.first_partitions,
            sites=averaging.sites.records,
        )
        return folders.write(number, adapter, card, lambda folder: write_state(folder, record, averaging.components))

    if saved is None:
        written = commit_round(0, initial, None, {})
    else:
        saved.load_components(averaging.components)
        written = folders.adopt(saved.root)
        log.info("continuing %s after round %d of %d", project.resume, saved.last.round, project.rounds)
    for report in reports:
        sites.add(counts_of(report.clients))
    first_here = len(reports) + 1
    place.so_far = lambda: so_far(reports, written, sites.counts)
    log.info("the mean is weighted by each client's number of %s", project.weighting.words)
    # One reply per client and round, and one to the evaluation after the last round.
    replies = (project.rounds + 1 - len(reports)) * max(1, round(project.fraction * project.num_clients))
    with Tracker(settings, "fed_learn", place.folder) as tracker:
        for report in reports:
            tracker.log(report.round, **row(report))
        with progress("client reply", replies, settings.tracking.progress) as advance:

            def on_round(report: RoundReport) -> None:
                nonlocal written
                kept = replace(report, adapter={}, server_rss_bytes=read_memory(device).rss_bytes)
                card = {"train_loss": report.train["train_loss"]}
                card |= {f"{name}_before_round": report.evaluate[name] for name in ("eval_loss",) if report.evaluate}
                written = commit_round(report.round, report.adapter, kept, card)
                drop_old_states(folders.root)
                reports.append(kept)
                new = sites.add(counts_of(report.clients))
                tracker.log(report.round, **row(kept), **({"sites": new} if new else {}))
                if len(reports) == first_here:
                    log.info("table of rounds: %s", header())
                log.info("round %d of %d: %s", report.round, project.rounds, line(kept))

            run = averaging.run(
                grid,
                initial,
                num_rounds=project.rounds,
                finished_rounds=len(reports),
                first_asked=saved.last.first_asked if saved else (),
                on_round=on_round,
                on_reply=advance,
                stopped=stopped,
            )
        sites.add(counts_of(run.clients))
        states = history(reports, run)
        figures = run_result(settings, place, states, index, written, sites.counts)
        figures |= {"wall_seconds": time.perf_counter() - begin}
        title = f"Federation of {project.num_clients} sites, {project.rounds} rounds, {settings.model.name}"
        records = averaging.sites.records
        page = picture(lambda: write_run_page(place.folder, title, figures, reports, states, records))
        figures |= {"report": page[0] if page else None}
        tracker.result(figures)
    return figures


def so_far(reports: Sequence[RoundReport], adapter: Path, sites: Mapping[str, Counts]) -> dict[str, Any]:
    """Figures of the last line if the run ends early."""
    return {
        "rounds_completed": len(reports),
        "train_loss_by_round": [report.train["train_loss"] for report in reports],
        # Each round evaluates the adapter from before it.
        "eval_loss_by_round": [report.evaluate["eval_loss"] for report in reports[1:] if report.evaluate],
        "adapter_path": adapter,
        "sites": sites,
    }


class SiteLog:
    """Logs the counts of each site's lines once; `counts` has those of all sites."""

    def __init__(self, settings: FederatedSettings) -> None:
        self.counts: dict[str, Counts] = {}
        self._settings = settings

    def add(self, found: Mapping[str, Counts]) -> dict[str, Counts]:
        """Log the counts that are new or have changed, and return them by site."""
        new = {name: counts for name, counts in found.items() if self.counts.get(name) != counts}
        data = self._settings.project.data
        for name, counts in new.items():
            log.info("client %s: %s", name, counts.line())
            for warning in counts.warnings(data.sequence_length):
                log.warning("client %s: %s", name, warning)
            if not counts.examples_held_out:
                log.warning("client %s has no held-out part (project.data.held_out_fraction) to be measured", name)
        self._say_what_measuring_costs(new)
        self.counts |= new
        return new

    def _say_what_measuring_costs(self, new: Mapping[str, Counts]) -> None:
        project = self._settings.project
        trained = project.local_steps * project.optimization.batch_size * project.optimization.accumulation
        most = max((counts.examples_held_out for counts in new.values()), default=0)
        if most > MEASURED_PER_TRAINED * trained:
            line = "a client measures up to %d held-out examples a round and trains on %d: %s caps the former"
            log.info(line, most, trained, "project.data.max_held_out")


def row(report: RoundReport) -> dict[str, Any]:
    """One round's figures for metrics.jsonl; held-out figures are of the adapter from before the round."""
    return {
        **report.train,
        **{f"{key}_before": value for key, value in report.evaluate.items()},
        "uplink_bytes": report.uplink_bytes,
        "downlink_bytes": report.downlink_bytes,
        "round_seconds": report.round_seconds,
        "aggregate_seconds": report.aggregate_seconds,
        **report.ledger,
        "server_rss_bytes": report.server_rss_bytes,
        "replies": len(report.clients),
        "refused": len(report.refused),
        "late": report.late,
        "by_site": by_site(report.clients),
        "unused": report.unused,
        **({"left_out": report.left_out} if report.left_out else {}),
    }


def run_result(
    settings: FederatedSettings,
    place: Run,
    states: Sequence[RoundFigures],
    index: AdapterIndex,
    adapter: Path,
    sites: Mapping[str, Counts],
) -> dict[str, Any]:
    """Draw the picture, and return the figures of the last line."""
    project = settings.project
    how = "central" if project.baseline.name == "central" else f"{project.num_clients} clients"
    title = (
        f"{settings.model.name} ({settings.model.quantization.name}, {settings.model.dtype.name}), {how}, "
        f"{project.rounds} rounds, commit {commit()}"
    )
    plots = picture(lambda: draw_run(states, title, base_bytes(settings.model), place.folder / "federated.png"))
    return {
        "model": settings.model.name,
        "dtype": settings.model.dtype.name,
        "baseline": project.baseline.name,
        "num_clients": project.num_clients,
        "weighting": project.weighting.name,
        "sites": sites,
        **summary(states, index.tensor_bytes, adapter, plots),
    }


def strategy(
    settings: FederatedSettings, index: AdapterIndex, known_sites: Sequence[SiteRecord] = ()
) -> WeightedFedAvg:
    """The strategy of the run, for our own loop or Flower's `start()`; `known_sites` are those of a continued run."""
    project = settings.project
    rule, link = aggregator(settings, index), ServerLink(project.compression) if project.remembers else None
    components = {"aggregation": rule} if rule.has_state else {}
    return WeightedFedAvg(
        index,
        num_clients=project.num_clients,
        fraction=project.fraction,
        seed=settings.seed,
        message_ttl_seconds=project.reply_timeout_seconds,
        register_timeout_seconds=project.node_timeout_seconds,
        poll_seconds=project.poll_seconds,
        quorum=project.quorum,
        oversample=project.oversample,
        deadline_seconds=math.inf if project.round_deadline_seconds is None else project.round_deadline_seconds,
        sites=SiteRecords(project.max_failures, project.pause_rounds, known_sites),
        aggregator=rule,
        link=link,
        components={**components, "compression": link} if link else components,
    )


def aggregator(settings: FederatedSettings, index: AdapterIndex) -> Aggregator:
    """The run's rule from replies to the next adapter."""
    project = settings.project

    def fresh(server_round: int) -> dict[str, torch.Tensor]:
        seed = derive_seed(settings.seed, "adapter", server_round) if server_round else settings.seed
        return fresh_adapter(settings.model, project.lora, seed)

    return make_aggregator(
        project.aggregation,
        index,
        rank=project.lora.rank,
        scale=project.lora.scale,
        site_ranks=project.site_ranks,
        residual_rank=project.residual_rank,
        fresh=fresh,
        optimizer=ServerOptimizer.of(project.server_optimizer),
        share=project.share,
    )


def starting_point(settings: FederatedSettings) -> tuple[Adapter, SavedRun | None]:
    """The adapter that the next round begins with, and the run that is continued, if one is.

    UserError for `project.resume` and `project.warm_start` that do not fit the settings.
    """
    saved = saved_run(settings, model_identity(settings.model))
    if saved is None:
        return first_adapter(settings), None
    return adapter_of_run(settings, saved.folder, "project.resume"), saved


def first_adapter(settings: FederatedSettings) -> dict[str, torch.Tensor]:
    """A new adapter, or that of `project.warm_start`."""
    if settings.project.warm_start is not None:
        folder = path_of(settings.project.warm_start, "project.warm_start")
        return adapter_of_run(settings, folder, "project.warm_start")
    return fresh_adapter(settings.model, settings.project.lora, settings.seed)


def adapter_of_run(settings: FederatedSettings, folder: Path, key: str) -> dict[str, torch.Tensor]:
    """The adapter in a folder that `key` names. UserError if it is not of this run's kind."""
    with user_errors(f"{key} must be an adapter of this run's kind, got {str(folder)!r}: "):
        lora = lora_config(settings.model.lora_targets, settings.project.lora)
        more_rows = settings.project.aggregation.takes_ranks and key == "project.resume"
        return load_adapter(folder, base_model(settings), lora, load_config(settings.model), key, more_rows=more_rows)


def adapter_folders(settings: FederatedSettings, place: Run) -> AdapterFolders:
    """One PEFT folder per round for the run's adapters. UserError if the folder has those of another run."""
    project, root = settings.project, place.folder / "adapters"
    if next(root.glob("round-*"), None) is not None:
        raise UserError(f"hydra.run.dir must be a folder without another run's adapters, got {str(place.folder)!r}")
    return AdapterFolders(
        root,
        lora=lora_config(settings.model.lora_targets, project.lora),
        base=base_model(settings),
        data_source=project.data.source.name,
        num_clients=project.num_clients,
        weighting=project.weighting.words,
        commit=commit() or "unknown",
    )


def base_model(settings: FederatedSettings) -> BaseModel:
    """The base model of this run's adapters."""
    return BaseModel(
        name=base_name(settings.model), digest=model_identity(settings.model), origin=base_origin(settings.model)
    )
