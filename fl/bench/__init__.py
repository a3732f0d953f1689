"""Benchmarks of the federated pillar: `python -m fl.bench`."""
