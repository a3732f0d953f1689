"""What takes long and is looked at by several tests is made once, for all test processes of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

from lab.link import OneWay

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lab.learning.examples import Example
    from lab.learning.records import Record


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that whoever asks first fills; the others wait for it. One that was not finished is `make`'s own error.

    pytest-xdist's workers are processes, whose temporary folders lie below that of the whole run.
    """
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    finished = folder.with_suffix(".finished")
    with FileLock(folder.with_suffix(".lock")):
        if not finished.exists():
            folder.mkdir()
            make(folder)
            finished.touch()
    return folder


def examples(records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> list[Example]:
    """All examples of `records`, as one reader makes them."""
    from lab.learning.examples import ExampleReader

    reader = ExampleReader(tokenizer, sequence_length)
    return [example for record in records for example in reader.examples(record)]


def one_way(delay_seconds: float = 0.0, *, jitter_seconds: float = 0.0, bytes_per_second: float = 0.0) -> OneWay:
    """One direction of a link, which changes nothing unless told."""
    return OneWay(delay_seconds=delay_seconds, jitter_seconds=jitter_seconds, bytes_per_second=bytes_per_second)
