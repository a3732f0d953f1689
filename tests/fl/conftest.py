"""What several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fl import two_sites
from tests.shared import made_once


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a simulation of two sites, on a real Ray worker."""
    return made_once(tmp_path_factory, "two-sites", two_sites.simulate)
