"""What stands in the files that a cell's settings name: a figure depends on it, whatever the path."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matrix.grid import look_up


class Contents:
    """Digests of the local files and folders that settings name, each read once."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = keys
        self._known: dict[Path, str] = {}

    def of(self, settings: Mapping[str, Any]) -> dict[str, str]:
        """By dotted key, for those of the keys that name something which is there."""
        named = {key: look_up(settings, key) for key in self._keys}
        paths = {key: Path(value).expanduser().absolute() for key, value in named.items() if isinstance(value, str)}
        return {key: self._digest(path) for key, path in paths.items() if path.exists()}

    def _digest(self, path: Path) -> str:
        if path not in self._known:
            self._known[path] = content_digest(path)
        return self._known[path]


def content_digest(path: Path) -> str:
    """Sixteen hex digits over the bytes of a file, or over names and bytes of all files below a folder."""
    sha = hashlib.sha256()
    for file in sorted(found for found in path.rglob("*") if found.is_file()) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            sha.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
            sha.update(hashlib.file_digest(stream, "sha256").digest())
    return sha.hexdigest()[:16]
