import json
import sys
import types
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from lab.learning.data import Document, PythonLibrary, open_source
from lab.learning.records import Dialogue, Message, Text
from lab.settings import DataSettings, DataSource, UserError


def data_settings(**changes: Any) -> DataSettings:
    values: dict[str, Any] = {
        "source": DataSource.python_stdlib,
        "path": None,
        "repo": None,
        "split": "train",
        "unit": None,
        "sequence_length": 64,
        "held_out_fraction": 0.1,
        "max_examples": 0,
        "max_held_out": 0,
        "library_examples": 0,
        "library_held_out": 0,
    }
    return DataSettings(**(values | changes))


def test_the_standard_library_is_about_two_hundred_units() -> None:
    source = open_source(data_settings())
    documents = source.documents()
    units = {document.unit for document in documents}
    assert 150 <= len(units) <= 400
    assert {"json", "asyncio", "argparse", "email"} <= units
    assert sum(document.size_bytes for document in documents) > 5_000_000
    assert documents == open_source(data_settings()).documents()
    assert len({document.name for document in documents}) == len(documents)
    assert all(document.size_bytes > 0 for document in documents)


def test_tests_installed_packages_and_build_descriptions_are_left_out(tmp_path: Path) -> None:
    kept = ["json/decoder.py", "abc.py"]
    left_out = [
        "test/test_abc.py",
        "json/tests/x.py",
        "idlelib/idle_test/x.py",
        "site-packages/torch/a.py",
        "json/__pycache__/a.py",
        "_sysconfigdata__linux.py",
        "config-3.11-linux/python-config.py",
        "json/data.txt",
    ]
    for name in kept + left_out:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1")
    (tmp_path / "json/__init__.py").touch()
    documents = PythonLibrary(tmp_path).documents()
    assert [(document.name, document.unit) for document in documents] == [
        ("abc.py", "abc"),
        ("json/decoder.py", "json"),
    ]


def test_every_document_of_the_standard_library_can_be_read() -> None:
    source = open_source(data_settings())
    documents = source.documents()
    texts = list(chain.from_iterable(map(source.read, documents)))
    assert len(texts) == len(documents)
    assert all(isinstance(record, Text) and record.text for record in texts)


def write_lines(path: Path, *lines: str) -> DataSettings:
    path.write_text("\n".join(lines), encoding="utf-8")
    return data_settings(source=DataSource.jsonl, path=str(path))


def test_lines_become_records(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    chat = {"messages": [{"role": "user", "content": "ü"}, {"role": "assistant", "content": ""}], "id": 7}
    source = open_source(
        write_lines(path, json.dumps({"prompt": "p", "response": "r"}), "", json.dumps(chat), '{"text": "é"}')
    )
    documents = source.documents()
    assert [document.name for document in documents] == [f"{path}:1", f"{path}:3", f"{path}:4"]
    assert len({document.unit for document in documents}) == 3
    assert [next(source.read(document)) for document in reversed(documents)] == [
        Text("é", whole=True),
        Dialogue((Message("user", "ü"), Message("assistant", "")), f"{path}:3"),
        Dialogue((Message("user", "p"), Message("assistant", "r")), f"{path}:1"),
    ]


def test_only_ones_own_lines_are_parsed(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    source = open_source(write_lines(path, '{"text": "mine"}', "{not mine}"))
    mine, other = source.documents()
    assert list(source.read(mine)) == [Text("mine", whole=True)]
    with pytest.raises(UserError, match=r"data\.jsonl:2 must be one JSON object, got: .* at column 2"):
        list(source.read(other))


@pytest.mark.parametrize(
    "content", [b'{"text": "caf\xe9"}', b'{"text": "the canary sings"', b'{"text": ["the canary"]}']
)
def test_a_message_about_a_line_does_not_quote_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.jsonl").write_bytes(content)
    source = open_source(data_settings(source=DataSource.jsonl, path=str(tmp_path / "d.jsonl")))
    with pytest.raises(UserError, match=r"d\.jsonl:1 ") as caught:
        list(chain.from_iterable(map(source.read, source.documents())))
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "make", "rule"),
    [
        (DataSource.jsonl, lambda path: None, "a JSONL file"),
        (DataSource.jsonl, Path.mkdir, "a JSONL file"),
        (DataSource.jsonl, Path.touch, "a JSONL file with at least one line"),
        (DataSource.text, lambda path: None, "a folder of text files"),
        (DataSource.text, Path.mkdir, "a folder with text in files of .txt"),
    ],
)
def test_a_missing_or_empty_path_is_named(
    tmp_path: Path, source: DataSource, make: Callable[[Path], None], rule: str
) -> None:
    make(tmp_path / "data")
    with pytest.raises(UserError) as caught:
        open_source(data_settings(source=source, path=str(tmp_path / "data"))).documents()
    assert str(caught.value).startswith(f"project.data.path must be {rule}")
    assert f"got '{tmp_path / 'data'}" in str(caught.value)


@pytest.mark.parametrize("source", [DataSource.jsonl, DataSource.text])
@pytest.mark.parametrize("path", [None, ""])
def test_a_path_may_be_left_to_each_reader_but_not_by_all(source: DataSource, path: str | None) -> None:
    settings = data_settings(source=source, path=path)
    with pytest.raises(UserError, match=rf"^project\.data\.path must be set for source={source.name}, got {path!r}$"):
        open_source(settings)


def test_a_mark_of_the_byte_order_is_no_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\r\n \t\r\n\xef\xbb\xbf" + b'{"text": "a"}\r\n')
    source = open_source(data_settings(source=DataSource.jsonl, path=str(path)))
    assert [document.name for document in source.documents()] == [f"{path}:3"]
    assert list(chain.from_iterable(map(source.read, source.documents()))) == [Text("a", whole=True)]


@pytest.mark.parametrize(
    ("changes", "caps"),
    [
        ({"source": DataSource.python_stdlib}, (256, 16)),
        ({"source": DataSource.python_stdlib, "max_examples": 0, "max_held_out": 5}, (0, 5)),
        ({"source": DataSource.jsonl, "path": "x"}, (0, 0)),
        ({"source": DataSource.text, "path": "x", "max_examples": 7}, (7, 0)),
    ],
)
def test_only_the_python_library_is_capped_unasked(changes: dict[str, Any], caps: tuple[int, int]) -> None:
    unset = {"max_examples": None, "max_held_out": None, "library_examples": 256, "library_held_out": 16}
    assert data_settings(**(unset | changes)).caps == caps


def test_a_folder_of_texts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ["a/one.txt", "a/b/two.md", "three.txt", "picture.png", ".hidden/x.txt", "bad.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    source = open_source(data_settings(source=DataSource.text, path=str(tmp_path)))
    documents = {document.name: document for document in source.documents()}
    assert {name: document.unit for name, document in documents.items()} == {
        "a/one.txt": "a",
        "a/b/two.md": "a",
        "bad.txt": "bad.txt",
        "three.txt": "three.txt",
    }
    assert "project.data.path: 1 files do not end in one of" in caplog.text
    assert list(source.read(documents["a/b/two.md"])) == [Text("a/b/two.md")]
    with pytest.raises(UserError, match=r"bad\.txt must be UTF-8 text, got byte 0xff at offset 2"):
        list(source.read(documents["bad.txt"]))


class FakeRows(list[dict[str, str]]):
    """As `datasets` hands out rows: by number, one at a time."""

    column_names = ("text", "prompt", "response", "author")

    def __iter__(self) -> Iterator[dict[str, str]]:
        raise AssertionError("reads rows of others")

    @override
    def __getitem__(self, key: Any) -> Any:
        return ["Ann", "Bob"] if key == "author" else super().__getitem__(key)


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(repo: str, split: str) -> FakeRows:
        if repo != "org/texts":
            raise FileNotFoundError(f"Dataset '{repo}' doesn't exist on the Hub\nmore lines")
        return FakeRows([{"text": "zero"}, {"prompt": "p", "response": "r"}])

    module = types.ModuleType("datasets")
    monkeypatch.setattr(module, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", module)


@pytest.mark.usefixtures("fake_hub")
def test_rows_of_a_hub_dataset() -> None:
    source = open_source(data_settings(source=DataSource.hub, repo="org/texts"))
    zero, one = source.documents()
    assert zero == Document(name="org/texts:0", unit="org/texts:0", size_bytes=1, position=0)
    assert list(source.read(one)) == [Dialogue((Message("user", "p"), Message("assistant", "r")), "org/texts:1")]


@pytest.mark.usefixtures("fake_hub")
def test_a_column_of_a_hub_dataset_names_the_units() -> None:
    source = open_source(data_settings(source=DataSource.hub, repo="org/texts", unit="author"))
    assert [document.unit for document in source.documents()] == ["Ann", "Bob"]
    with pytest.raises(UserError, match=r"^project\.data\.unit must be a column .*\(text, prompt, .*, got 'writer'$"):
        open_source(data_settings(source=DataSource.hub, repo="org/texts", unit="writer"))


@pytest.mark.usefixtures("fake_hub")
def test_a_hub_dataset_that_does_not_exist() -> None:
    with pytest.raises(UserError, match=r"project\.data\.repo must be .* got 'org/none': Dataset .* on the Hub$"):
        open_source(data_settings(source=DataSource.hub, repo="org/none"))


def test_the_hub_needs_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install distributed-llm-lab\[hub\]"):
        open_source(data_settings(source=DataSource.hub, repo="org/texts"))


def test_a_key_of_each_line_names_its_unit(tmp_path: Path) -> None:
    path = tmp_path / "letters.jsonl"
    lines = ['{"text": "a", "author": "Ann"}', "broken", '{"text": "b", "author": 7}', '{"text": "c"}']
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    source = open_source(data_settings(source=DataSource.jsonl, path=str(path), unit="author"))
    assert [document.unit for document in source.documents()] == ["Ann", f"{path}:2", "7", f"{path}:4"]
    assert list(source.read(source.documents()[0])) == [Text("a", whole=True)]
    path.write_text('{"text": "a", "author": ["secret"]}\n', encoding="utf-8")
    with pytest.raises(
        UserError, match=r"^project\.data\.unit must name a text or a whole number .*jsonl:1$"
    ) as caught:
        source.documents()
    assert "secret" not in str(caught.value)
