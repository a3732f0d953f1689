"""A checkpoint as an ordinary folder: `python -m split.merge project.checkpoint=... project.output=...`.

Everything trained becomes a transformers model, an adapter a PEFT folder; both load without this lab.
"""

from dataclasses import dataclass
from typing import Any

from lab.command import entry
from lab.files import path_of
from lab.settings import LabSettings, UserError, register


@dataclass(kw_only=True)
class MergeProjectSettings:
    """Source and destination."""

    checkpoint: str | None
    """A run's checkpoints (the newest valid step), or one step's folder, with the parts of all shards in it."""
    output: str | None
    """The folder to write; it must not be there yet."""


@register("split_merge")
@dataclass(kw_only=True)
class MergeSettings(LabSettings):
    """Settings of the merge; `model` is the one that the run began with."""

    project: MergeProjectSettings

    takes_adapter = True


def run(settings: MergeSettings, place: entry.Run) -> dict[str, Any]:
    """Merge; return the figures of the last line."""
    from split.merger import merge

    project = settings.project
    if project.checkpoint is None or project.output is None:
        raise UserError("project.checkpoint and project.output must be set, got null")
    return merge(
        settings.model, path_of(project.checkpoint, "project.checkpoint"), path_of(project.output, "project.output")
    )


main = entry.command("split_merge", MergeSettings, run)

if __name__ == "__main__":
    main()
