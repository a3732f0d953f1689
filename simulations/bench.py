"""`make bench`: the benchmarks of every pillar, one after the other, and one page of their figures.

    python -m simulations.bench                              # all of them, more than an hour
    python -m simulations.bench 'project.only=[split]'       # one; the others' figures stay on the page

Writes `<folder>/results/<date>-<commit>.json` (all rows, each benchmark with its commit, versions and machine) and
`<folder>/RESULTS.md` (`simulations.results`) after every benchmark, so that one that is interrupted loses only its own
figures. Both files name a benchmark that fails; the others still run, and the exit code is 1.
"""

import json
import logging
import shlex
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lab.bench import Row, load_average, missed
from lab.command import entry
from lab.command.processes import run_to_end
from lab.environment import commit, describe_environment
from lab.files import require_writable, write_whole
from simulations.bench_settings import BenchmarkSettings, BenchSettings
from simulations.results import known_figures, write_results

log = logging.getLogger(__name__)


def run(settings: BenchSettings, place: entry.Run) -> dict[str, Any]:
    """Run the selected benchmarks in turn; return the figures of the last line."""
    project, folder = settings.project, Path(settings.project.folder)
    report = folder / "results" / f"{time.strftime('%Y-%m-%d')}-{commit() or 'unknown'}.json"
    require_writable(report.parent, "project.folder")  # now, not after an hour
    found = known_figures(folder / "results")
    asked = [benchmark for benchmark in project.benchmarks if benchmark.name in project.only or not project.only]
    for benchmark in asked:
        found[benchmark.name] = measure(benchmark, place.folder / benchmark.name, project.timeout_seconds)
        known = {each.name: found[each.name] for each in project.benchmarks if each.name in found}
        write_whole(report, json.dumps({"benchmarks": known}, indent=1) + "\n")
        page = write_results(project.benchmarks, folder)
    failed = [benchmark.name for benchmark in asked if found[benchmark.name]["failure"]]
    if failed:
        log.error("%s failed; the other benchmarks are in %s", ", ".join(failed), report)
        raise SystemExit(1)
    rows = [row for benchmark in asked for row in found[benchmark.name]["rows"]]
    names = [benchmark.name for benchmark in asked]
    return {"report": report, "results": page, "benchmarks": names, "missed": missed(rows)}


def measure(benchmark: BenchmarkSettings, folder: Path, timeout_seconds: float) -> Row:
    """Run one benchmark as a separate process; its rows, or the reason why there are none."""
    arguments = ["-m", benchmark.command, *benchmark.overrides]
    log.info("python %s", " ".join(arguments))
    began = time.monotonic()
    done: Row = {"command": f"python {shlex.join(arguments)}", "date": time.strftime("%Y-%m-%d %H:%M:%S")}
    done |= {**describe_environment(), "failure": None, "rows": []}
    try:
        done["rows"] = run_to_end(benchmark.command, benchmark.overrides, folder, timeout_seconds)[1]["rows"]
    except subprocess.TimeoutExpired:
        done["failure"] = f"not done after {timeout_seconds:g} s"
    except subprocess.CalledProcessError as error:
        done |= {"failure": f"ended with code {error.returncode}", "rows": _rows(error.stdout)}
    return done | {"seconds": time.monotonic() - began, "load_average": load_average()}


def _rows(out: str) -> list[Row]:
    """The rows that a benchmark printed, even if it failed: they say what it found."""
    with suppress(ValueError, LookupError, TypeError):
        return list(json.loads(out.splitlines()[-1])["rows"])
    return []


main = entry.command("bench", BenchSettings, run)

if __name__ == "__main__":
    main()
