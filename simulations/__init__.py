"""Commands that stand in for a network: a federation on one machine, a slow link."""
