"""What the pages say is so: links lead somewhere, defaults are those of conf/, figures those that were measured."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from lab.command.entry import compose_config
from lab.figures import number
from lab.settings import to_plain
from simulations.results import known_figures, soak_rows
from tests.pages import LINKED, PAGES, ROOT, anchors_of, links_of, named, read, slug, tables_of
from tests.test_conf import COMMANDS

CONFIGS = {
    "docs/federated.md": "fed_learn",
    "docs/speculative.md": "spec_decoding",
    "docs/split-inference.md": "split_inf",
    "docs/split-training.md": "split_train",
    "docs/matrix.md": "matrix",
    "docs/serve.md": "serve",
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


REPORTS = ROOT / "benchmarks/results"
FOUND = known_figures(REPORTS)
GLANCE = next(table for table in tables_of(ROOT / "README.md") if table[0] == ["what", "measured", "target"])


TEXTS = ("edit", "prose")
"""Those of the benchmark with the real model that the README shows."""


def measured(benchmark: str, kind: str, **values: Any) -> dict[str, Any]:
    """The row of a benchmark that has these values."""
    rows = [row for row in FOUND[benchmark]["rows"] if kind in (row.get("part"), row.get("row"))]
    [found] = [row for row in rows if values.items() <= row.items()]
    return found


def shown(row: dict[str, Any], key: str, form: str = "{} x", scale: float = 1.0) -> str:
    """A figure of a row as the README has it: three digits of the median; bold where the row misses its target."""
    value = row[key]["median"] if isinstance(row[key], dict) else row[key]
    text = form.format(number(value * scale) if isinstance(value, float) and value else f"{value:,g}")
    return text if row.get("holds", True) else f"**{text}**"


def _over_one(ratio: dict[str, float]) -> str:
    figure = f"{number(ratio['median'])} x"
    return figure if ratio["median"] >= 1 else f"**{figure}**"


def at_a_glance() -> list[tuple[str, str]]:
    """What the README's table of results must say: the anchor of each row's figures, and the figures."""
    real = functools.partial(measured, "speculative_real", "texts", mode="async")
    crowd = functools.partial(measured, "speculative_real", "crowd", drafters=8)
    ratio = measured("federated", "comparison")["perplexity_ratio"]
    spread = f"{{}} ({number(ratio['low'])} – {number(ratio['high'])})"
    identity, proved = soak_rows(REPORTS)["async_identity"], measured("architectures", "architectures")
    chain, documents = soak_rows(REPORTS)["chain_killed"], measured("serve", "schema")
    peers = measured("clients_openai", "openai_tests")
    loads = [measured("serve", "load", streams=streams) for streams in (1, 4, 16)]
    far, near = 0.1, 0.0
    message = measured("federated", "message", model="SmolLM2-135M-Instruct")
    away = measured("speculative", "loops", mode="async", rtt_seconds=0.05)
    at = {text: {rtt: shown(real(text=text, rtt_seconds=rtt), "speedup") for rtt in (near, far)} for text in TEXTS}
    eight = [shown(crowd(text=text), "over_one") for text in ("all", *TEXTS)]
    over = message["overhead_bytes"] / message["adapter_bytes"]
    decode, four = measured("engine", "decode"), measured("engine", "texts", texts=4)
    beside = [_over_one(row["int4_over_llama_cpp"]) for row in (decode, four)]
    behind = [measured("speculative_int4", "llama_cpp", text=text)["over_its_best"] for text in ("edit", "summary")]
    added = measured("split", "added_tcp")["added_over_whole_seconds"]
    between = f"({number(1000 * added['low'])} – {number(1000 * added['high'])})"
    return [
        ("federated-comparison", shown(measured("federated", "comparison"), "perplexity_ratio", spread)),
        ("federated-message", f"{message['message_bytes']:,} bytes, {over:.2%} over its tensors".replace("%", " %")),
        ("soak-async_identity", f"{identity['differing']} of {identity['tokens']:,}"),
        ("speculative-loops", shown(away, "speedup")),
        ("speculative_real-texts", f"{at['edit'][near]}, {at['prose'][near]}"),
        ("speculative_real-texts", f"{at['edit'][far]}, {at['prose'][far]}"),
        ("speculative_real-crowd", ", ".join(eight)),
        ("engine-decode", "; ".join(beside)),
        ("speculative_int4-llama_cpp", ", ".join(map(_over_one, behind))),
        (
            "split-added_tcp",
            f"{shown(measured('split', 'added_tcp'), 'added_over_whole_seconds', '{} ms', 1000)} {between}",
        ),
        ("split-speculation", shown(measured("split", "speculation"), "drafted_over_alone")),
        ("split_training-throughput", shown(measured("split_training", "throughput"), "split_over_unsplit")),
        ("split_training-adapter", shown(measured("split_training", "adapter"), "largest_difference", "{}")),
        ("soak-chain_killed", f"{chain['differing']} of {chain['texts']}"),
        ("serve-load", ", ".join(_over_one(load["over_llama_cpp"]) for load in loads)),
        (
            "clients_openai-openai_tests",
            ", ".join(number(peers[f"{who}_share"]) for who in ("passed", "transformers_serve")),
        ),
        ("serve-schema", f"{documents['valid']} of {documents['documents']}, {number(documents['over_plain'])} x"),
        ("serve-second_turn", shown(measured("serve", "second_turn"), "over_cold")),
        ("architectures-architectures", f"{proved['proved']} of {proved['tried']}"),
    ]


def test_figures_at_a_glance_are_those_of_the_results() -> None:
    expected = at_a_glance()
    assert [row[1] for row in GLANCE[1:]] == [figures for _, figures in expected]
    base = measured("federated", "message", model="SmolLM2-135M-Instruct")["base_bytes"]
    assert f"base model: {base / 1e6:.0f} MB" in GLANCE[2][0]
    anchors = [re.findall(r"RESULTS\.md#([\w-]+)", row[0]) for row in GLANCE[1:]]
    assert [anchor or [wanted] for anchor, (wanted, _) in zip(anchors, expected, strict=True)] == [
        [wanted] for wanted, _ in expected
    ]


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
            assert name in _names(ROOT / file), f"{file} has no {name}"


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
