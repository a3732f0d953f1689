"""The frame around every command: settings, overrides, streams, signals, processes, exit codes."""

import sys
from types import TracebackType


def _without_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print any exception but Ctrl+C: here it came while modules were imported, before `entry` listens for signals."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _without_traceback
