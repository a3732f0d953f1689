"""A whole command in the test's own process, which has its imports already."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn
from unittest.mock import patch

import pytest
from hydra.core.global_hydra import GlobalHydra


def exit_code(main: Callable[[], NoReturn], *words: str) -> int:
    """Runs `main` with these words on its command line; what it prints is the test's to capture."""
    try:
        with patch.object(sys, "argv", [main.__module__, *words]), pytest.raises(SystemExit) as left:
            main()
    finally:
        GlobalHydra.instance().clear()
    code = left.value.code
    if isinstance(code, str):  # what Python itself makes of a text
        print(code, file=sys.stderr)
        return 1
    assert isinstance(code, int)
    return code
