"""The common ground of all pillars: models, engines, learning, texts, the wire, commands. Imports no pillar."""

import sys
from types import TracebackType

_before = sys.excepthook


def _without_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print any exception but Ctrl+C: here it came while modules were imported, before a command listens for signals.

    This package is the first of ours that any command imports, before torch and others that take seconds.
    """
    if not issubclass(kind, KeyboardInterrupt):
        _before(kind, error, trace)


sys.excepthook = _without_traceback
