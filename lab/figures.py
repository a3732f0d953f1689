"""Figures formatted for readers."""

import math


def number(value: float) -> str:
    """Three significant digits, without an exponent for numbers of common size."""
    if value == 0 or not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"
