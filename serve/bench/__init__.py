"""Benchmark of the HTTP server: `python -m serve.bench`."""
