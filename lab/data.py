"""Sources of text: who holds which documents, how a text becomes examples, which tokens count in the loss.

Knows nothing about clients or models. A source lists its documents from file sizes and line ends alone; a text is
opened only by whoever reads that document.

Shapes: B examples in a batch, T tokens (the longest example of the batch).
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import sysconfig
import tokenize
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from jinja2 import TemplateError
from numpy.typing import NDArray

from lab.settings import DataSettings, DataSource, UserError

if TYPE_CHECKING:  # transformers takes seconds to import, and only names are needed here
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

IGNORED = -100
"""Label of a position that does not count, as torch and transformers have it."""

ROLES = ("system", "user", "assistant", "tool")
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".org", ".csv", ".html", ".xml", ".py", ".c", ".h", ".cpp", ".js", ".ts")
TEST_FOLDERS = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages", "lib-dynload"}


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text of a source, known by name and size before anyone reads it."""

    name: str
    """Path below the source, or file:line; what error messages name."""
    unit: str
    """What stays together in a partition by package: a top-level package, a folder, a line."""
    size_bytes: int
    position: int = 0
    """Where the source finds it: first byte of the line (jsonl), row (hub)."""


@dataclass(frozen=True)
class Text:
    """Plain text: every token counts."""

    text: str


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue."""

    role: str
    content: str


@dataclass(frozen=True)
class Dialogue:
    """Turns of which only the assistant's answers count."""

    messages: tuple[Message, ...]
    name: str
    """The document it came from."""


Record = Text | Dialogue


class Source(Protocol):
    """Where text comes from."""

    def documents(self) -> list[Document]:
        """Every document, in an order that is the same on every call; reads no text. UserError when there is none."""
        ...

    def read(self, document: Document) -> Iterator[Record]:
        """The records of one document; UserError with document, key, rule and value when it is malformed."""
        ...


@dataclass(frozen=True, eq=False)
class Example:
    """Token ids of at most `sequence_length`, and which of them the loss counts."""

    ids_T: NDArray[np.int32]
    counted_T: NDArray[np.bool_]
    """True where the token is predicted in the loss. Position 0 has nothing before it and never counts."""

    @property
    def targets(self) -> int:
        """Tokens that the loss counts."""
        return int(self.counted_T[1:].sum())


@dataclass(frozen=True)
class Split:
    """One reader's examples; no token sequence stands on both sides, or twice on one."""

    train: list[Example]
    held_out: list[Example]


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples padded on the right to the longest of them."""

    ids_BT: torch.Tensor
    attention_BT: torch.Tensor
    """1 where there is a token, 0 where there is padding."""
    labels_BT: torch.Tensor
    """The ids themselves (not shifted) where they count, IGNORED elsewhere."""
    targets: int
    """Tokens that the loss counts, over the whole batch."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        raise NotImplementedError


def open_source(settings: DataSettings) -> Source:
    """The source that `settings` names; UserError with the dotted key when its file or folder is not there."""
    raise NotImplementedError


def records(source: Source, documents: Iterable[Document]) -> Iterator[Record]:
    """Every record of `documents`, one document open at a time."""
    for document in documents:
        yield from source.read(document)


def examples(
    records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> list[Example]:
    """Records as token ids with the response mask."""
    raise NotImplementedError


def split_examples(
    examples: Iterable[Example], held_out_fraction: float, seed: int, max_examples: int, max_held_out: int
) -> Split:
    """Training and held-out part, by content hash."""
    raise NotImplementedError


def collate(examples: Sequence[Example]) -> Batch:
    """`examples` as one batch."""
    raise NotImplementedError


def batches(examples: Sequence[Example], batch_size: int, seed: int) -> Iterator[Batch]:
    """Batches without end, in an order that depends on `seed` alone: one seeded permutation after the other.

    For a federated client the seed is `derive_seed(seed, "order", round, partition)` of lab/training.py.
    """
    raise NotImplementedError
