"""The command: `python run_matrix.py matrix=decode model=random project.context=64,128`."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from lab.command import entry
from lab.files import require_writable
from matrix.grid import Words, sort_words
from matrix.settings import MatrixSettings

log = logging.getLogger(__name__)


def main() -> None:
    """Composes `conf/matrix.yaml` and sweeps, or draws a sweep again."""
    found: list[Words] = []

    def sort(arguments: list[str]) -> list[str]:
        found.append(sort_words(arguments))
        return found[0].sweep

    def run(settings: MatrixSettings, place: entry.Run) -> dict[str, Any]:
        return sweep_or_draw(settings, found[0], place)

    entry.main("matrix", MatrixSettings, run, sort)


def sweep_or_draw(settings: MatrixSettings, words: Words, place: entry.Run) -> dict[str, Any]:
    """The figures of the last line."""
    from matrix.drawing import draw, load_sweep, write_report
    from matrix.sweep import run_sweep

    sweep = settings.matrix
    other = load_sweep("matrix.compare", sweep.compare) if sweep.compare else None
    if sweep.plot is not None:
        began, document = time.monotonic(), load_sweep("matrix.plot", sweep.plot)
        folder = Path(sweep.plot).expanduser()
        require_writable(folder, "matrix.plot")
        figures = write_report(document, folder, other) | draw(document, folder, sweep, other)
        return {**figures, "skipped": figures["cells"], "seconds": time.monotonic() - began}
    result = run_sweep(settings, words, place.folder)
    figures = write_report(result.document, place.folder, other)
    figures |= {"skipped": result.skipped, "seconds": result.document["sweep"]["seconds"]}
    place.so_far = lambda: figures  # drawing may take longer than there is time for after a signal
    if isinstance(result.ended_by, KeyboardInterrupt):
        left = f"{figures['not_run']} of {figures['cells']}"
        log.warning("%s cells have no result; the same words go on from here", left)
    figures |= draw(result.document, place.folder, sweep, other)
    if result.ended_by is not None:
        raise result.ended_by
    return figures


if __name__ == "__main__":
    main()
