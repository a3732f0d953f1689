"""A checkpoint of split training as an ordinary folder.

Everything trained becomes a transformers model, an adapter a PEFT folder; both load without this lab:
`python -m split.merge project.checkpoint=... project.output=...`.
"""

from __future__ import annotations

from typing import Any

from lab.command import entry
from lab.files import path_of
from lab.settings import UserError
from split.merge_settings import MergeSettings


def run(settings: MergeSettings, place: entry.Run) -> dict[str, Any]:
    """Merges; the figures of the last line."""
    from split.merging import merge  # loads torch, which reads what `entry.main` puts into the environment

    project = settings.project
    if project.checkpoint is None or project.output is None:
        raise UserError("project.checkpoint and project.output must be set, got null")
    return merge(
        settings.model, path_of(project.checkpoint, "project.checkpoint"), path_of(project.output, "project.output")
    )


def main() -> None:
    """Composes `conf/split_merge.yaml` and runs."""
    entry.main("split_merge", MergeSettings, run)


if __name__ == "__main__":
    main()
