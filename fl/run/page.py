"""A run for people: a table that grows with every round, and one HTML page with pictures at its end."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fl.report import RoundFigures, SiteLosses
from fl.rounds import ClientRow, RoundReport
from fl.run.sites import SiteRecord
from lab.page import Section, write_page

MEGA = 1e6
COLUMNS = ("held-out loss before", "train loss", "replies", "late", "up MB", "down MB", "seconds", "server MB")
PAGE = "report.html"


def cells(report: RoundReport) -> list[str]:
    """One round's values of `COLUMNS`."""
    asked = len(report.clients) + len(report.refused) + report.unused
    loss = report.evaluate.get("eval_loss")
    return [
        "none" if loss is None else f"{loss:.4f}",
        f"{report.train['train_loss']:.4f}",
        f"{len(report.clients)} of {asked}",
        str(report.late),
        f"{report.uplink_bytes / MEGA:.1f}",
        f"{report.downlink_bytes / MEGA:.1f}",
        f"{report.round_seconds:.1f}",
        f"{report.server_rss_bytes / MEGA:.0f}",
    ]


def header() -> str:
    """The line above the rows of the live table."""
    return "  ".join(COLUMNS)


def line(report: RoundReport) -> str:
    """One round as a row below `header`."""
    return "  ".join(value.rjust(len(name)) for name, value in zip(COLUMNS, cells(report), strict=True))


def by_site(rows: Sequence[ClientRow]) -> dict[str, dict[str, float]]:
    """Bytes, seconds, memory and loss of each site in one round, by the site's number."""
    names = {"train_seconds", "eval_seconds", "eval_loss", "train_loss", "peak_rss_bytes"}
    return {
        str(row.site): {
            "uplink_bytes": row.uplink_bytes,
            "downlink_bytes": row.downlink_bytes,
            **{name: value for name, value in (row.train | row.evaluate).items() if name in names},
        }
        for row in rows
    }


def write_run_page(
    folder: Path,
    title: str,
    figures: Mapping[str, Any],
    reports: Sequence[RoundReport],
    states: Sequence[RoundFigures],
    sites: Sequence[SiteRecord],
) -> Path:
    """Write `report.html`: the result, its pictures, a table of the rounds and one of the sites."""
    shown = ("eval_loss_before", "eval_loss_after", "wall_seconds", "late_replies", "adapter_path")
    facts = {name: figures[name] for name in shown if name in figures}
    refused = [[number, text] for number, text in _refusals(states)]
    sections = [
        Section(title="Result", facts=facts, pictures=[Path(plot) for plot in figures.get("plots", [])]),
        Section(
            title="Rounds",
            header=("round", *COLUMNS, "left out"),
            rows=[[report.round, *cells(report), ", ".join(report.left_out)] for report in reports],
        ),
        Section(title="Sites", header=SITE_COLUMNS, rows=_site_rows(reports, sites)),
        Section(
            title="How evenly the sites are served",
            text="Held-out losses, each site counting once. Nine sites in ten stay below the worst tenth, or reach it.",
            header=("", "median", "worst tenth", "worst", "worst site"),
            rows=[
                ["before" if name == "sites_before" else "after", *_spread(figures[name])]
                for name in ("sites_before", "sites_after")
                if name in figures and figures[name].worst is not None
            ],
        ),
        *([Section(title="Refused", header=("round", "why"), rows=refused)] if refused else []),
    ]
    return write_page(folder / PAGE, title, sections)


SITE_COLUMNS = (
    *("site", "rounds", "first loss", "last loss", "up MB", "down MB", "training seconds", "evaluation seconds"),
    *("peak MB", "failed rounds", "late replies"),
)


def _site_rows(reports: Sequence[RoundReport], sites: Sequence[SiteRecord]) -> list[list[Any]]:
    rows: dict[int, list[ClientRow]] = {}
    for report in reports:
        for row in report.clients:
            rows.setdefault(row.site, []).append(row)
    records = {record.node_id if record.partition is None else record.partition: record for record in sites}
    table = []
    for site in sorted(rows.keys() | records.keys()):
        parts, record = rows.get(site, []), records.get(site)
        losses = [row.evaluate["eval_loss"] for row in parts if "eval_loss" in row.evaluate]
        peak = max((row.train.get("peak_rss_bytes", 0.0) for row in parts), default=0.0)
        table.append([
            site,
            len(parts),
            *([f"{losses[0]:.4f}", f"{losses[-1]:.4f}"] if losses else ["", ""]),
            f"{sum(row.uplink_bytes for row in parts) / MEGA:.1f}",
            f"{sum(row.downlink_bytes for row in parts) / MEGA:.1f}",
            f"{sum(row.train.get('train_seconds', 0.0) for row in parts):.1f}",
            f"{sum(row.evaluate.get('eval_seconds', 0.0) for row in parts):.1f}",
            f"{peak / MEGA:.0f}",
            record.failures if record else 0,
            record.late if record else 0,
        ])  # fmt: skip
    return table


def _spread(losses: SiteLosses) -> list[str]:
    found = (losses.median, losses.worst_tenth, losses.worst)
    return [*(f"{loss:.4f}" for loss in found if loss is not None), str(losses.worst_site)]


def _refusals(states: Sequence[RoundFigures]) -> list[tuple[int, str]]:
    return [(state.round, text) for state in states for text in state.refused]
