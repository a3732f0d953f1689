"""Greedy texts, split and whole: the random model at full size, SmolLM2 at a small one (the soak has the full one)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from split.inference import stage
from tests.split.inference.texts import compare_texts, settings_of


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def test_32_texts_of_128_tokens(cache: Path) -> None:
    settings = settings_of("model=random", f"model.cache_dir={cache}")
    texts = compare_texts(settings, [(0, 3, 4), (0, 1, 2, 4)], prompts=32, tokens=128)
    assert texts.tokens == 32 * 128
    assert texts.differing == 0


def test_a_boundary_that_loses_something_is_seen(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = stage.decode
    monkeypatch.setattr(stage, "decode", lambda *a, **k: decode(*a, **k) * torch.tensor(1.03))
    settings = settings_of("model=random", f"model.cache_dir={cache}")
    assert compare_texts(settings, [(0, 1, 4)], prompts=4, tokens=24).differing > 0


@pytest.mark.real
def test_smollm2(cache: Path) -> None:
    assert compare_texts(settings_of(), [(0, 11, 30)], prompts=2, tokens=8).differing == 0
