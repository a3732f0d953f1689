"""The matrix: one command over a grid of settings, a fresh process a cell, results that outlive the sweep."""
