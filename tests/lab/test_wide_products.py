"""Products of 16-bit weights by way of float32: the same numbers but for their last bit, and only where they pay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lab import models
from lab.device import open_device
from lab.entry import compose_settings
from lab.wide_products import WideLinear, widen_products
from speculative.settings import SpeculativeSettings


def _pair(inputs: int, outputs: int, bias: bool) -> tuple[nn.Linear, nn.Linear]:
    """The same layer twice, the second with wide products."""
    torch.manual_seed(0)
    plain, wide = (nn.Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16) for _ in range(2))
    wide.load_state_dict(plain.state_dict())
    holder = nn.Sequential(wide)
    widen_products(holder)
    assert type(wide) is WideLinear
    return plain, wide


def _exact(layer: nn.Linear, rows: Tensor) -> Tensor:
    bias = 0 if layer.bias is None else layer.bias.double()
    return rows.double() @ layer.weight.double().T + bias


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (600, 5000)])  # one block; three
def test_products_are_rounded_once(inputs: int, outputs: int, bias: bool) -> None:
    _, wide = _pair(inputs, outputs, bias)
    rows = torch.randn(2, 3, inputs, dtype=torch.bfloat16)
    with torch.inference_mode():
        out = wide(rows)
    assert out.dtype == torch.bfloat16
    exact = _exact(wide, rows)
    assert torch.all((out.double() - exact).abs() <= exact.abs() / 256 + 1e-4), "more than half a unit of 8 bits"


def test_one_row_and_training_are_torchs_own() -> None:
    plain, wide = _pair(64, 48, bias=True)
    rows = torch.randn(4, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(wide(rows[:1]), plain(rows[:1]))
    outcome = wide(rows)
    assert torch.equal(outcome, plain(rows))
    outcome.sum().backward()
    assert wide.weight.grad is not None


@pytest.mark.parametrize("lacks", [False, True])
def test_models_are_loaded_with_them_where_the_machine_needs_them(lacks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "lacks_sixteen_bits", lambda device, dtype: lacks)
    settings = compose_settings("spec_decoding", "model=random model.dtype=bfloat16", SpeculativeSettings)
    device = open_device(settings.device)
    whole = models.load_model(settings.model, device).model
    some = models.load_layers(settings.model, device, 0, 2, embedding=True, head=True)
    for model in (whole, some):
        kinds = {type(module) for module in model.modules() if isinstance(module, nn.Linear)}
        assert kinds == {WideLinear if lacks else nn.Linear}
