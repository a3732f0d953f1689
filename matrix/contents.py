"""Digests of what figures depend on besides settings: the files that these name, and the lab's own code."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.file_digests import content_digest
from lab.settings import UserError
from matrix.grid import look_up


class Contents:
    """Digests of the local files and folders that settings name, each read once."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = keys
        self._known: dict[Path, str] = {}

    def of(self, settings: Mapping[str, Any]) -> dict[str, str]:
        """Digests by dotted key, for the keys that name an existing file or folder."""
        named = {key: look_up(settings, key) for key in self._keys}
        paths = {key: Path(value).expanduser().absolute() for key, value in named.items() if isinstance(value, str)}
        return {key: self._digest(path) for key, path in paths.items() if path.exists()}

    def _digest(self, path: Path) -> str:
        if path not in self._known:
            files = [found for found in path.rglob("*") if found.is_file()] if path.is_dir() else [path]
            self._known[path] = content_digest({file.relative_to(path).as_posix(): file for file in files})
        return self._known[path]


def sources_digest(packages: Sequence[str]) -> str:
    """Sixteen hex digits over every .py file below the packages, which are found without importing them.

    Values in conf/ are not included: they are in the settings of each cell. UserError for a name that is not a
    package.
    """
    return content_digest(
        {
            f"{package}/{file.relative_to(folder).as_posix()}": file
            for package in packages
            for folder in [_folder(package)]
            for file in folder.rglob("*.py")
        }
    )


def _folder(package: str) -> Path:
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # `.x`, and the empty name
        found = None
    if found is None or not found.submodule_search_locations:
        raise UserError(f"matrix.sources must name packages, got {package!r}")
    return Path(found.submodule_search_locations[0])
