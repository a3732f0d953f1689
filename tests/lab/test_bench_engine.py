"""The benchmark of the engine at toy size: every part runs, and what is equal is equal."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lab.bench_engine import PARTS, EngineBenchSettings, EngineRig, run
from lab.command.entry import Run, compose_settings
from lab.settings import UserError

SMALL = (
    "model=random device.threads=1 project.context=400 project.prompt_tokens=8 project.new_tokens=6 project.repeats=1 "
    "project.prompts=[20,40] project.texts=[2] project.checked_rows=[4] project.identity_tokens=100 "
    "project.perplexity_tokens=300 tracking=none"
)


def test_every_part_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    parts = [part for part in PARTS if part not in ("memory", "start")]  # they start processes with the real model
    settings = compose_settings("engine_bench", f"{SMALL} project.parts=[{','.join(parts)}]", EngineBenchSettings)
    try:
        found = run(settings, Run(tmp_path))
    finally:
        torch.set_num_threads(threads)
    rows = found["rows"]
    assert {row["row"] for row in rows} == set(parts)
    [identity] = [row for row in rows if row["row"] == "identity"]
    assert identity["holds"]
    assert identity["differing"]["int4"] == identity["differing"]["int8"] == 0
    decode = rows[0]["tokens_per_second"]
    assert set(decode) - {"bfloat16"} == {"int4", "int8", "bfloat16_eager"}, "llama.cpp has no such model"


def test_without_its_wheel_llama_cpp_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    monkeypatch.setattr("lab.models.gguf.file.gguf_file", lambda model: tmp_path)
    settings = compose_settings("engine_bench", "", EngineBenchSettings)
    assert EngineRig(settings, tmp_path).llama_cpp(1) is None


def test_a_context_that_is_too_long_is_the_users_mistake(tmp_path: Path) -> None:
    settings = compose_settings("engine_bench", f"model=random model.cache_dir={tmp_path}", EngineBenchSettings)
    with pytest.raises(UserError, match=r"^project\.context must be in \[1, 1024\], got 4352$"):
        EngineRig(settings, tmp_path).plain(False)
