"""Benchmarks of both pillars of `split`: `python -m split.bench`, `python -m split.bench.training`."""
