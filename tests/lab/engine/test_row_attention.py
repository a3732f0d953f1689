"""Passes over several rows say bit by bit what passes over one say, where a CPU has no 16-bit floats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lab.command.entry import compose_settings
from lab.device import lacks_sixteen_bits
from lab.engine import local as engine_module
from lab.engine import row_attention, wide_products
from lab.engine.base import LogitRows, TargetStep, Want
from lab.engine.local import LocalEngine
from lab.engine.sampling import Sampling
from lab.models import sources as models
from lab.settings import ModelSettings
from speculative.settings import SpeculativeSettings

CPU = torch.device("cpu")
lacking = pytest.mark.skipif(
    not lacks_sixteen_bits(CPU, torch.bfloat16), reason="models here use the processor's own instructions for bfloat16"
)
TEXT = [number * 37 % 256 for number in range(120)]
START = 40
"""The bucket of 64 columns ends behind it, and the second one within the longest pass."""


def _settings(dtype: str) -> ModelSettings:
    return compose_settings("spec_decoding", f"model=random model.dtype={dtype}", SpeculativeSettings).model


def _logits(engine: LocalEngine, width: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Of all tokens from `START` on, in passes of so many rows, beside another text."""
    seen: list[Tensor] = []
    read_steps = engine_module.read_steps

    def recording(blocks: list[LogitRows], want: Want) -> list[TargetStep]:
        seen.append(next(block for block in blocks if block.sampling is sampling).logits_KV.clone())
        return read_steps(blocks, want)

    sampling = Sampling.greedy()
    with engine.open(TEXT[:START], sampling) as text, engine.open(TEXT[:3], Sampling.greedy()) as other:
        monkeypatch.setattr(engine_module, "read_steps", recording)
        for begin in range(START, len(TEXT), width):
            ids = TEXT[begin : begin + width]
            engine.extend([(text, ids), (other, ids)] if begin % 2 else [(text, ids)], "all")
        monkeypatch.setattr(engine_module, "read_steps", read_steps)
    return torch.cat(seen)


def _engine(model: Any) -> LocalEngine:
    return LocalEngine(
        model, sessions=2, context=256, bucket=64, kv_limit_bytes=10**8, prefill_chunk=64, exact_rows=None
    )


@lacking
def test_a_pass_over_several_rows_says_what_passes_over_one_say(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.load_model(_settings("bfloat16"), CPU).model
    engine = _engine(model)
    alone = _logits(engine, 1, monkeypatch)
    for width in (2, 3, 5, 9, 16, 17):
        assert torch.equal(_logits(engine, width, monkeypatch), alone), f"{width} rows"
    monkeypatch.setattr(wide_products, "KERNEL_ROWS", 1)
    assert not torch.equal(_logits(engine, 5, monkeypatch), _logits(engine, 1, monkeypatch)), "the products do not"


@lacking
def test_a_row_attends_as_if_it_were_alone() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 200, 64, dtype=torch.bfloat16) for heads in (9, 3, 3))
    query, mask = query[:, :, 195:], torch.ones(2, 1, 5, 200, dtype=torch.bool).tril(195)
    module: Any = nn.Module()
    module.num_key_value_groups = 3

    def depends(attention: Any) -> bool:
        together, _ = attention(module, query, key, value, mask, scaling=0.125)
        alone = [
            attention(module, query[:, :, t : t + 1], key, value, mask[:, :, t : t + 1], scaling=0.125)[0]
            for t in range(5)
        ]
        return not torch.equal(together, torch.cat(alone, dim=1))

    with torch.inference_mode():
        assert not depends(row_attention.attend)
        assert depends(sdpa_attention_forward), "torch's own, all rows together, sums in another order"


def test_it_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, where nothing rounds that one could see: what torch's own says, for few rows and for many."""
    model = models.load_model(_settings("float64"), CPU).model
    engine = _engine(model)
    expected = {width: _logits(engine, width, monkeypatch) for width in (1, 5, 30)}
    row_attention.attend_by_row(model)
    assert model.config._attn_implementation == row_attention.NAME
    for width, logits in expected.items():
        torch.testing.assert_close(_logits(engine, width, monkeypatch), logits, rtol=0, atol=1e-10)


def test_without_a_mask_and_in_training_it_is_torchs_own() -> None:
    model = models.load_model(_settings("float32"), CPU).model
    ids = torch.tensor([TEXT[:7]])
    expected = model(ids).logits
    row_attention.attend_by_row(model)
    assert torch.equal(model(ids).logits, expected)


def test_other_attention_stays() -> None:
    model = models.load_model(_settings("float32"), CPU).model
    model.config._attn_implementation = "eager"
    row_attention.attend_by_row(model)
    assert model.config._attn_implementation == "eager"
