"""Sources of text: their documents, and the records in them.

Knows nothing about clients, tokenizers or models. A source lists its documents from file sizes and line ends alone,
unless `project.data.unit` names a key; a document's text is learnt only by the client that reads it.
"""

import codecs
import json
import logging
import os
import sysconfig
import tokenize
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from lab.files import path_as_typed
from lab.learning.records import MalformedRecord, Record, Text, bad_byte, parse_line, parse_row
from lab.settings import DataSettings, DataSource, UserError

log = logging.getLogger(__name__)

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
    """One text of a source; name and size are known before it is read."""

    name: str
    """Path below the source, or file:line, for messages."""
    unit: str
    """Group of documents: a top-level package, a folder, a line, an author."""
    size_bytes: int
    position: int = 0
    """Position in the source: first byte of the line (jsonl), row (hub)."""


class Source(Protocol):
    """A source of text."""

    def documents(self) -> list[Document]:
        """Every document, in an order that is the same on every call; reads no text. UserError when there is none."""

    def read(self, document: Document) -> Iterator[Record]:
        """The records of one document; MalformedRecord with its name, key, rule and value when it is malformed."""


def open_source(settings: DataSettings) -> Source:
    """The source in `settings`; UserError with the dotted key if its file or folder is not named or does not exist."""
    if settings.source in (DataSource.jsonl, DataSource.text) and not settings.path:
        raise UserError(f"project.data.path must be set for source={settings.source.name}, got {settings.path!r}")
    match settings.source:
        case DataSource.python_stdlib:
            return PythonLibrary(Path(sysconfig.get_path("stdlib")))
        case DataSource.jsonl:
            return JsonLines(path_as_typed(settings.path or "", "project.data.path"), settings.unit)
        case DataSource.text:
            return TextFolder(path_as_typed(settings.path or "", "project.data.path"))
        case DataSource.hub:
            return HubDataset(settings.repo or "", settings.split, settings.unit)


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
        """One text; MalformedRecord when it is not UTF-8."""
        with _opened(self._root / document.name) as file:
            content = file.read()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise MalformedRecord(f"{document.name} must be UTF-8 text, got {bad_byte(error)}") from None
        yield Text(text.replace("\r\n", "\n").replace("\r", "\n"))


class JsonLines:
    """A JSONL file: each line that is not blank is one document, of a format of `lab.learning.records`. Its unit is the
    value of `unit_key`, if there is one."""

    def __init__(self, path: Path, unit_key: str | None = None) -> None:
        _require(path.is_file(), "path", "a JSONL file", path)
        self._path, self._unit_key = path, unit_key

    def documents(self) -> list[Document]:
        """Every line that is not blank, found by its line end; parsed only for its unit."""
        found, position = [], 0
        with _opened(self._path) as file:
            for number, line in enumerate(file, start=1):
                text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if size := len(text.strip()):
                    name = f"{self._path}:{number}"
                    unit = name if self._unit_key is None else _unit_of(text, self._unit_key, name)
                    found.append(Document(name=name, unit=unit, size_bytes=size, position=position))
                position += len(line)
        _require(bool(found), "path", "a JSONL file with at least one line", f"{self._path} (empty)")
        return found

    def read(self, document: Document) -> Iterator[Record]:
        """One record; MalformedRecord with file:line, key, rule and value when the line is malformed."""
        with _opened(self._path) as file:
            file.seek(document.position)
            line = file.readline()
        yield parse_line(line, document.name)


def _unit_of(line: bytes, key: str, name: str) -> str:
    """The unit of a line; its name if it has none: a malformed line is reported when its client reads it."""
    try:
        value = json.loads(line)[key]
    except (ValueError, LookupError, TypeError, RecursionError):
        return name
    return _unit(value, key, name)


def _unit(value: Any, key: str, name: str) -> str:
    if not isinstance(value, str | int):
        raise UserError(
            f"project.data.unit must name a text or a whole number in each record, got {key!r}, of another"
            f" type in {name}"
        )
    return str(value)


class HubDataset:
    """A dataset of the Hugging Face hub: each row is one document, of the same keys as a JSONL line. Its unit is the
    value of `unit_key`, if there is one.

    The size of a row is not known before it is read, so all rows count as equal.
    """

    def __init__(self, repo: str, split: str, unit_key: str | None = None) -> None:
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
        has_key = unit_key is None or unit_key in self._rows.column_names
        _require(has_key, "unit", f"a column of the dataset ({', '.join(self._rows.column_names)})", unit_key)
        self._repo, self._unit_key = repo, unit_key

    def documents(self) -> list[Document]:
        """Every row, in the dataset's order."""
        names = [f"{self._repo}:{row}" for row in range(len(self._rows))]
        units = names
        if (key := self._unit_key) is not None:
            units = [_unit(value, key, name) for value, name in zip(self._rows[key], names, strict=True)]
        return [
            Document(name=name, unit=unit, size_bytes=1, position=row)
            for row, (name, unit) in enumerate(zip(names, units, strict=True))
        ]

    def read(self, document: Document) -> Iterator[Record]:
        """One record; MalformedRecord with repo:row, key, rule and value when its keys are not those of a line."""
        yield parse_row(self._rows[document.position], document.name)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file of the user, open for reading; UserError if it cannot be read."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"project.data.path must be readable, got {str(path)!r} ({error.strerror})") from None
    with file:
        yield file


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
