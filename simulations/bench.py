"""`make bench`: every pillar's benchmarks, one after the other, and one page of what they found.

Writes `<folder>/results/<date>-<commit>.json` (all rows, with versions and machine) and `<folder>/RESULTS.md`, from
which the README's figures come. A benchmark that fails is named in both, the others run; the exit code is 1 then.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab import entry
from lab.environment import commit, describe_environment
from lab.figures import number
from lab.files import write_whole
from simulations.bench_settings import BenchmarkSettings, BenchSettings

log = logging.getLogger(__name__)

Row = dict[str, Any]


def run(settings: BenchSettings, place: entry.Run) -> dict[str, Any]:
    """All benchmarks in turn; the figures of the last line."""
    project, folder = settings.project, Path(settings.project.folder)
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), **describe_environment(), "benchmarks": {}}
    for benchmark in project.benchmarks:
        done = measure(benchmark, place.folder / benchmark.name, project.timeout_seconds)
        found["benchmarks"][benchmark.name] = done
    report = folder / "results" / f"{found['date']}-{commit() or 'unknown'}.json"
    write_whole(report, json.dumps(found, indent=1) + "\n")
    write_whole(folder / "RESULTS.md", markdown(found, report.name))
    failed = [name for name, done in found["benchmarks"].items() if done["failure"]]
    if failed:
        log.error("%s failed; %s has the others", ", ".join(failed), report)
        raise SystemExit(1)
    return {"report": report, "results": folder / "RESULTS.md", "benchmarks": list(found["benchmarks"])}


def measure(benchmark: BenchmarkSettings, folder: Path, timeout_seconds: float) -> Row:
    """One benchmark as a process of its own: its rows, or why there are none."""
    words = ["-m", benchmark.command, *benchmark.overrides]
    log.info("python %s", " ".join(words))
    began = time.monotonic()
    done: Row = {"command": f"python {' '.join(words)}", "failure": None, "rows": []}
    try:
        ended = subprocess.run(
            [sys.executable, *words, f"hydra.run.dir={json.dumps(str(folder))}"],
            stdout=subprocess.PIPE,
            text=True,
            timeout=timeout_seconds,
            check=True,
        )
        done["rows"] = json.loads(ended.stdout.splitlines()[-1])["rows"]
    except subprocess.TimeoutExpired:
        done["failure"] = f"not done after {timeout_seconds:g} s"
    except subprocess.CalledProcessError as error:
        done["failure"] = f"ended with code {error.returncode}"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return done | {"seconds": time.monotonic() - began, "load_average": load}


def markdown(found: Mapping[str, Any], report: str) -> str:
    """RESULTS.md: a heading a benchmark, a table a kind of row."""
    machine = found["machine"]
    lines = [
        "# Results",
        "",
        f"Written by `make bench` on {found['date']} from commit {found['commit']}, on {machine['cores']} cores "
        f"({machine['processor']}, {machine['system']}); every row is in [results/{report}](results/{report}).",
        "A figure with a spread is the median of n readings (smallest – largest).",
    ]
    for name, done in found["benchmarks"].items():
        load = "" if done["load_average"] is None else f", load average {done['load_average']:.1f} at its end"
        lines += ["", f"## {name}", "", f"`{done['command']}`, {done['seconds']:.0f} s{load}"]
        if done["failure"]:
            lines += ["", f"**Failed:** {done['failure']}"]
        for kind in dict.fromkeys(_kind(row) for row in done["rows"]):
            lines += ["", *_table(kind, [row for row in done["rows"] if _kind(row) == kind])]
    return "\n".join(lines) + "\n"


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
