"""The matrix: one command over a grid of settings, a fresh process a cell, results that outlive the sweep."""

import lab  # noqa: F401 (first of all: Ctrl+C is quiet from here on)
