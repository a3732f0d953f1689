"""The command of the matrix: `python run_matrix.py matrix=decode model=random project.context=64,128`."""

import logging
import time
from pathlib import Path
from typing import Any

from lab.command import entry
from lab.files import require_writable
from matrix.grid import CommandLine, sort_overrides
from matrix.settings import MatrixSettings

log = logging.getLogger(__name__)


def main() -> None:
    """Compose `conf/matrix.yaml` and run the sweep, or draw an earlier one again."""
    found: list[CommandLine] = []

    def sort(arguments: list[str]) -> list[str]:
        found.append(sort_overrides(arguments))
        return found[0].sweep

    def run(settings: MatrixSettings, place: entry.Run) -> dict[str, Any]:
        return sweep_or_draw(settings, found[0], place)

    entry.main("matrix", MatrixSettings, run, sort)


def sweep_or_draw(settings: MatrixSettings, command_line: CommandLine, place: entry.Run) -> dict[str, Any]:
    """Run or draw; return the figures of the last line."""
    from matrix.drawing import draw, figures_of, load_sweep, write_report
    from matrix.sweep import run_sweep

    sweep = settings.matrix
    other = load_sweep("matrix.compare", sweep.compare) if sweep.compare else None
    if sweep.plot is not None:
        began, document = time.monotonic(), load_sweep("matrix.plot", sweep.plot)
        folder = Path(sweep.plot).expanduser()
        require_writable(folder, "matrix.plot")
        figures = figures_of(document) | write_report(document, folder, other) | draw(document, folder, sweep, other)
        return {**figures, "skipped": figures["cells"], "seconds": time.monotonic() - began}
    result = run_sweep(settings, command_line, place.folder)
    figures = figures_of(result.document)
    figures |= {"skipped": result.skipped, "seconds": result.document["sweep"]["seconds"]}
    place.so_far = lambda: figures  # the disk may have no room for a report, or a signal leave no time for drawing
    figures |= write_report(result.document, place.folder, other)
    if isinstance(result.ended_by, KeyboardInterrupt):
        left = f"{figures['not_run']} of {figures['cells']}"
        log.warning("%s cells have no result; the same command continues the sweep", left)
    figures |= draw(result.document, place.folder, sweep, other)
    if result.ended_by is not None:
        raise result.ended_by
    return figures


if __name__ == "__main__":
    main()
