"""A digest is computed once, kept where it can be, and computed again when the file may be another."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from lab import file_digests as digests


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files that were read whole."""
    found: list[str] = []
    read = hashlib.file_digest

    def noting(stream: Any, kind: str) -> Any:
        found.append(Path(stream.name).name)
        return read(stream, kind)

    monkeypatch.setattr(hashlib, "file_digest", noting)
    return found


def test_digests_are_kept_and_every_byte_counts(tmp_path: Path, reads: list[str]) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    (tmp_path / "b").write_bytes(b"other")
    records = [tmp_path / "record.json"]
    first = digests.file_digests(tmp_path, ["a", "b"], records)
    assert first == {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("a", "b")}
    assert digests.file_digests(tmp_path, ["a", "b"], records) == first
    assert reads == ["a", "b"]
    (tmp_path / "a").write_bytes(b"012345678x")
    changed = digests.file_digests(tmp_path, ["a", "b"], records)
    assert (changed["a"] != first["a"], changed["b"] == first["b"], reads) == (True, True, ["a", "b", "a"])


def test_a_time_that_was_set_back_hides_nothing(tmp_path: Path) -> None:
    file, records = tmp_path / "a", [tmp_path / "record.json"]
    file.write_bytes(b"0123456789")
    before, status = digests.file_digests(tmp_path, ["a"], records), file.stat()
    file.write_bytes(b"012345678x")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert digests.file_digests(tmp_path, ["a"], records) != before


def test_a_place_that_cannot_be_written_is_passed_over(
    tmp_path: Path, reads: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "file").touch()
    closed, opened = tmp_path / "file" / "record.json", tmp_path / "cache" / "digests" / "record.json"
    for _ in range(2):
        digests.file_digests(tmp_path, ["a"], [closed, opened])
    assert (reads, opened.exists(), caplog.messages) == (["a"], True, [])
    digests.file_digests(tmp_path, ["a"], [closed])
    assert "could not be kept" in caplog.messages[0]


@pytest.mark.parametrize("record", [b"", b"[]", b"{", b"\xff", b'{"a": 1}', b'{"a": {"sha256": 1}}'])
def test_a_record_that_is_none_is_not_believed(tmp_path: Path, record: bytes) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "record.json").write_bytes(record)
    found = digests.file_digests(tmp_path, ["a"], [tmp_path / "record.json"])
    assert found == {"a": hashlib.sha256(b"x").hexdigest()}
    assert json.loads((tmp_path / "record.json").read_text())["a"]["sha256"] == found["a"]
