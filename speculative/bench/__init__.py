"""Benchmarks of speculative decoding: `python -m speculative.bench`."""
