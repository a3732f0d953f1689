"""One model cut over several machines: inference and training across the cut."""

import lab  # noqa: F401 (first of all: Ctrl+C is quiet from here on)
