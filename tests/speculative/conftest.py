"""What several test files share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.speculative.processes import RANDOM, Role, verifier


@pytest.fixture(scope="session")
def random_verifier() -> Iterator[Role]:
    """A verifier process with a random model in float64; it must outlive every test."""
    with verifier(*RANDOM) as running:
        yield running
