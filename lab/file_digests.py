"""SHA-256 of files. Those of large files are computed once: a record keeps them by the file's name, size and times."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.files import write_whole

log = logging.getLogger(__name__)

RECORD_FILE = ".lab_digests.json"
"""Name of the record next to the files."""
LARGE_BYTES = 2**30
"""From this size the first reading takes seconds, and is announced."""


def sha256_of(file: Path) -> bytes:
    """32 bytes over the bytes of `file`."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def content_digest(files: Mapping[str, Path]) -> str:
    """Sixteen hex digits over the names, sizes and bytes of `files`, in the order of their names."""
    sha = hashlib.sha256()
    for name, file in sorted(files.items()):
        sha.update(f"{name}\0{file.stat().st_size}\0".encode() + sha256_of(file))
    return sha.hexdigest()[:16]


def file_digests(folder: Path, names: Sequence[str], records: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of these files of `folder`, in hexadecimal, by name.

    A file is read again when its size, its time of modification or its time of change differs from the record's: the
    last one cannot be set back. The digests are kept in the first of `records` that can be written.
    """
    known: dict[str, Any] = {}
    for place in reversed(records):
        known |= _read(place)
    found = {name: _entry(folder / name, known.get(name)) for name in names}
    if any(known.get(name) != entry for name, entry in found.items()):
        _keep(records, known | found)
    return {name: str(entry["sha256"]) for name, entry in found.items()}


def record_in_cache(folder: Path, cache_dir: Path) -> Path:
    """Record of the digests of `folder` if it cannot be next to the files."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return cache_dir / "digests" / f"{name}.json"


def _read(place: Path) -> dict[str, Any]:
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # none yet, or not ours: the files are read instead
        return {}
    return found if isinstance(found, dict) else {}


def _entry(file: Path, known: Any) -> dict[str, Any]:
    status = file.stat()
    stamp = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}
    if (
        isinstance(known, dict)
        and isinstance(known.get("sha256"), str)
        and known == {**stamp, "sha256": known["sha256"]}
    ):
        return known
    if status.st_size >= LARGE_BYTES:
        log.info("reading all %.1f GB of %s once, for its fingerprint", status.st_size / 1e9, file.name)
    return {**stamp, "sha256": sha256_of(file).hex()}


def _keep(places: Sequence[Path], found: dict[str, Any]) -> None:
    text = json.dumps(found, indent=1, sort_keys=True) + "\n"
    for place in places:
        with contextlib.suppress(OSError):
            write_whole(place, text, share=True)
            return
    log.warning("the fingerprint could not be kept in %s: it is computed again at each start", places[0].parent)
