"""Settings of the merge of a split run's checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from lab.settings import LabSettings, register


@dataclass(kw_only=True)
class MergeProjectSettings:
    """From where to where."""

    checkpoint: str | None
    """A run's checkpoints (the newest valid step), or one step's folder, with the parts of all shards in it."""
    output: str | None
    """The folder to write; it must not be there yet."""


@dataclass(kw_only=True)
class MergeSettings(LabSettings):
    """Everything that the merge reads; `model` is what the run began with."""

    project: MergeProjectSettings


register("split_merge", MergeSettings)
