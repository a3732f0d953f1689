"""The report of a run: its history round by round, and the figures of its last line."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fl.aggregation.exact import MetricMean
from fl.rounds import ClientRow, RoundReport, RunReport
from lab.device import peak_rss_bytes
from lab.learning.counts import Counts


@dataclass(frozen=True, kw_only=True)
class RoundFigures:
    """The state after one round; round 0 is the state before the first."""

    round: int
    eval_loss: float | None
    """Held-out loss of this round's adapter, weighted mean over `eval_sites`; None if there are none."""
    client_losses: dict[int, float]
    """Held-out loss per client that was asked and has a held-out part."""
    eval_sites: list[int]
    """The sites in that mean. First and last state have the same sites, so that they can be compared."""
    train_loss: float | None = None
    train_seconds: dict[int, float] = field(default_factory=dict)
    """Seconds that each client trained."""
    uplink_bytes: int = 0
    downlink_bytes: int = 0
    messages: int = 0
    """Clients that were sent a message."""
    replies: int = 0
    """Clients whose reply was folded in; `uplink_bytes` are theirs."""
    round_seconds: float = 0.0
    aggregate_seconds: float = 0.0
    late: int = 0
    """Replies to earlier rounds, which were dropped."""
    refused: list[str] = field(default_factory=list)


def history(reports: Sequence[RoundReport], run: RunReport) -> list[RoundFigures]:
    """States 0..R. Clients evaluate the adapter that they receive, so a report has the loss from before its round."""
    rows = [*(report.clients for report in reports), run.clients]
    both = {row.site for row in _measured(rows[0])} & {row.site for row in _measured(rows[-1])}
    sites = [{row.site for row in _measured(asked)} for asked in rows]
    sites[0] = sites[-1] = both
    states = [
        RoundFigures(
            round=0, eval_loss=mean_loss(rows[0], both), client_losses=_losses(rows[0]), eval_sites=sorted(both)
        )
    ]
    for report, after, asked in zip(reports, rows[1:], sites[1:], strict=True):
        states.append(
            RoundFigures(
                round=report.round,
                eval_loss=mean_loss(after, asked),
                client_losses=_losses(after),
                eval_sites=sorted(asked),
                train_loss=report.train["train_loss"],
                train_seconds={row.site: row.train["train_seconds"] for row in report.clients},
                uplink_bytes=report.uplink_bytes,
                downlink_bytes=report.downlink_bytes,
                messages=len(report.clients) + len(report.refused) + report.unused,
                replies=len(report.clients),
                round_seconds=report.round_seconds,
                aggregate_seconds=report.aggregate_seconds,
                late=report.late,
                refused=[f"node {refusal.node_id}: {refusal.reason}" for refusal in report.refused],
            )
        )
    return states


def summary(
    states: Sequence[RoundFigures], adapter_bytes: int, adapter_path: Path, plots: list[Path]
) -> dict[str, Any]:
    """Figures of the last line from a history; bytes per client and round are means over messages."""
    rounds = states[1:]
    sent = max(1, sum(state.messages for state in rounds))  # central training sends nothing
    folded = max(1, sum(state.replies for state in rounds))
    return {
        "rounds_completed": len(rounds),
        "adapter_bytes": adapter_bytes,
        "uplink_bytes_per_client_round": round(sum(state.uplink_bytes for state in rounds) / folded),
        "downlink_bytes_per_client_round": round(sum(state.downlink_bytes for state in rounds) / sent),
        "eval_loss_before": states[0].eval_loss,
        "eval_loss_after": states[-1].eval_loss,
        "eval_sites": states[-1].eval_sites,
        "sites_before": site_losses(states[0]),
        "sites_after": site_losses(states[-1]),
        "eval_loss_by_round": [state.eval_loss for state in rounds],
        "train_loss_by_round": [state.train_loss for state in rounds],
        "train_seconds": sum(sum(state.train_seconds.values()) for state in rounds),
        "aggregate_seconds": sum(state.aggregate_seconds for state in rounds),
        "late_replies": sum(state.late for state in rounds),
        "refused": [line for state in rounds for line in state.refused],
        "peak_rss_bytes": peak_rss_bytes(),
        "adapter_path": adapter_path,
        "plots": plots,
    }


@dataclass(frozen=True, kw_only=True)
class SiteLosses:
    """Held-out losses of one state, site by site, each site counting as one whatever its size."""

    by_site: dict[str, float]
    median: float | None
    worst_tenth: float | None
    """The best loss among the worst tenth of the sites (nearest rank): the 10th percentile, counted from the worst."""
    worst: float | None
    worst_site: str | None


def site_losses(state: RoundFigures) -> SiteLosses:
    """The losses of the sites in the state's mean; None where there are none."""
    found = {site: state.client_losses[site] for site in state.eval_sites}
    falling = sorted(found, key=lambda site: (-found[site], site))
    return SiteLosses(
        by_site={str(site): loss for site, loss in found.items()},
        median=statistics.median(found.values()) if found else None,
        worst_tenth=found[falling[math.ceil(len(found) / 10) - 1]] if found else None,
        worst=found[falling[0]] if found else None,
        worst_site=str(falling[0]) if found else None,
    )


def mean_loss(rows: Sequence[ClientRow], sites: set[int]) -> float | None:
    """Weighted mean of the held-out loss over the `rows` of `sites`; None when there are none."""
    mean = MetricMean()
    for row in rows:
        if row.site in sites:
            mean.fold({"eval_loss": row.evaluate["eval_loss"]}, row.evaluate_weight)
    return mean.means().get("eval_loss")


def counts_of(rows: Sequence[ClientRow]) -> dict[str, Counts]:
    """Counts of the lines of each site that sent them."""
    return {str(row.site): row.counts for row in rows if row.counts is not None}


def _measured(rows: Sequence[ClientRow]) -> list[ClientRow]:
    return [row for row in rows if "eval_loss" in row.evaluate]


def _losses(rows: Sequence[ClientRow]) -> dict[int, float]:
    return {row.site: row.evaluate["eval_loss"] for row in _measured(rows)}
