"""Files of a finished sweep: sweep.json, results.csv, plots/, report.html. Reads JSON only, runs nothing."""

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.figures import number
from lab.files import write_whole
from lab.page import Section, write_page
from lab.settings import UserError
from matrix.plots import Drawing, draw_sweep
from matrix.settings import SweepSettings
from matrix.table import Metric, Row, Table, in_words

Document = Mapping[str, Any]


_LEGEND = "Yellow is good. Hatched cells have no figure, and say why."
_LEGEND_OF_RATIOS = " Ratios are this sweep's median over the other's: green is better than the other, brown is worse."


def load_sweep(key: str, folder: str) -> Document:
    """The sweep.json of a sweep's folder. UserError, which names the setting `key`, if it has no results."""
    file = Path(folder).expanduser() / "sweep.json"
    try:
        document: Document = json.loads(file.read_text(encoding="utf-8"))
        if document["sweep"]["metrics"]:
            sections_of(Table.of(document), ["what it is drawn from is there"], None)
            return document
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass
    raise UserError(f"{key} must be the folder of a sweep, with the results in its sweep.json, got {folder!r}")


def write_report(document: Document, folder: Path, other: Document | None) -> dict[str, Any]:
    """Write everything but the pictures, so that a failing picture loses nothing else. The files, for the last line."""
    table = Table.of(document)
    report, title = folder / "report.html", _title(table)
    write_whole(folder / "sweep.json", json.dumps(document, indent=1) + "\n")
    write_whole(folder / "results.csv", table.csv())
    write_page(report, title, sections_of(table, [_NOT_YET], None if other is None else Table.of(other)))
    return {
        "sweep": folder / "sweep.json",
        "results_csv": folder / "results.csv",
        "plots": [],
        "report": report,
    }


def draw(document: Document, folder: Path, settings: SweepSettings, other: Document | None) -> dict[str, Any]:
    """Draw the pictures and put them into the report. Their figures for the last line."""
    table, beside = Table.of(document), None if other is None else Table.of(other)
    drawn = draw_sweep(table, folder / "plots", settings.lines_from, beside)
    pictures = [_in_its_place(picture) for picture in drawn]
    write_page(folder / "report.html", _title(table), sections_of(table, pictures, beside))
    return {
        "plots": [picture.file for picture in drawn if picture.failure is None],
        "not_drawn": [_in_its_place(picture) for picture in drawn if picture.failure is not None],
    }


def _title(table: Table) -> str:
    return f"Matrix: {table.sweep['name']}"


def figures_of(document: Document) -> dict[str, Any]:
    """Numbers of cells by status, the figures of each cell, and the failures, for the last line."""
    table = Table.of(document)
    counts = Counter(row.status for row in table.rows)
    return {
        "cells": len(table.rows),
        "ok": counts["ok"],
        "failed": counts["failed"],
        "not_run": counts["not run"],
        "rows": table.figures(),
        "failures": [_failure(row) for row in table.failures if row.status == "failed"],
    }


_NOT_YET = "The pictures were not drawn: the sweep ended before that. `matrix.plot=` with this folder draws them."


def _in_its_place(picture: Drawing) -> Path | str:
    if picture.failure is None:
        return picture.file
    return f"{picture.file.name} could not be drawn ({picture.failure}). Its figures are in the table below."


def sections_of(table: Table, pictures: Sequence[Path | str], other: Table | None) -> list[Section]:
    """Sections of the report: setup, pictures, table, failures, commands."""
    sweep = table.sweep
    setup = {
        "command": shlex.join(["python", "run_matrix.py", *sweep["asked"]]),
        "model": sweep["model"],
        "device": sweep["device"],
        "commit": sweep["commit"],
        "date": sweep["date"],
        **{table.label(axis): ", ".join(map(in_words, table.values(axis))) for axis in sweep["axes"]},
        "runs of each cell": sweep["repeats"],
        "launcher": sweep["launcher"],
    }
    if other is not None:
        setup["compared with"] = f"{other.sweep['model']} on {other.sweep['device']}, commit {other.sweep['commit']}"
    sections = [
        Section(title="Setup", facts=setup),
        Section(title="Pictures", pictures=pictures, text=_about_pictures(table, other)),
        _figures(table),
    ]
    if table.failures:
        rows = [[*map(in_words, row.point.values()), *_why(row)] for row in table.failures]
        header = [*map(table.label, sweep["axes"]), "failure", "what it said"]
        sections.append(Section(title="Cells without figures", header=header, rows=rows))
    commands = [row.command for row in table.rows]
    return [*sections, Section(title="The command of each cell", commands=commands)]


def _about_pictures(table: Table, other: Table | None) -> str:
    missing = ", ".join(metric.title for metric in table.unknown)
    unknown = f" No cell has a figure for: {missing}." if missing else ""
    return (_LEGEND if table.metrics else "") + unknown + (_LEGEND_OF_RATIOS if other else "")


def _figures(table: Table) -> Section:
    header = [*map(table.label, table.sweep["axes"]), *(metric.label for metric in table.metrics), "n", "seconds"]
    rows = [
        [
            *map(in_words, row.point.values()),
            *(_figure(row, metric) for metric in table.metrics),
            sum(result["status"] != "not run" for result in row.results),
            number(sum(result["seconds"] for result in row.results)),
        ]
        for row in table.rows
    ]
    text = "Median of n runs, with the smallest and largest where there are several."
    return Section(title="Figures", header=header, rows=rows, text=text)


def _figure(row: Row, metric: Metric) -> str:
    sample = row.sample(metric)
    if sample is None:
        return row.lacks(metric) or ""
    low, middle, high = (number(value * metric.scale) for value in (sample.low, sample.median, sample.high))
    return middle if sample.n == 1 else f"{middle} ({low} – {high})"


def _why(row: Row) -> list[str]:
    assert row.failed is not None
    return [row.failed["failure"], row.failed["detail"]]


def _failure(row: Row) -> dict[str, Any]:
    failure, detail = _why(row)
    return {"point": row.point, "failure": failure, "detail": detail}
