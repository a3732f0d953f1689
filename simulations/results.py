"""The page of all results, `benchmarks/RESULTS.md`, made from the reports next to it: no figure is typed by hand.

python -m simulations.results     # writes the page again; measures nothing
"""

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.bench import Row, missed
from lab.command.entry import compose_settings
from lab.figures import number
from lab.files import write_whole
from simulations.bench_settings import BenchmarkSettings, BenchSettings

LONGEST_LIST = 16
"""Most values of a list that are shown; the report has all of them."""
LONGEST_TEXT = 200
"""Longest value that is shown, in characters."""

_KINDS = ("part", "row", "run")
"""Columns in which benchmarks name the kind of a row."""
_NAMING = ("name", "model", "text", "mode", "drafter", "draft_length", "rtt_seconds", "fourth", "seed", "micro_batches")
"""Columns that tell rows of one kind apart."""


def known_figures(reports: Path) -> dict[str, Row]:
    """The newest figures of each benchmark in all reports, by its name."""
    found = [item for report in _read(reports, "????-??-??-*.json") for item in report["benchmarks"].items()]
    return dict(sorted(found, key=lambda item: str(item[1]["date"])))


def soak_rows(reports: Path) -> dict[str, Row]:
    """The newest row of each long run of faults and fuzz (`python -m tests.soak`), by its name."""
    by_date = sorted(_read(reports, "soak-*.json"), key=lambda report: str(report["date"]))
    found = [
        (row["run"], {**row, "date": each["date"], "commit": each["commit"]})
        for each in by_date
        for row in each["rows"]
    ]
    return dict(found)


def _read(reports: Path, names: str) -> list[dict[str, Any]]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(reports.glob(names))]


def results_page(benchmarks: Sequence[BenchmarkSettings], reports: Path) -> str:
    """Missed targets, then a heading for each benchmark and for each kind of its rows, then the soak runs."""
    known = known_figures(reports)
    found = {benchmark.name: known[benchmark.name] for benchmark in benchmarks if benchmark.name in known}
    commands = {each.name: " ".join(["python -m", each.command, *each.overrides]) for each in benchmarks}
    rows = [(name, row) for name, done in found.items() for row in done["rows"]]
    shown = {row.get("part"): str(done["date"]) for done in found.values() for row in done["rows"]}
    runs = {name: row for name, row in soak_rows(reports).items() if shown.get(name, "")[:10] < str(row["date"])}
    rows += [("soak", {**row, "holds": row["ok"]}) for row in runs.values() if "target" in row]
    judged = sum("holds" in row for _, row in rows)
    short = [(name, row) for name, row in rows if missed([row])]
    lines = [
        "# Results",
        "",
        "Written by `make bench` from the reports in [results](results), which hold every reading. What is",
        "measured, how, and why some targets are missed: [docs/benchmarks.md](../docs/benchmarks.md).",
        "",
        "- 1.23 (1.20 – 1.30, n = 5): the median of five readings, the smallest and the largest.",
        "- A `+` after a commit: files of the checkout were not committed.",
        "",
        "## Missed targets",
        "",
        f"{judged - len(short)} of {judged} rows with a target hold{'; these do not:' if short else '.'}",
        *(["", *_table(["row", "target", "measured"], [_missed(*each) for each in short])] if short else []),
    ]
    for name, done in found.items():
        lines += ["", f"## {name}", "", f"`{commands[name]}`", "", _circumstances(done)]
        if done["failure"]:
            lines += ["", f"**Failed:** {done['failure']}"]
        for kind in dict.fromkeys(_kind(row) for row in done["rows"]):
            lines += ["", f"### {name}: {kind}", *_section([row for row in done["rows"] if _kind(row) == kind])]
    if runs:
        lines += ["", "## soak", "", "`python -m tests.soak NAME`"]
    for name, row in runs.items():
        figures = {key: value for key, value in row.items() if key not in ("date", "commit", "target")}
        where = f"{row['date']}, commit {row['commit']}"
        lines += ["", f"### soak: {name}", "", where, *_section([figures])]
    return "\n".join(lines) + "\n"


def _missed(name: str, row: Row) -> list[str]:
    known_by = [str(row[key]) for key in _NAMING if isinstance(row.get(key), str | int | float)]
    words = re.findall(r"\w+", row["target"])
    measured = [f"{key} {_text(value)}" for key, value in row.items() if key in words and key != "holds"]
    return [
        f"[{', '.join([f'{name}: {_kind(row)}', *known_by])}](#{name}-{_kind(row)})",
        row["target"],
        "; ".join(measured),
    ]


def _circumstances(done: Row) -> str:
    machine = done["machine"]
    load = "" if done["load_average"] is None else f", load average {done['load_average']:.1f} at its end"
    return (
        f"{done['date']}, commit {done['commit']}, {machine['cores']} cores ({machine['processor']}, "
        f"{machine['system']}), {done['seconds']:.0f} s{load}"
    )


def _kind(row: Row) -> str:
    return next((str(row[key]) for key in _KINDS if key in row), "rows")


def _section(rows: Sequence[Row]) -> list[str]:
    """Rows of one kind: a single row as a list of its figures; several as a table, without their common values."""
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in _KINDS]
    if len(rows) > 1:
        columns.sort(key=lambda column: _NAMING.index(column) if column in _NAMING else len(_NAMING))
        texts = {column: [_text(row.get(column)) for row in rows] for column in columns}
        shared = {column: cells[0] for column, cells in texts.items() if len(set(cells)) == 1}
        head = [column for column in columns if column not in shared]
        lines = ["", " · ".join(f"{key} {value}" for key, value in shared.items() if value != "–")] if shared else []
        return [*lines, "", *_table(head, zip(*(texts[column] for column in head), strict=True))]
    [row] = rows
    nested = [column for column in columns if _is_table(row[column])]
    figures = [[column, _text(row[column])] for column in columns if column not in nested]
    lines = ["", *_table(["figure", "value"], figures)]
    for column in nested:
        lines += ["", f"{column}:", *_section(row[column])]
    return lines


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(item, dict) for item in value)


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    return [_line(head), _line(["---"] * len(head)), *map(_line, body)]


def _line(values: Sequence[str]) -> str:
    return f"| {' | '.join(' '.join(value.replace('|', chr(92) + '|').split()) for value in values)} |"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        if value.keys() >= {"median", "low", "high", "n"}:
            spread = f" ({number(value['low'])} – {number(value['high'])}, n = {value['n']})"
            return number(value["median"]) + (spread if value["n"] > 1 else "")
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list):
        if len(value) > 1 and all(item == value[0] for item in value):
            return f"{len(value)} x {_text(value[0])}"
        rest = f"; ... ({len(value)} in all)" if len(value) > LONGEST_LIST else ""
        return ("; ".join(map(_text, value[:LONGEST_LIST])) or "none") + rest
    return value if len(value) <= LONGEST_TEXT else f"{value[:LONGEST_TEXT]} ..."


def write_results(benchmarks: Sequence[BenchmarkSettings], folder: Path) -> Path:
    """Write `<folder>/RESULTS.md` from `<folder>/results`."""
    page = folder / "RESULTS.md"
    write_whole(page, results_page(benchmarks, folder / "results"))
    return page


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()  # it has no settings
    project = compose_settings("bench", "", BenchSettings).project
    print(write_results(project.benchmarks, Path(project.folder)))
