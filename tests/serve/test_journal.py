"""Journals on disk: bounded, of one writer, readable by their owner."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import msgspec
import psutil
import pytest

from lab.engine.sampling import Sampling
from serve.faults import RequestFault
from serve.journal import Journals
from serve.models.writer import NewTokens
from serve.text_request import TextRequest

NAME = "cmpl-" + "a" * 32


def test_what_is_written_is_read_and_a_cut_line_is_dropped(tmp_path: Path) -> None:
    journals = Journals(tmp_path / "new" / "José", 60, 10**6)
    journal = journals.new(NAME, {"model": "m"})
    journal.add(0, NewTokens([1, 2], 1))
    journal.add(1, NewTokens([3], 0, [0.5], [[(3, 0.5), (4, 1.5)]]))
    journal.close()
    file = tmp_path / "new" / "José" / f"{NAME}.jsonl"
    assert file.stat().st_mode & 0o077 == 0
    file.write_bytes(file.read_bytes() + b"[0,[5")
    assert journals.head(NAME)["model"] == "m"
    events, again = journals.read(NAME)
    assert events == [(0, NewTokens([1, 2], 1, (), [])), (1, NewTokens([3], 0, [0.5], [[(3, 0.5), (4, 1.5)]]))]
    again.add(0, NewTokens([6], 0))
    again.close()
    events, again = journals.read(NAME)
    assert events[-1] == (0, NewTokens([6], 0, (), []))
    again.close()


def test_one_journal_has_one_writer(tmp_path: Path) -> None:
    journals = Journals(tmp_path, 60, 10**6)
    journal = journals.new(NAME, {})
    with pytest.raises(RequestFault, match="another server continues this stream") as taken:
        Journals(tmp_path, 60, 10**6).read(NAME)
    assert taken.value.status == 409
    journal.close()
    Journals(tmp_path, 60, 10**6).read(NAME)[1].close()


def test_a_full_disk_leaves_neither_an_open_file_nor_half_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, room = os.write, 0

    def of_a_disk(file: int, data: bytes) -> int:
        nonlocal room
        if not (written := data[:room]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room -= len(written)
        return write(file, written)

    journals = Journals(tmp_path, 60, 10**6)
    monkeypatch.setattr(os, "write", of_a_disk)
    before = psutil.Process().num_fds()
    for fits in (0, 5):
        room = fits
        with pytest.raises(OSError, match="No space left on device"):
            journals.new(NAME, {"model": "m"})
        assert list(tmp_path.iterdir()) == []
        assert psutil.Process().num_fds() == before
    for fits in (0, 5):
        room = 1000
        journal = journals.new(NAME, {"model": "m"})
        journal.add(0, NewTokens([1, 2], 1))
        room = fits
        with pytest.raises(OSError, match="No space left on device"):
            journal.add(0, NewTokens([3], 0))
        journal.close()
        room = 1000
        events, again = journals.read(NAME)
        again.add(0, NewTokens([3, 4], 0))
        again.close()
        assert events == [(0, NewTokens([1, 2], 1, (), []))]
        events, again = journals.read(NAME)
        again.close()
        assert [new.ids for _, new in events] == [[1, 2], [3, 4]]
        (tmp_path / f"{NAME}.jsonl").unlink()
    assert psutil.Process().num_fds() == before


def test_old_journals_go_and_the_oldest_when_there_are_too_many_bytes(tmp_path: Path) -> None:
    journals = Journals(tmp_path, 100, 8000)
    for number in range(40):
        path = tmp_path / f"cmpl-{number:032x}.jsonl"
        journals.new(path.stem, {"junk": "x" * 900}).close()
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 50 + number))
    left = sorted(path.stem for path in tmp_path.iterdir())
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 8000 + 2 * 1000
    assert left[-1] == f"cmpl-{39:032x}"
    os.utime(tmp_path / f"{left[-1]}.jsonl", (0, 0))
    with pytest.raises(RequestFault):
        Journals(tmp_path, 100, 8000).head(left[-1])


def test_a_request_is_read_back_as_it_was() -> None:
    asked = TextRequest(
        is_chat=True, prompts=[[1, 2]], choices=2, max_new_tokens=None,
        sampling=Sampling(seed=2**63 - 1, temperature=0.7, top_k=3, top_p=0.9, min_p=0.1, top_tokens=2),
        rules={"logit_bias": ((5, -1.5), (6, 2.0)), "schema": '{"type":"object"}'}, stops=["a"], logprobs=2, echo=False,
        is_stream=True, has_usage=True, has_usage_always=False, is_speculative=False, has_token_ids=False,
        shows_guesses=True, user="u",
    )  # fmt: skip
    kept = msgspec.json.decode(msgspec.json.encode(msgspec.to_builtins(asked)))
    again = msgspec.convert(kept, TextRequest)
    assert again.sampling_of(1, 7) == asked.sampling_of(1, 7)
    assert (again.prompts, again.stops, again.user) == (asked.prompts, asked.stops, asked.user)
