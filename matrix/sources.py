"""Which code a figure came from: a digest over the Python files of whole packages, whatever the commit."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from lab.settings import UserError


def sources_digest(packages: Sequence[str]) -> str:
    """Sixteen hex digits over names and bytes of every .py file below the packages, which are found, not imported.

    Values in conf/ are no sources: a cell's own settings are signed one by one. UserError for a package that is none.
    """
    sha = hashlib.sha256()
    for package in sorted(packages):
        folder = _folder(package)
        for file in sorted(folder.rglob("*.py")):
            sha.update(f"{package}/{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
            sha.update(file.read_bytes())
    return sha.hexdigest()[:16]


def _folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise UserError(f"matrix.sources must name packages, got {package!r}")
    return Path(found.submodule_search_locations[0])
