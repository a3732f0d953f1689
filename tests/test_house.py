"""The structure of the house: small rooms, arrows that point down, no copies, docstrings that name things.

Read as text: nothing of ours is imported. Every rule has its negative control.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TypeGuard

import pytest

from lab.environment import PACKAGES

ROOT = Path(__file__).resolve().parent.parent
PILLARS = ("fl", "speculative", "split", "matrix")
MAY_IMPORT = {
    "conf": set(),
    "lab": set(),
    "fl": {"lab"},
    "speculative": {"lab"},
    "split": {"lab"},
    "matrix": {"lab"},
    "serve": {"lab", "fl", "speculative", "split"},
    "simulations": {"lab", "fl", "speculative", "split", "matrix", "serve"},
}
"""The packages of ours that each may import, besides itself and conf."""
WIRE_MAY_IMPORT = {"lab.wire", "lab.faults"}
"""The wire is below the rest of lab."""
MOST_MODULES = 18
MOST_LINES = 6
"""Of a copy between two pillars."""
COPIES: dict[str, str] = {}
"""First line of each copy that is longer and stays, with the reason."""
UNNAMED = ("Of ", "So many", "So long", "What ", "Who", "Whose ")
"""Beginnings of docstrings that do not name the thing."""
MOST_UNNAMED = 20

Sources = Mapping[str, str]
"""Texts of modules by dotted name; a package goes by `package.__init__`."""


def sources(packages: Iterable[str] = (*PACKAGES, "conf")) -> Sources:
    files = [file for package in packages for file in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file.read_text(encoding="utf-8") for file in files}


HOUSE = sources()


def full_rooms(texts: Sources) -> dict[str, int]:
    rooms = Counter(name.rpartition(".")[0] for name in texts if not name.endswith(".__init__"))
    return {room: count for room, count in rooms.items() if count > MOST_MODULES}


def test_a_room_has_at_most_18_modules() -> None:
    assert full_rooms(HOUSE) == {}


def test_a_room_with_19_modules_is_too_full() -> None:
    assert full_rooms({f"lab.room.m{number}": "" for number in range(MOST_MODULES)}) == {}
    assert full_rooms({f"lab.room.m{number}": "" for number in range(MOST_MODULES + 1)}) == {"lab.room": 19}


def imports(name: str, texts: Sources) -> set[str]:
    """The modules among `texts` that a module imports, at its top or later, but for types only."""
    found: set[str] = set()
    for node in _statements(_parsed(texts[name])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {module for found_name in found if (module := _module(found_name, texts)) and module != name}


@cache
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _statements(child)


def _module(name: str, texts: Sources) -> str | None:
    """The module, or the package's own, that a dotted name is; None for a name inside one, and for a stranger."""
    return next((module for module in (name, f"{name}.__init__") if module in texts), None)


def circles(texts: Sources) -> list[set[str]]:
    """Groups of modules that import each other, by whatever way (Tarjan's components)."""
    arrows = {name: imports(name, texts) for name in texts}
    reach: dict[str, set[str]] = {}
    for start in texts:
        seen, left = set[str](), [*arrows[start]]
        while left:
            if (module := left.pop()) not in seen:
                seen.add(module)
                left += arrows[module]
        reach[start] = seen
    found = {frozenset(other for other in reach[name] if name in reach[other]) for name in texts if name in reach[name]}
    return [set(circle) for circle in found]


def test_no_modules_import_each_other() -> None:
    assert circles(HOUSE) == []


def test_a_circle_of_three_is_found_also_where_it_is_closed_late() -> None:
    texts = {
        "a.one": "from a.two import x",
        "a.two": "import a.three",
        "a.three": "def late():\n    from a import one",
        "a.four": "from a.one import y",
    }
    assert circles(texts) == [{"a.one", "a.two", "a.three"}]
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a import one"
    assert circles(texts | {"a.three": typed}) == []


def wrong_arrows(texts: Sources) -> list[str]:
    found = []
    for name in texts:
        package = name.partition(".")[0]
        for other in sorted(imports(name, texts)):
            theirs = other.partition(".")[0]
            upwards = theirs not in {package, "conf"} | MAY_IMPORT[package]
            from_wire = name.startswith("lab.wire.") and not other.startswith(tuple(WIRE_MAY_IMPORT))
            if upwards or from_wire:
                found.append(f"{name} -> {other}")
    return found


def test_lab_knows_no_pillar_and_no_pillar_another_one() -> None:
    """The one seam, by which a verifier's target may be a split model, is opened by name: `lab.engine.kinds`."""
    assert wrong_arrows(HOUSE) == []
    named = [name for name, text in HOUSE.items() if "import_module(" in text and name.partition(".")[0] in PILLARS[:3]]
    named += [name for name, text in HOUSE.items() if "import_module(" in text and name.startswith("lab.")]
    assert named == ["lab.engine.kinds"], "another seam would be a hidden arrow"


@pytest.mark.parametrize(
    ("name", "text", "arrow"),
    [
        ("lab.files", "from split.settings import x", "lab.files -> split.settings"),
        ("speculative.late", "def f():\n    import split.settings", "speculative.late -> split.settings"),
        ("lab.wire.frames", "from lab.settings import x", "lab.wire.frames -> lab.settings"),
        ("fl.server", "from matrix import grid", "fl.server -> matrix.grid"),
    ],
)
def test_an_arrow_that_points_up_is_found(name: str, text: str, arrow: str) -> None:
    others = {"split.settings": "", "matrix.grid": "", "lab.settings": "", "lab.faults": ""}
    assert wrong_arrows({name: text, **others}) == [arrow]
    assert wrong_arrows({"lab.wire.frames": "from lab.faults import x", "simulations.y": "import fl", **others}) == []


@cache
def code_lines(text: str) -> list[str]:
    """The lines of a module without imports, docstrings, comments and line breaks within a statement's parts."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            plain = [part for part in body if not (_is_text(part) or isinstance(part, ast.Import | ast.ImportFrom))]
            node.body = plain or [ast.Pass()]  # type: ignore[attr-defined]
    return [line.strip() for line in ast.unparse(tree).splitlines() if line.strip() not in ("", "pass")]


def _is_text(node: ast.AST) -> TypeGuard[ast.Expr]:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def copies(ours: Sources, theirs: Sources) -> dict[str, str]:
    """Where more than `MOST_LINES` lines of code stand in both: their first line, and the two modules."""
    windows: dict[tuple[str, ...], str] = {}
    for name, text in ours.items():
        lines = code_lines(text)
        for window in zip(*(lines[start:] for start in range(MOST_LINES + 1))):
            windows.setdefault(window, name)
    found: dict[str, str] = {}
    for name, text in theirs.items():
        lines, last = code_lines(text), -2
        for place, window in enumerate(zip(*(lines[start:] for start in range(MOST_LINES + 1)))):
            if window in windows:
                if place != last + 1:
                    found[window[0]] = f"{windows[window]} and {name}"
                last = place
    return found


def pillar(name: str) -> Sources:
    return {module: text for module, text in HOUSE.items() if module.startswith(f"{name}.")}


@pytest.mark.parametrize(("ours", "theirs"), [*itertools.combinations((*PILLARS, "lab", "simulations"), 2)])
def test_no_two_pillars_hold_a_copy(ours: str, theirs: str) -> None:
    found = copies(pillar(ours), pillar(theirs))
    assert {line: places for line, places in found.items() if line not in COPIES} == {}


def test_a_copy_of_seven_lines_is_found_under_other_docstrings_and_imports() -> None:
    body = "".join(f"    x{number} = {number}\n" for number in range(6))
    ours = {"a.m": f'import os\n\ndef f():\n    """Ours."""\n{body}'}
    theirs = {"b.m": f'def f():\n    """Theirs,\n    longer."""\n    import re\n{body}'}
    assert copies(ours, theirs) == {"def f():": "a.m and b.m"}
    fewer = {"b.m": theirs["b.m"].replace("    x3 = 3\n", "    y3 = 3\n")}
    assert copies(ours, fewer) == {}, "six lines in a row may be alike"


def docstrings(texts: Sources) -> Iterator[tuple[str, str]]:
    """Docstrings of modules, classes, functions and attributes: every text that is a statement of its own."""
    for name, text in texts.items():
        for node in ast.walk(_parsed(text)):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                yield f"{name}:{node.lineno}", node.value.value.strip()


def references(texts: Sources) -> list[str]:
    return [f"{place} {text}" for place, text in docstrings(texts) if re.fullmatch(r"See `[^`]*`\.?", text)]


def unnamed(texts: Sources) -> list[str]:
    return [f"{place} {text}" for place, text in docstrings(texts) if text.startswith(UNNAMED)]


@pytest.mark.parametrize("text", ["See `Engine.open`.", "See `lab.x`"])
def test_a_docstring_that_only_refers_is_found(text: str) -> None:
    assert references({"a.m": f'def f():\n    """{text}"""'}) == [f"a.m:2 {text}"]


def test_docstrings_that_name_nothing_are_found() -> None:
    text = 'class C:\n    """A class."""\n    x: int\n    """Of a pass."""\n    y: int\n    """Offset in bytes."""\n'
    assert unnamed({"a.m": text + '\n\ndef f():\n    """Who asks."""\n'}) == ["a.m:4 Of a pass.", "a.m:10 Who asks."]


def test_the_whole_house_was_read() -> None:
    assert len(HOUSE) > 150
    assert {name.partition(".")[0] for name in HOUSE} == {*PACKAGES, "conf"} == set(MAY_IMPORT)
