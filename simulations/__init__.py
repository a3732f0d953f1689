"""Commands that run the lab on one machine: demo, benchmarks, a simulated federation, a slow link."""
