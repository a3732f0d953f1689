"""Shows warnings of Ray workers to the user who started the simulation.

Ray captures the output of its workers, and passes on either all of it or nothing. So every worker appends its warnings
to one file in the run folder, one JSON line each, and the main process follows that file.
"""

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILE = "workers.jsonl"
LOOK_SECONDS = 0.5

log = logging.getLogger(__name__)


class JsonLine(logging.Formatter):
    """Formats a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Level, logger and message."""
        return json.dumps({"level": record.levelno, "name": record.name, "text": record.getMessage()})


def send_warnings(path: Path) -> None:
    """Append every warning of this process to `path`; a second call changes nothing."""
    root = logging.getLogger()
    if any(
        isinstance(handler, logging.FileHandler) and isinstance(handler.formatter, JsonLine)
        for handler in root.handlers
    ):
        return
    handler = logging.FileHandler(path, delay=True, encoding="utf-8")  # appends whole lines; no warning, no file
    handler.setLevel(logging.WARNING)
    handler.setFormatter(JsonLine())
    handler.addFilter(lambda record: not record.name.startswith("flwr"))  # the strategy reports it in one line
    root.addHandler(handler)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as in `lab.command.entry`
    logging.captureWarnings(True)


@contextmanager
def warnings_from(path: Path) -> Iterator[None]:
    """Inside, log here what workers append to `path`, each message once; at the end, log the rest."""
    done = threading.Event()
    follower = threading.Thread(target=_follow, args=[path, done], daemon=True)
    follower.start()
    try:
        yield
    finally:
        done.set()
        follower.join()


def _follow(path: Path, done: threading.Event) -> None:
    seen: set[str] = set()
    position = 0
    while True:
        ending = done.wait(LOOK_SECONDS)  # read before the file, so that nothing written before the end is missed
        position = _log_new(path, position, seen)
        if ending:
            return


def _log_new(path: Path, position: int, seen: set[str]) -> int:
    """Log the complete lines after `position`; return where they end."""
    if not path.exists():
        return position
    with path.open("rb") as file:
        file.seek(position)
        lines, _, _ = file.read().rpartition(b"\n")
    for line in lines.splitlines():
        record = json.loads(line)
        if record["text"] not in seen:
            seen.add(record["text"])
            log.log(record["level"], "a worker says (%s): %s", record["name"], record["text"])
    return position + len(lines) + 1 if lines else position
