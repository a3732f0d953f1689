"""`make bench`: every pillar's benchmarks, one after the other, and one page of what they found.

    python -m simulations.bench                              # all of them, more than an hour
    python -m simulations.bench 'project.only=[split]'       # one; the others' figures stay on the page

Writes `<folder>/results/<date>-<commit>.json` (all rows, each benchmark with its commit, versions and machine) and
`<folder>/RESULTS.md`, from which the README's figures come; both after every benchmark, so that one that is cut off
loses only itself. A benchmark that fails is named in both, the others run; the exit code is 1 then.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lab.bench import missed
from lab.command import entry
from lab.command.processes import run_to_end
from lab.environment import commit, describe_environment
from lab.figures import number
from lab.files import write_whole
from simulations.bench_settings import BenchmarkSettings, BenchSettings

log = logging.getLogger(__name__)

Row = dict[str, Any]


def run(settings: BenchSettings, place: entry.Run) -> dict[str, Any]:
    """The benchmarks asked for, in turn; the figures of the last line."""
    project, folder = settings.project, Path(settings.project.folder)
    page = folder / "RESULTS.md"
    report = folder / "results" / f"{time.strftime('%Y-%m-%d')}-{commit() or 'unknown'}.json"
    found = known_figures(folder / "results")
    asked = [benchmark for benchmark in project.benchmarks if benchmark.name in project.only or not project.only]
    for benchmark in asked:
        found[benchmark.name] = measure(benchmark, place.folder / benchmark.name, project.timeout_seconds)
        known = {each.name: found[each.name] for each in project.benchmarks if each.name in found}
        write_whole(report, json.dumps({"benchmarks": known}, indent=1) + "\n")
        write_whole(page, markdown(known, report.name))
    failed = [benchmark.name for benchmark in asked if found[benchmark.name]["failure"]]
    if failed:
        log.error("%s failed; %s has the others", ", ".join(failed), report)
        raise SystemExit(1)
    rows = [row for benchmark in asked for row in found[benchmark.name]["rows"]]
    names = [benchmark.name for benchmark in asked]
    return {"report": report, "results": page, "benchmarks": names, "missed": missed(rows)}


def known_figures(folder: Path) -> dict[str, Row]:
    """The newest figures of each benchmark in all reports, by its name."""
    reports = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("????-??-??-*.json")]
    found = [item for report in reports for item in report["benchmarks"].items()]
    return dict(sorted(found, key=lambda item: str(item[1]["date"])))


def measure(benchmark: BenchmarkSettings, folder: Path, timeout_seconds: float) -> Row:
    """One benchmark as a process of its own: its rows, or why there are none."""
    words = ["-m", benchmark.command, *benchmark.overrides]
    log.info("python %s", " ".join(words))
    began = time.monotonic()
    done: Row = {"command": f"python {shlex.join(words)}", "date": time.strftime("%Y-%m-%d %H:%M:%S")}
    done |= {**describe_environment(), "failure": None, "rows": []}
    try:
        done["rows"] = run_to_end(benchmark.command, benchmark.overrides, folder, timeout_seconds)[1]["rows"]
    except subprocess.TimeoutExpired:
        done["failure"] = f"not done after {timeout_seconds:g} s"
    except subprocess.CalledProcessError as error:
        done |= {"failure": f"ended with code {error.returncode}", "rows": _rows(error.stdout)}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return done | {"seconds": time.monotonic() - began, "load_average": load}


def _rows(out: str) -> list[Row]:
    """The rows that a benchmark that failed has printed all the same: one that finds something says what."""
    with suppress(ValueError, LookupError, TypeError):
        return list(json.loads(out.splitlines()[-1])["rows"])
    return []


def markdown(found: Mapping[str, Row], report: str) -> str:
    """RESULTS.md: what does not hold, then a heading a benchmark, a table a kind of row."""
    short = [f"- {name}: {_missed(row)}" for name, done in found.items() for row in done["rows"] if missed([row])]
    judged = sum("holds" in row for done in found.values() for row in done["rows"])
    lines = [
        "# Results",
        "",
        f"Written by `make bench`; every row is in [results/{report}](results/{report}).",
        "A figure with a spread is the median of n readings (smallest – largest).",
        "",
        f"{judged - len(short)} of {judged} rows with a target hold{'; these do not:' if short else '.'}",
        *(["", *short] if short else []),
    ]
    for name, done in found.items():
        lines += ["", f"## {name}", "", f"`{done['command']}`", "", _circumstances(done)]
        if done["failure"]:
            lines += ["", f"**Failed:** {done['failure']}"]
        for kind in dict.fromkeys(_kind(row) for row in done["rows"]):
            lines += ["", *_table(kind, [row for row in done["rows"] if _kind(row) == kind])]
    return "\n".join(lines) + "\n"


def _missed(row: Row) -> str:
    known_by = [str(row[key]) for key in _NAMING if isinstance(row.get(key), str | int | float)]
    return f"{', '.join([_kind(row), *known_by])}: {row['target']}"


def _circumstances(done: Row) -> str:
    machine = done["machine"]
    load = "" if done["load_average"] is None else f", load average {done['load_average']:.1f} at its end"
    return (
        f"{done['date']}, commit {done['commit']}, {machine['cores']} cores ({machine['processor']}, "
        f"{machine['system']}), {done['seconds']:.0f} s{load}"
    )


_NAMING = ("name", "model", "text", "mode", "drafter", "draft_length", "rtt_seconds", "fourth", "seed", "micro_batches")
"""What tells rows of one kind apart."""

_KINDS = ("part", "row")
"""How benchmarks name a kind of row."""


def _kind(row: Row) -> str:
    return next((str(row[key]) for key in _KINDS if key in row), "rows")


def _table(kind: str, rows: Sequence[Row]) -> list[str]:
    """Rows of one kind: one as a list of its figures, several below each other."""
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in _KINDS]
    if len(rows) == 1:
        head, body = [kind, "figure"], [[column, _text(rows[0][column])] for column in columns]
    else:
        head, body = [kind, *columns], [[str(at), *(_text(row.get(c)) for c in columns)] for at, row in enumerate(rows)]
    return [_line(head), _line(["---"] * len(head)), *map(_line, body)]


def _line(values: Sequence[str]) -> str:
    return f"| {' | '.join(value.replace('|', chr(92) + '|') for value in values)} |"


def _text(value: Any) -> str:
    if isinstance(value, dict) and value.keys() >= {"median", "low", "high", "n"}:
        return f"{number(value['median'])} ({number(value['low'])} – {number(value['high'])}, n = {value['n']})"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return "; ".join(map(_text, value)) if isinstance(value, list) else str(value)


def main() -> None:
    """Composes `conf/bench.yaml` and measures."""
    entry.main("bench", BenchSettings, run)


if __name__ == "__main__":
    main()
