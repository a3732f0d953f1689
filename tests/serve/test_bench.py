"""The benchmark of the HTTP server at toy size, over real processes; no time is asserted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lab.command.entry import Run, compose_settings
from lab.engine.base import check_schema
from lab.settings import UserError
from lab.text.generation import grammars_of
from serve.bench.__main__ import PARTS, run
from serve.bench.client import Client
from serve.bench.documents import is_valid
from serve.bench.generators import nearest_rank, open_generator, prose
from serve.bench.peers import LeftOut, serving
from serve.bench.rig import Rig
from serve.bench.settings import ServeBenchSettings
from simulations.bench_settings import BenchmarkSettings
from simulations.results import results_page
from tests.shared import made_once

SMALL = (
    *("model=random", "model.quantization=none", "model.dtype=float32", "tracking=none", "project.context=1024"),
    *("project.overhead_tokens=8", "project.overhead_repeats=1", "project.history_tokens=300"),
    *("project.history_repeats=1", "project.documents=2", "project.document_tokens=16", "project.streams=[1]"),
    *("project.load_prompt_tokens=16", "project.load_new_tokens=4", "project.load_turns=1", "project.load_repeats=1"),
    "project.peers=[llama_cpp]",
)


def settings_of(*words: str) -> ServeBenchSettings:
    return compose_settings("serve_bench", [*SMALL, *words], ServeBenchSettings)


def _measured(folder: Path) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    affinity = os.sched_getaffinity(0)
    try:
        found: list[dict[str, Any]] = run(settings_of(), Run(folder))["rows"]
    finally:
        torch.set_num_threads(threads)
    assert os.sched_getaffinity(0) == affinity, "what runs after it has all cores again"
    return found


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Rows of all parts."""
    folder = made_once(tmp_path_factory, "serve_bench", _measured)
    return list(json.loads((folder / "bench.json").read_text())["rows"])


def of(rows: list[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["row"] == part]


def test_every_part_has_its_rows(rows: list[dict[str, Any]]) -> None:
    assert list(dict.fromkeys(row["row"] for row in rows)) == list(PARTS)
    for row in rows:
        assert row["row"] == "load" or {"target", "holds"} <= row.keys()


def test_http_and_the_scheduler_write_the_same_text(rows: list[dict[str, Any]]) -> None:
    [row] = of(rows, "overhead")
    assert row["same_text"]
    assert row["tokens"] == 8
    assert row["token_seconds"]["http"]["n"] == row["token_seconds"]["direct"]["n"] == row["added_seconds"]["n"] == 1


def test_only_one_of_the_two_servers_keeps_the_first_turn(rows: list[dict[str, Any]]) -> None:
    [row] = of(rows, "second_turn")
    assert row["same_text"]
    assert row["cold_cached_tokens"] == 0
    assert row["cached_tokens"] > 200


def test_documents_that_are_cut_are_not_valid(rows: list[dict[str, Any]]) -> None:
    """16 bytes are no whole document, so this row must miss its target."""
    [row] = of(rows, "schema")
    assert (row["documents"], row["same_texts"], row["valid"], row["holds"]) == (2, 2, 0, False)
    assert row["invalid_forms"] == ["person", "weather"]
    assert row["target"] == "valid 2, over_plain at least 1.5"


def test_a_peer_that_cannot_run_is_left_out_with_its_reason(rows: list[dict[str, Any]]) -> None:
    [row] = of(rows, "load")
    assert row["streams"] == 1
    assert row["left_out"] == {"llama_cpp": "the model is no GGUF file"}
    assert set(row["tokens_per_second"]) == {"serve", "serve_plain"}
    assert min(reading["low"] for reading in row["tokens_per_second"].values()) > 0
    assert "target" not in row, "without a peer there is nothing to compare with"


def test_the_page_of_results_shows_them(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    machine = {"cores": 2, "processor": "A CPU", "system": "Linux"}
    done = {"date": "2026-01-01 10:00:00", "commit": "abc", "machine": machine, "seconds": 1.0, "load_average": 0.5}
    done |= {"failure": None, "rows": rows}
    (tmp_path / "2026-01-01-abc.json").write_text(json.dumps({"benchmarks": {"serve": done}}))
    page = results_page([BenchmarkSettings(name="serve", command="serve.bench", overrides=[])], tmp_path)
    for part in PARTS:
        assert f"### serve: {part}\n" in page
    assert "| [serve: schema, 0.05](#serve-schema) | valid 2, over_plain at least 1.5 | valid 0; over_plain " in page
    assert "| left_out | llama_cpp the model is no GGUF file |" in page


def test_every_form_compiles_and_asks_about_each_subject_once() -> None:
    settings = compose_settings("serve_bench", ["model=random", "model.quantization=none"], ServeBenchSettings)
    forms, grammars = settings.project.forms, grammars_of(settings.model)
    for form in forms:
        check_schema(grammars, json.dumps(form.schema))
        assert form.prompt.format("it") != form.prompt
    assert sum(len(set(form.subjects)) for form in forms) == settings.project.documents == 50


def test_a_text_is_held_against_its_schema() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert is_valid('{"a": 1}', schema)
    assert not is_valid('{"a": "1"}', schema)
    assert not is_valid('{"a": 1', schema)


def test_the_95th_percentile_is_a_reading() -> None:
    assert nearest_rank([float(n) for n in range(1, 21)], 0.95) == 19.0
    assert nearest_rank([3.0, 1.0], 0.95) == 3.0
    assert nearest_rank([1.0], 0.95) == 1.0


def test_no_two_loads_have_a_prompt_in_common(tmp_path: Path) -> None:
    rig = Rig(settings_of("project.load_prompt_tokens=64"), tmp_path)
    found = [prompt for number in range(4) for prompt in prose(rig, 8, number)]
    assert len(set(found)) == len(found) == 32


def test_what_cannot_be_measured_is_refused_or_left_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^project\.peers must be of llama_cpp, transformers, got \['vllm'\]$"):
        run(settings_of("project.peers=[vllm]"), Run(tmp_path))
    with pytest.raises(UserError, match=r"^project\.documents must be at most 50, one for each subject, got 51$"):
        settings_of("project.documents=51")
    with pytest.raises(UserError, match=r"^project\.guidellm must be an executable or null, got '/no/guidellm' "):
        open_generator(Rig(settings_of("project.guidellm=/no/guidellm"), tmp_path))
    impatient = Rig(settings_of("project.start_seconds=0.01"), tmp_path)
    with pytest.raises(LeftOut, match=r"^it was not ready within 0\.01 s"), serving("transformers", impatient, 1):
        raise AssertionError("it cannot be ready by then")


def test_a_request_that_fails_ends_the_benchmark() -> None:
    """Not a fast answer without tokens."""
    with Client("http://127.0.0.1:9", "x", 1.0) as client, pytest.raises(Exception, match="Connection refused"):
        client.complete("a", 1)
