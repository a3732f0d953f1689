"""A whole command in the test's own process, which has its imports already."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import NoReturn
from unittest.mock import patch

import pytest
from hydra.core.global_hydra import GlobalHydra


def exit_code(main: Callable[[], NoReturn], *words: str) -> int:
    """Runs `main` with these words on its command line; what it prints is the test's to capture.

    Its handlers of logs go with it: they write to what is stderr as long as the test runs.
    """
    handlers = logging.root.handlers[:]
    try:
        with patch.object(sys, "argv", [main.__module__, *words]), pytest.raises(SystemExit) as left:
            main()
    finally:
        GlobalHydra.instance().clear()
        logging.root.handlers[:] = handlers
    code = left.value.code
    if isinstance(code, str):  # what Python itself makes of a text
        print(code, file=sys.stderr)
        return 1
    assert isinstance(code, int)
    return code
