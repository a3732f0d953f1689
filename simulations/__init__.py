"""Commands that run the lab on one machine: demo, benchmarks, a simulated federation, a slow link."""

import lab  # noqa: F401 (first of all: Ctrl+C is quiet from here on)
