"""Journals of streams on disk: the request, and each token as it was told, so that a broken stream can go on.

One file a stream, readable by its owner only: a line with the request, then a line for the tokens of each event. A
line that was cut by a kill is dropped; its tokens are computed again, and are the same.
"""

from __future__ import annotations

import contextlib
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

    def add(self, choice: int, new: NewTokens) -> None:
        """Append the tokens of one event. Raises OSError."""
        line: list[Any] = [choice, list(new.ids), new.guesses]
        if new.nll:
            line += [list(new.nll), [list(map(list, top)) for top in new.top]]
        self._write(line)

    def begin(self, head: Mapping[str, Any]) -> None:
        """Write the request."""
        self._write({"version": VERSION, **head})

    def touch(self) -> None:
        """Count its time from now on."""
        with contextlib.suppress(OSError):
            os.utime(self._path)

    def close(self) -> None:
        """Close the file, which stays."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _write(self, line: Any) -> None:
        if self._file >= 0:
            os.write(self._file, json.dumps(line, separators=(",", ":")).encode() + b"\n")


class Journals:
    """A folder of journals.

    Args:
        folder: Made if it is not there, for this user only.
        keep_seconds: A journal is deleted when nothing was written to it for so long.
    """

    def __init__(self, folder: Path, keep_seconds: float) -> None:
        self._folder, self._keep_seconds = folder, keep_seconds
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._tidied = -1e9

    @classmethod
    def of(cls, folder: Path, keep_seconds: float) -> Self | None:
        """The journals of a folder; None where none are kept. Raises OSError."""
        return cls(folder, keep_seconds) if keep_seconds else None

    def new(self, name: str, head: Mapping[str, Any]) -> Journal:
        """Begin a journal. Raises OSError."""
        self._tidy()
        journal = Journal(self._path(name))
        journal.begin(head)
        return journal

    def read(self, name: str) -> tuple[dict[str, Any], list[tuple[int, NewTokens]], Journal]:
        """The request of a stream, its events so far, and its journal, to be continued.

        RequestFault (404) for a stream that is not known here, or no more.
        """
        unknown = RequestFault(404, f"no stream {name[:80]!r} is kept here", param="id", code="stream_not_found")
        if not _NAME.match(name):
            raise unknown
        self._tidy()
        try:
            lines = self._path(name).read_bytes().split(b"\n")
        except OSError:
            raise unknown from None
        whole = lines[:-1]
        try:
            head, *events = map(json.loads, whole)
        except ValueError:
            raise unknown from None
        if head.get("version") != VERSION:
            raise unknown
        if lines[-1]:  # a kill cut this line
            os.truncate(self._path(name), sum(len(line) + 1 for line in whole))
        return head, [(choice, _event(rest)) for choice, *rest in events], Journal(self._path(name))

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.jsonl"

    def _tidy(self) -> None:
        """Delete old journals, once in a while."""
        now = time.time()
        if now - self._tidied < min(60.0, self._keep_seconds):
            return
        self._tidied = now
        for path in self._folder.glob("*.jsonl"):
            with contextlib.suppress(OSError):
                if now - path.stat().st_mtime > self._keep_seconds:
                    path.unlink()


def _event(rest: Sequence[Any]) -> NewTokens:
    ids, guesses, *reports = rest
    nll, top = reports or ((), ())
    return NewTokens(ids, guesses, nll, [[(token, value) for token, value in one] for one in top])
