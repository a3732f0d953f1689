"""Files that are written whole or not at all, whatever happens meanwhile; and paths from settings."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lab.settings import UserError


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill; if the block ends without an error it is moved to `target`, else it is removed.

    An existing folder at `target` is replaced. Anyone who may read the parent folder may read the new one.
    """
    unfinished = target.parent / f".{target.name}.{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        share_like_parent(unfinished)
        for file in unfinished.rglob("*"):
            sync(file)
        sync(unfinished)
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    sync(target.parent)


def share_like_parent(place: Path) -> None:
    """Give a file or folder the read permissions of its parent folder: commands write for their owner only
    (`lab.command.entry`), which does not suit a model that several users of a machine share."""
    around = place.parent.stat().st_mode & 0o777
    for each in [place, *(place.rglob("*") if place.is_dir() else ())]:
        each.chmod(0o700 | around if each.is_dir() else 0o600 | around & 0o666)


def write_whole(target: Path, text: str, *, share: bool = False) -> None:
    """Write `text` under another name, then rename: no reader ever sees half of it, even if we are killed.

    `share`: see `share_like_parent`; else only its owner may read it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.parent / f".{target.name}.{os.getpid()}"
    try:
        unfinished.write_text(text, encoding="utf-8")
        if share:
            share_like_parent(unfinished)
        sync(unfinished)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    sync(target.parent)


def path_of(text: str, key: str) -> Path:
    """The absolute path that a setting names; UserError, with its key, for a `~` of a user without a home."""
    return path_as_typed(text, key).absolute()


def path_as_typed(text: str, key: str) -> Path:
    """The same path, but relative if it was typed so: for messages that others read, too."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{key} must be a path without ~ where HOME is not set, got {text!r}") from None


def require_writable(folder: Path, key: str) -> None:
    """Make `folder` for results; UserError, with the setting that names it, when it cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise cannot_use(key, folder, error) from None


def cannot_use(key: str, where: object, error: OSError) -> UserError:
    """The UserError for a path, named by `key`, that cannot be written or read."""
    return UserError(f"{key} must be a folder that can be written, got {str(where)!r} ({error.strerror or error})")


def whose_place(error: OSError, places: Mapping[str, str]) -> UserError | None:
    """The error as one line where it is about something in one of these places, given by the setting that names each;
    None for an error that is about something else."""
    if not error.filename or not isinstance(error.filename, str | bytes):
        return None
    about = _absolute(os.fsdecode(error.filename))
    found = [
        (len(folder.parts), key, text)
        for key, text in places.items()
        for folder in [_absolute(text)]
        if about.is_relative_to(folder) or (folder.is_relative_to(about) and not about.is_dir())
    ]
    return cannot_use(*max(found)[1:], error) if found else None


def _absolute(text: str) -> Path:
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:  # `~` of a user without a home
        return Path(text).absolute()


def sync(path: Path) -> None:
    """Flush a file or folder to disk before anything that depends on it; skipped on Windows for folders."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
