"""Sources of text: who holds which documents, how a text becomes examples, which tokens count in the loss.

Knows nothing about clients or models. A source lists its documents from file sizes and line ends alone; a text is
opened only by whoever reads that document.

Shapes: B examples in a batch, T tokens (the longest example of the batch).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import sysconfig
import tokenize
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
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
TEXT_SUFFIXES = (
    ".txt",
    ".md",
    ".rst",
    ".tex",
    ".org",
    ".html",
    ".xml",
    ".csv",
    ".py",
    ".c",
    ".h",
    ".cpp",
    ".js",
    ".ts",
)
NOT_LIBRARY_FOLDERS = ("test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages", "lib-dynload")


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
        tensors = (self.ids_BT.to(device), self.attention_BT.to(device), self.labels_BT.to(device))
        return Batch(*tensors, self.targets)


def open_source(settings: DataSettings) -> Source:
    """The source that `settings` names; UserError with the dotted key when its file or folder is not there."""
    match settings.source:
        case DataSource.python_stdlib:
            return PythonLibrary(Path(sysconfig.get_path("stdlib")))
        case DataSource.jsonl:
            return JsonLines(Path(settings.path or "").expanduser())
        case DataSource.text:
            return TextFolder(Path(settings.path or "").expanduser())
        case DataSource.hub:
            return HubDataset(settings.repo or "", settings.split)


def records(source: Source, documents: Iterable[Document]) -> Iterator[Record]:
    """Every record of `documents`, one document open at a time."""
    for document in documents:
        yield from source.read(document)


class PythonLibrary:
    """The Python standard library's own source: documents are files, units its top-level packages and modules.

    Without its tests, installed packages and compiled code, and without the two places that describe the machine
    Python was built on (their text differs from machine to machine and names its folders).
    """

    def __init__(self, root: Path) -> None:
        _require(root.is_dir(), "source", "a Python that has its library as files for python_stdlib", root)
        self._root = root

    def documents(self) -> list[Document]:
        """Every .py file that is not empty, in the order of a sorted walk."""
        files = _files(self._root, (".py",), NOT_LIBRARY_FOLDERS)
        found = [_file_document(self._root, file) for file in files]
        return [d for d in found if d.size_bytes and not d.unit.startswith(("_sysconfigdata", "config-"))]

    def read(self, document: Document) -> Iterator[Record]:
        """One text, decoded as Python itself would (PEP 263)."""
        with tokenize.open(self._root / document.name) as file:
            yield Text(file.read())


class TextFolder:
    """A folder of text files: documents are files, units its top-level folders and files. Hidden ones are left out."""

    def __init__(self, root: Path) -> None:
        _require(root.is_dir(), "path", "a folder of text files", root)
        self._root = root

    def documents(self) -> list[Document]:
        """Every file of TEXT_SUFFIXES that is not empty, from a sorted walk; other files are counted in a warning."""
        files = list(_files(self._root))
        texts = [file for file in files if file.suffix.lower() in TEXT_SUFFIXES]
        if len(texts) < len(files):
            log.warning("project.data.path: %d files do not end in one of %s", len(files) - len(texts), TEXT_SUFFIXES)
        found = [document for document in (_file_document(self._root, file) for file in texts) if document.size_bytes]
        _require(bool(found), "path", f"a folder with text in files of {', '.join(TEXT_SUFFIXES)}", self._root)
        return found

    def read(self, document: Document) -> Iterator[Record]:
        """One text; UserError when it is not UTF-8."""
        with (self._root / document.name).open(encoding="utf-8-sig") as file:
            try:
                yield Text(file.read())
            except UnicodeDecodeError as error:
                raise UserError(f"{document.name} must be UTF-8 text, got {_bad_byte(error)}") from None


class JsonLines:
    """A JSONL file: each line that is not blank is one document and one unit.

    A line has "prompt" and "response", or "messages" (each with "role" and "content"), or "text"; other keys are
    metadata that nobody reads.
    """

    def __init__(self, path: Path) -> None:
        _require(path.is_file(), "path", "a JSONL file", path)
        self._path = path

    def documents(self) -> list[Document]:
        """Every line that is not blank, found by its line end, not parsed."""
        found, position = [], 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if size := len(line.strip()):
                    name = f"{self._path}:{number}"
                    found.append(Document(name=name, unit=name, size_bytes=size, position=position))
                position += len(line)
        _require(bool(found), "path", "a JSONL file with at least one line", f"{self._path} (empty)")
        return found

    def read(self, document: Document) -> Iterator[Record]:
        """One record; UserError with file:line, key, rule and value when the line is malformed."""
        with self._path.open("rb") as file:
            file.seek(document.position)
            line = file.readline()
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise UserError(f"{document.name} must be UTF-8 text, got {_bad_byte(error)}") from None
        except json.JSONDecodeError as error:
            raise UserError(
                f"{document.name} must be one JSON object, got: {error.msg} at column {error.colno}"
            ) from None
        yield parse_row(row, document.name)


class HubDataset:
    """A dataset of the Hugging Face hub: each row is one document and one unit, of the same keys as a JSONL line.

    The size of a row is not known before it is read, so all rows count as equal.
    """

    def __init__(self, repo: str, split: str) -> None:
        try:
            import datasets
        except ModuleNotFoundError:
            remedy = "pip install distributed-llm-lab[hub]"
            raise UserError(f"project.data.source must be one that is installed, got 'hub': {remedy}") from None
        try:
            self._rows = datasets.load_dataset(repo, split=split)
        except (OSError, ValueError) as error:  # no network, no such dataset, no such split
            first = str(error).strip().splitlines()[0]
            raise UserError(
                f"project.data.repo must be a dataset with split {split!r}, got {repo!r}: {first}"
            ) from None
        _require(len(self._rows) > 0, "repo", "a dataset with at least one row", repo)
        self._repo = repo

    def documents(self) -> list[Document]:
        """Every row, in the dataset's order."""
        names = (f"{self._repo}:{row}" for row in range(len(self._rows)))
        return [Document(name=name, unit=name, size_bytes=1, position=row) for row, name in enumerate(names)]

    def read(self, document: Document) -> Iterator[Record]:
        """One record; UserError with repo:row, key, rule and value when the row has not the keys of a JSONL line."""
        yield parse_row(self._rows[document.position], document.name)


def parse_row(row: Any, name: str) -> Record:
    """The record that a JSON value holds; UserError with `name`, key, rule and value when it holds none.

    Values that may be somebody's text are described, not quoted: messages like these end up in logs.
    """
    _require_row(isinstance(row, dict), name, "be a JSON object", row)
    if "messages" in row:
        return Dialogue(_parse_messages(row["messages"], name), name)
    if "prompt" in row and "response" in row:
        prompt, response = _parse_text(row, "prompt", name), _parse_text(row, "response", name)
        return Dialogue((Message("user", prompt), Message("assistant", response)), name)
    rule = 'have "prompt" and "response", or "messages", or "text"'
    if "text" not in row:
        raise UserError(f"{name} must {rule}, got the keys {sorted(map(str, row))[:8]}")
    return Text(_parse_text(row, "text", name))


def _parse_messages(messages: Any, name: str) -> tuple[Message, ...]:
    _require_row(
        isinstance(messages, list) and bool(messages), f"{name} messages", "be a list that is not empty", messages
    )
    return tuple(_parse_message(message, f"{name} messages[{index}]") for index, message in enumerate(messages))


def _parse_message(message: Any, name: str) -> Message:
    _require_row(isinstance(message, dict), name, "be an object with role and content", message)
    role = message.get("role")
    if role not in ROLES:
        value = repr(role[:32]) if isinstance(role, str) else _kind(role)
        raise UserError(f"{name}.role must be one of {', '.join(ROLES)}, got {value}")
    _require_row(isinstance(message.get("content"), str), f"{name}.content", "be text", message.get("content"))
    return Message(role, message["content"])


def _parse_text(row: dict[str, Any], key: str, name: str) -> str:
    value = row[key]
    _require_row(isinstance(value, str) and bool(value), f"{name} {key}", "be text that is not empty", value)
    return str(value)


def _require_row(holds: bool, name: str, rule: str, value: Any) -> None:
    if not holds:
        raise UserError(f"{name} must {rule}, got {_kind(value)}")


def _kind(value: Any) -> str:
    """What `value` is, without saying what stands in it."""
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    kind = {"str": "text", "list": "a list", "dict": "an object"}.get(type(value).__name__)
    return f"{kind} of length {len(value)}" if kind else type(value).__name__


def _bad_byte(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} at offset {error.start}"


def _require(holds: bool, key: str, rule: str, value: object) -> None:
    if not holds:
        raise UserError(f"project.data.{key} must be {rule}, got '{value}'")


def _files(root: Path, suffixes: Collection[str] | None = None, skip: Collection[str] = ()) -> Iterator[Path]:
    """Files below `root`, sorted; no hidden ones, none below a folder named in `skip`."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in skip and not name.startswith("."))
        paths = (Path(folder, name) for name in sorted(names) if not name.startswith("."))
        yield from (path for path in paths if suffixes is None or path.suffix in suffixes)


def _file_document(root: Path, file: Path) -> Document:
    relative = file.relative_to(root)
    unit = relative.parts[0].removesuffix(".py")
    return Document(name=relative.as_posix(), unit=unit, size_bytes=file.stat().st_size)


def examples(records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> list[Example]:
    """Records as token ids with the mask of what the loss counts.

    A text becomes windows of `sequence_length` that do not overlap, with the end-of-text token behind it; all of it
    counts. A last window of a single token has nothing to predict and is left out. A dialogue becomes one example, cut
    at its end, in which only the assistant's answers count, each up to and with the token that ends it.

    Dialogues of which no answer is left, and answers that the chat template does not keep as it would generate them
    (some drop the reasoning of earlier turns), are counted in one warning each. UserError when a dialogue does not suit
    the template.
    """
    found: list[Example] = []
    empty = uncounted = 0
    for record in records:
        if isinstance(record, Text):
            found += _windows(record.text, tokenizer, sequence_length)
            continue
        example, lost = _dialogue(record, tokenizer, sequence_length)
        uncounted += lost
        if example.targets:
            found.append(example)
        else:
            empty += 1
    if empty:
        log.warning("%d dialogues skipped: no answer within the first %d tokens", empty, sequence_length)
    if uncounted:
        log.warning("%d answers not counted in the loss: the chat template rewrites them later on", uncounted)
    return found


def _windows(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[Example]:
    ids = _opening(tokenizer) + _encode(tokenizer, text)
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    ids_T = np.asarray(ids, dtype=np.int32)
    for start in range(0, len(ids_T) - 1, length):
        window = ids_T[start : start + length]
        if len(window) > 1:
            yield Example(window, np.ones(len(window), dtype=np.bool_))


def _dialogue(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase, length: int) -> tuple[Example, int]:
    """The example, and how many answers the template did not let us count."""
    if tokenizer.chat_template:
        pieces, lost = _template_pieces(dialogue, tokenizer)
        ids, counted = _join(pieces, tokenizer, opening=[])
    else:
        pieces, lost = _plain_pieces(dialogue, tokenizer), 0
        ids, counted = _join(pieces, tokenizer, _opening(tokenizer))
    return Example(np.asarray(ids[:length], dtype=np.int32), np.asarray(counted[:length], dtype=np.bool_)), lost


Piece = tuple[str, bool]
"""A stretch of a dialogue's text, and whether it is an answer."""


def _plain_pieces(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Without a chat template: a prompt, a newline, an answer, the end-of-text token."""
    end = str(tokenizer.eos_token or "")
    turns = (message.role == "assistant" for message in dialogue.messages)
    return [(m.content + (end if answer else "\n"), answer) for m, answer in zip(dialogue.messages, turns)]


def _template_pieces(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Piece], int]:
    """An answer is what the template adds to the text that it would have given the model to generate from.

    So nothing here knows a template. An answer that the whole dialogue shows differently is not one that a model would
    have to give there: it does not count, and the second value says how many those are.
    """
    messages = [asdict(message) for message in dialogue.messages]

    def render(count: int, generate: bool = False) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=generate))
        except TemplateError as error:
            raise UserError(f"{dialogue.name} must suit the model's chat template, got: {error}") from None

    whole = render(len(messages))
    pieces: list[Piece] = []
    done = lost = 0
    # An opening message of the assistant answers nothing.
    for index in (i for i, message in enumerate(dialogue.messages) if i and message.role == "assistant"):
        before, through = render(index, generate=True), render(index + 1)
        if not (whole.startswith(through) and through.startswith(before)):
            lost += 1
            continue
        pieces += [(whole[done : len(before)], False), (whole[len(before) : len(through)], True)]
        done = len(through)
    return [*pieces, (whole[done:], False)], lost


def _join(
    pieces: Iterable[Piece], tokenizer: PreTrainedTokenizerBase, opening: list[int]
) -> tuple[list[int], list[bool]]:
    """Token ids of all pieces and whether each counts.

    Where a prompt ends a token ends, as when the model generates: the ids are those of the whole text as long as they
    begin with those of the text so far, and where a token would straddle the boundary the new piece is tokenized alone.
    """
    ids, counted, text = list(opening), [False] * len(opening), ""
    for piece, counts in pieces:
        text += piece
        whole = opening + _encode(tokenizer, text)
        new = whole[len(ids) :] if whole[: len(ids)] == ids else _encode(tokenizer, piece)
        counting = _up_to_last(new, tokenizer.eos_token_id) if counts else 0
        ids += new
        counted += [True] * counting + [False] * (len(new) - counting)
    return ids, counted


def _up_to_last(ids: list[int], end: int | None) -> int:
    """Length of `ids` up to and with the last `end`: what a template writes behind it no model has to generate."""
    return len(ids) - ids[::-1].index(end) if end in ids else len(ids)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: a text longer than the model's context is no mistake here, it is cut afterwards.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text: the begin-of-text token, or nothing."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and list(tokenizer("")["input_ids"])[:1] == [begin] else []


def split_examples(
    examples: Iterable[Example], held_out_fraction: float, seed: int, max_examples: int, max_held_out: int
) -> Split:
    """Training and held-out part, decided by each example's content.

    An example's hash of (seed, token ids) is a number in [0, 1); those below `held_out_fraction` are held out. So
    the same token sequence stands on the same side wherever it turns up: twice in one text, or with two clients that
    know nothing of each other. Where that leaves one side empty, the lowest (highest) hash goes there alone. The caps
    (0: none) keep the first in hash order. UserError when there are fewer than two different examples.
    """
    unique = {_content_hash(example, seed): example for example in examples}
    if len(unique) < 2:
        raise UserError(f"project.data must give each reader at least 2 different examples, got {len(unique)}")
    ranked = sorted(unique)
    below = sum(int.from_bytes(digest) < held_out_fraction * 2**128 for digest in ranked)
    held_out = min(max(below, 1), len(ranked) - 1)
    return Split(
        train=[unique[digest] for digest in ranked[held_out:][: max_examples or None]],
        held_out=[unique[digest] for digest in ranked[:held_out][: max_held_out or None]],
    )


def _content_hash(example: Example, seed: int) -> bytes:
    ids = example.ids_T.astype("<i4").tobytes()
    return hashlib.blake2b(ids, digest_size=16, key=seed.to_bytes(8, "little")).digest()


def collate(examples: Sequence[Example]) -> Batch:
    """`examples` as one batch. Padding has id 0: nothing attends to it and no loss counts it."""
    shape = (len(examples), max(len(example.ids_T) for example in examples))
    ids_BT = torch.zeros(shape, dtype=torch.int64)
    attention_BT = torch.zeros(shape, dtype=torch.int64)
    labels_BT = torch.full(shape, IGNORED, dtype=torch.int64)
    for row, example in enumerate(examples):
        length = len(example.ids_T)
        ids_T = torch.from_numpy(example.ids_T.astype(np.int64))
        ids_BT[row, :length] = ids_T
        attention_BT[row, :length] = 1
        labels_BT[row, :length] = ids_T.masked_fill(~torch.from_numpy(example.counted_T), IGNORED)
    return Batch(ids_BT, attention_BT, labels_BT, sum(example.targets for example in examples))


def batches(examples: Sequence[Example], batch_size: int, seed: int) -> Iterator[Batch]:
    """Batches without end, in an order that depends on `seed` alone: one seeded permutation after the other.

    For a federated client the seed is `derive_seed(seed, "order", round, partition)` of lab/training.py.
    """
    assert examples, "batches need at least one example"
    order = _permutations(len(examples), seed)
    while True:
        yield collate([examples[index] for index in islice(order, batch_size)])


def _permutations(count: int, seed: int) -> Iterator[int]:
    generator = random.Random(seed)
    while True:
        permutation = list(range(count))
        generator.shuffle(permutation)
        yield from permutation
