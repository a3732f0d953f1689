"""A run that people can leave alone: its state on disk, its sites over time, the command that watches it."""
