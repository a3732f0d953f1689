"""Journals of streams on disk: the request, and each token as it was told, so that a broken stream can go on.

One file a stream, readable by its owner only: a line with the request, then a line for the tokens of each event. A
line that was cut by a kill is dropped; its tokens are computed again, and are the same.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from serve.faults import RequestFault
from serve.models.writer import NewTokens

_NAME = re.compile(r"[A-Za-z]+-[0-9a-f]{32}\Z")
VERSION = 1


class Journal:
    """The journal of one stream, open for writing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        if not _lock(self._file):
            self.close()
            raise RequestFault(409, "another server continues this stream", code="stream_taken")

    def add(self, choice: int, new: NewTokens) -> None:
        """Append the tokens of one event. Raises OSError, and a part of its line may be there then: add no more."""
        line: list[Any] = [choice, list(new.ids), new.guesses]
        if new.nll:
            line += [list(new.nll), [list(map(list, top)) for top in new.top]]
        self._write(line)

    def begin(self, head: Mapping[str, Any]) -> int:
        """Write the request; returns its bytes."""
        return self._write({"version": VERSION, **head})

    def touch(self) -> None:
        """Count its time from now on."""
        with contextlib.suppress(OSError):
            os.utime(self._path)

    def close(self) -> None:
        """Close the file, which stays."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _write(self, line: Any) -> int:
        if self._file < 0:
            return 0
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        if os.write(self._file, data) < len(data):  # of a disk that became full, the system writes what fits
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(data)


def _lock(file: int) -> bool:
    """Take a file for this process; False if another one has it. Where a system has no such locks, it is not taken."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


class Journals:
    """A folder of journals.

    Args:
        folder: Made if it is not there, for this user only.
        keep_seconds: A journal is deleted when nothing was written to it for so long.
        most_bytes: Most bytes of all journals; older ones go first.
    """

    def __init__(self, folder: Path, keep_seconds: float, most_bytes: int) -> None:
        self._folder, self._keep_seconds, self._most_bytes = folder, keep_seconds, most_bytes
        self._written = 0
        """Bytes of journals that were begun since the folder was last tidied."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._tidied = -1e9

    @classmethod
    def of(cls, folder: Path, keep_seconds: float, most_bytes: int) -> Self | None:
        """The journals of a folder; None where none are kept. Raises OSError."""
        return cls(folder, keep_seconds, most_bytes) if keep_seconds else None

    def new(self, name: str, head: Mapping[str, Any]) -> Journal:
        """Begin a journal. Raises OSError."""
        self._tidy()
        path = self._path(name)
        journal = Journal(path)
        try:
            self._written += journal.begin(head)
        except BaseException:
            journal.close()
            path.unlink(missing_ok=True)
            raise
        return journal

    def head(self, name: str) -> dict[str, Any]:
        """The request of a stream. RequestFault (404) for a stream that is not known here, or no more."""
        return self._read(name)[0]

    def read(self, name: str) -> tuple[list[tuple[int, NewTokens]], Journal]:
        """The events of a stream so far, and its journal, to be continued.

        RequestFault for a stream that is not known here, or no more (404), or that another server continues (409).
        """
        self._read(name)
        journal = Journal(self._path(name))  # nobody else writes to it from here on
        try:
            _, events, rest = self._read(name)
            if rest:  # a kill cut this line
                os.truncate(self._path(name), self._path(name).stat().st_size - rest)
        except BaseException:
            journal.close()
            raise
        return [(choice, _event(own)) for choice, *own in events], journal

    def _read(self, name: str) -> tuple[dict[str, Any], list[Any], int]:
        """The request, the lines of events, and the bytes of a line that was cut."""
        unknown = RequestFault(404, f"no stream {name[:80]!r} is kept here", param="id", code="stream_not_found")
        if not _NAME.match(name):
            raise unknown
        self._tidy()
        try:
            *whole, rest = self._path(name).read_bytes().split(b"\n")
            head, *events = map(json.loads, whole)
        except (OSError, ValueError):
            raise unknown from None
        if head.get("version") != VERSION:
            raise unknown
        return head, events, len(rest)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.jsonl"

    def _tidy(self) -> None:
        """Delete old journals once in a while, and the oldest when there are too many bytes."""
        now = time.time()
        if now - self._tidied < min(60.0, self._keep_seconds) and self._written < self._most_bytes / 8:
            return
        self._tidied, self._written = now, 0
        kept = []
        for path in self._folder.glob("*.jsonl"):
            with contextlib.suppress(OSError):
                about = path.stat()
                if now - about.st_mtime > self._keep_seconds:
                    path.unlink()
                else:
                    kept.append((about.st_mtime, about.st_size, path))
        room = self._most_bytes
        for _, size, path in sorted(kept, reverse=True):
            room -= size
            if room < 0:
                with contextlib.suppress(OSError):
                    path.unlink()


def _event(rest: Sequence[Any]) -> NewTokens:
    ids, guesses, *reports = rest
    nll, top = reports or ((), ())
    return NewTokens(ids, guesses, nll, [[(token, value) for token, value in one] for one in top])
