"""A deployed run that people can leave alone: its state on disk, its sites over time, and the command that watches it."""
