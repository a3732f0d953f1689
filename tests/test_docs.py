"""What the pages say is so: links lead somewhere, defaults are those of conf/, figures those that were measured."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from lab.command.entry import compose_config
from lab.settings import to_plain
from tests.pages import LINKED, PAGES, ROOT, anchors_of, links_of, named, read, slug, tables_of
from tests.test_conf import COMMANDS

CONFIGS = {
    "docs/federated.md": "fed_learn",
    "docs/speculative.md": "spec_decoding",
    "docs/split-inference.md": "split_inf",
    "docs/split-training.md": "split_train",
    "docs/matrix.md": "matrix",
    "docs/configuration.md": "decode",  # sets none of the shared values itself
}
ARCHITECTURE = ROOT / "docs/architecture.md"
MOST_STOPS = 10
README_LINES = 160


@pytest.mark.parametrize("page", LINKED, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links_of(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links_of(ROOT / "README.md")}
    linked |= {(ROOT / "docs" / link.partition("#")[0]).resolve() for link in links_of(ROOT / "docs/configuration.md")}
    assert set(LINKED) - linked == {ROOT / "README.md"}


def test_an_anchor_is_what_github_makes_of_a_heading() -> None:
    assert slug("speculative_real: texts") == "speculative_real-texts"
    assert slug("bfloat16 on a CPU without 16-bit instructions") == "bfloat16-on-a-cpu-without-16-bit-instructions"
    assert slug("Split inference: run a model, alone") == "split-inference-run-a-model-alone"


def test_every_picture_is_shown_somewhere() -> None:
    shown = {(page.parent / link).resolve() for page in PAGES for link in links_of(page)}
    assert set((ROOT / "docs/images").iterdir()) <= shown


@pytest.mark.parametrize("page", CONFIGS)
def test_the_defaults_in_tables_are_those_of_conf(page: str) -> None:
    config = composed(CONFIGS[page])
    rows = [row for table in tables_of(ROOT / page) for row in table[1:] if table[0][:2] == ["setting", "default"]]
    assert len(rows) >= 9
    for key, default, *_ in rows:
        assert _has(config, key.strip("`")), key
        value = OmegaConf.select(config, key.strip("`"))
        value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else to_plain(value)
        assert value == yaml.safe_load(default), f"{key} is {value!r}"


@pytest.mark.parametrize("page", CONFIGS)
def test_settings_that_a_page_names_exist(page: str) -> None:
    """In the page's own command or in another one that it speaks of: its benchmark, its planner."""
    configs = [composed(name) for name in COMMANDS]
    keys = set(re.findall(r"`((?:project|model|network|device|matrix)\.[a-z_.]+[a-z])[`=]", read(ROOT / page)))
    assert len(keys) >= 9
    assert [key for key in keys if not any(_has(config, key) for config in configs)] == []


@functools.cache
def composed(name: str) -> DictConfig:
    return compose_config(name, [])


def _has(config: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    group = OmegaConf.select(config, parent) if parent else config
    return isinstance(group, DictConfig) and name in group


def _measured(text: str) -> list[float]:
    """The numbers of a text, those in milliseconds as seconds, too."""
    numbers = [float(number.replace(",", "")) for number in re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", text)]
    return numbers + [number / 1000 for number in numbers if " ms" in text]


GLANCE = next(table for table in tables_of(ROOT / "README.md") if table[0] == ["what", "measured", "target"])


@pytest.mark.parametrize("row", GLANCE[1:], ids=lambda row: row[0].partition("]")[0].strip("["))
def test_figures_at_a_glance_are_those_of_the_results(row: list[str]) -> None:
    """Each number stands in the section that the row (or the one before) links to; a miss is bold."""
    linked = [each for each in GLANCE[1 : GLANCE.index(row) + 1] if "RESULTS.md#" in each[0]][-1]
    anchor = re.findall(r"RESULTS\.md#([\w-]+)", linked[0])[0]
    section = _section(anchor)
    known = set(_measured(section))
    for part in re.split(r", (?=\D)|(?<=x), ", row[1].replace("**", "")):
        assert any(number in known for number in _measured(part)), f"{part!r} is not in {anchor}"
    assert ("**" in row[1]) == (f"(#{anchor})" in _section("missed-targets") and "no" in _misses(section, row[1]))


def _section(anchor: str) -> str:
    sections = re.split(r"^(?=#+ )", read(ROOT / "benchmarks/RESULTS.md"), flags=re.MULTILINE)
    return next(text for text in sections if text.startswith("#") and slug(text.splitlines()[0].lstrip("# ")) == anchor)


def _misses(section: str, figure: str) -> str:
    """`no` where the section says of one of these figures that its target does not hold."""
    wanted = set(_measured(figure))
    lines = [line for line in section.splitlines() if line.endswith("| no |")]
    single = "no" if "| holds | no |" in lines else ""
    return single or next(("no" for line in lines if wanted & set(_measured(line.replace(" x ", " ")))), "")


JOURNEYS = {
    heading: re.findall(r"^\d+\. (.*)$", text, flags=re.MULTILINE)
    for heading, text in re.findall(r"^### (.+?)\n(.*?)(?=^#|\Z)", read(ARCHITECTURE), flags=re.MULTILINE | re.DOTALL)
}


def test_there_are_four_journeys() -> None:
    assert len(JOURNEYS) == 4


@pytest.mark.parametrize("journey", JOURNEYS)
def test_a_journey_leads_through_code_that_exists(journey: str) -> None:
    stops = JOURNEYS[journey]
    assert 5 <= len(stops) <= MOST_STOPS
    for stop in stops:
        places = re.findall(r"`([\w/]+\.py):([\w.]+)`", stop)
        assert places, stop
        for file, name in places:
            there = [known for known in _names(ROOT / file) if f".{known}".endswith(f".{name}")]
            assert there, f"{file} has no {name}"


def _names(file: Path) -> set[str]:
    """Functions, classes and methods of a module, dotted."""
    found: set[str] = set()

    def visit(node: ast.AST, path: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(f"{path}{child.name}")
                visit(child, f"{path}{child.name}.")

    visit(ast.parse(file.read_text(encoding="utf-8")), "")
    return found


def test_the_readme_is_read_in_minutes() -> None:
    assert len(read(ROOT / "README.md").splitlines()) <= README_LINES
