"""What a sweep leaves in its folder: sweep.json, results.csv, plots/, report.html. Reads JSON only, runs nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab.figures import number
from lab.files import write_whole
from lab.matrix.plots import draw_sweep
from lab.matrix.settings import SweepSettings
from lab.matrix.table import Metric, Row, Table
from lab.page import Section, write_page
from lab.settings import UserError

Document = Mapping[str, Any]


_LEGEND = "Yellow is good. Hatched cells failed, and say why."
_LEGEND_OF_RATIOS = " Ratios are this sweep's median over the other's: green is better than the other, brown is worse."


def load_sweep(key: str, folder: str) -> Document:
    """The sweep.json of a sweep's folder. UserError, naming the setting `key`, when there is none with results."""
    file = Path(folder).expanduser() / "sweep.json"
    try:
        document: Document = json.loads(file.read_text(encoding="utf-8"))
        if document["results"] and document["sweep"]["metrics"]:
            return document
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{key} must be the folder of a sweep, with the results in its sweep.json, got {folder!r}")


def draw(document: Document, folder: Path, settings: SweepSettings, other: Document | None) -> dict[str, Any]:
    """Writes everything; the figures of the last line."""
    table = Table.of(document)
    write_whole(folder / "sweep.json", json.dumps(document, indent=1) + "\n")
    write_whole(folder / "results.csv", table.csv())
    beside = None if other is None else Table.of(other)
    plots = draw_sweep(table, folder / "plots", settings.lines_from, beside)
    report = write_page(folder / "report.html", f"Matrix: {table.sweep['name']}", sections_of(table, plots, beside))
    failed = len(table.failures)
    return {
        "cells": len(table.rows),
        "ok": len(table.rows) - failed,
        "failed": failed,
        "rows": table.figures(),
        "failures": [_failure(row) for row in table.failures],
        "sweep": folder / "sweep.json",
        "results_csv": folder / "results.csv",
        "plots": plots,
        "report": report,
    }


def sections_of(table: Table, plots: list[Path], other: Table | None) -> list[Section]:
    """The report: setup, pictures, table, failures, commands."""
    sweep = table.sweep
    setup = {
        "command": f"python run_matrix.py {' '.join(sweep['asked'])}".strip(),
        "model": sweep["model"],
        "device": sweep["device"],
        "commit": sweep["commit"],
        "date": sweep["date"],
        **{table.label(axis): ", ".join(map(str, table.values(axis))) for axis in sweep["axes"]},
        "runs of each cell": sweep["repeats"],
        "launcher": sweep["launcher"],
    }
    if other is not None:
        setup["compared with"] = f"{other.sweep['model']} on {other.sweep['device']}, commit {other.sweep['commit']}"
    sections = [
        Section(title="Setup", facts=setup),
        Section(title="Pictures", pictures=plots, text=_LEGEND + (_LEGEND_OF_RATIOS if other else "")),
        _figures(table),
    ]
    if table.failures:
        rows = [[*row.point.values(), *_why(row)] for row in table.failures]
        header = [*map(table.label, sweep["axes"]), "failure", "what it said"]
        sections.append(Section(title="Cells that failed", header=header, rows=rows))
    commands = [row.command for row in table.rows]
    return [*sections, Section(title="The command of each cell", commands=commands)]


def _figures(table: Table) -> Section:
    header = [*map(table.label, table.sweep["axes"]), *(metric.label for metric in table.metrics), "n", "seconds"]
    rows = [
        [
            *row.point.values(),
            *(_figure(row, metric) for metric in table.metrics),
            len(row.results),
            number(sum(result["seconds"] for result in row.results)),
        ]
        for row in table.rows
    ]
    text = "Median of n runs, with the smallest and largest where there are several."
    return Section(title="Figures", header=header, rows=rows, text=text)


def _figure(row: Row, metric: Metric) -> str:
    sample = row.sample(metric)
    if sample is None:
        return row.failed["failure"] if row.failed else "–"
    low, middle, high = (number(value * metric.scale) for value in (sample.low, sample.median, sample.high))
    return middle if sample.n == 1 else f"{middle} ({low} – {high})"


def _why(row: Row) -> list[str]:
    assert row.failed is not None
    return [row.failed["failure"], row.failed["detail"]]


def _failure(row: Row) -> dict[str, Any]:
    failure, detail = _why(row)
    return {"point": row.point, "failure": failure, "detail": detail}
