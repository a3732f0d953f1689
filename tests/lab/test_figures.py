"""Figures as people read them."""

from __future__ import annotations

import pytest

from lab.figures import number


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.00919, "0.00919"), (2.6421, "2.64"), (262.8, "263"), (1234.5, "1,234"), (1e9, "1e+09")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text
