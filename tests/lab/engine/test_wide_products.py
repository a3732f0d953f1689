"""Products of 16-bit weights by way of float32: the same numbers but for their last bit, and only where they pay."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lab.command.entry import compose_settings
from lab.device import lacks_sixteen_bits, open_device
from lab.engine import row_attention, wide_products
from lab.engine.wide_products import PackedLinear, WideLinear, pack_products, widen_products
from lab.models import layers
from lab.models import sources as models
from speculative.settings import SpeculativeSettings

CPU = torch.device("cpu")
packs = pytest.mark.skipif(
    torch.backends.quantized.engine not in ("fbgemm", "x86"), reason="torch has no FBGEMM on this processor"
)
KINDS = [pytest.param(WideLinear), pytest.param(PackedLinear, marks=packs)]


def _pair(kind: type[nn.Linear], inputs: int, outputs: int, bias: bool) -> tuple[nn.Linear, nn.Linear]:
    """The same layer twice, the second with wide products."""
    torch.manual_seed(0)
    plain, wide = (nn.Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16) for _ in range(2))
    wide.load_state_dict(plain.state_dict())
    wide.__class__ = kind
    return plain, wide


def _exact(layer: nn.Linear, rows: Tensor) -> Tensor:
    bias = 0 if layer.bias is None else layer.bias.double()
    return rows.double() @ layer.weight.double().T + bias


def _is_rounded_once(outcome: Tensor, exact: Tensor) -> bool:
    """At most half a unit of 8 bits, and what float32 loses in a long sum."""
    noise = 1e-5 * exact.abs().max()
    return bool(torch.all((outcome.double() - exact).abs() <= exact.abs() / 256 + noise))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (600, 5000)])  # one block; three
def test_products_are_rounded_once(kind: type[nn.Linear], inputs: int, outputs: int, bias: bool) -> None:
    _, wide = _pair(kind, inputs, outputs, bias)
    rows = torch.randn(2, 3, inputs, dtype=torch.bfloat16)
    with torch.inference_mode():
        outcome = wide(rows)
    assert outcome.dtype == torch.bfloat16
    exact = _exact(wide, rows)
    assert _is_rounded_once(outcome, exact)
    assert not _is_rounded_once(outcome + outcome / 128, exact), "one unit more is seen"


@packs
@pytest.mark.parametrize("size", [2.0**-40, 1.0, 2.0**40])
def test_weights_of_any_size_are_packed(size: float) -> None:
    """Such as float16 has no numbers for: next to nothing, or beyond its largest."""
    _, wide = _pair(PackedLinear, 64, 48, bias=False)
    rows = torch.randn(6, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        small = wide(rows)
        wide.weight *= size
        assert torch.equal(wide(rows), small * size), "packed again, with a scale of its own"
        wide.weight.zero_()
        assert not wide(rows).any()


@packs
@pytest.mark.skipif(not lacks_sixteen_bits(CPU, torch.bfloat16), reason="other kernels, which no model uses here")
def test_a_row_has_the_same_bits_in_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    _, wide = _pair(PackedLinear, 600, 257, bias=True)
    rows = torch.randn(250, 600, dtype=torch.bfloat16)

    def depends() -> bool:
        with torch.inference_mode():
            together = wide(rows)
            return any(
                not torch.equal(wide(rows[begin:end]), together[begin:end])
                for end in range(1, 40)
                for begin in range(end)
            )

    assert not depends()
    monkeypatch.setattr(wide_products, "KERNEL_ROWS", 1)
    assert depends(), "a row alone, or two, are summed in another order"


@packs
def test_changed_weights_are_packed_again() -> None:
    _, wide = _pair(PackedLinear, 64, 48, bias=False)
    rows = torch.randn(3, 64, dtype=torch.bfloat16)
    pack_products(nn.Sequential(wide))
    with torch.no_grad():
        wide.weight.neg_()
    with torch.inference_mode():
        assert _is_rounded_once(wide(rows), _exact(wide, rows))
    wide.weight = nn.Parameter(-wide.weight)
    with torch.inference_mode():
        assert _is_rounded_once(wide(rows), _exact(wide, rows))


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_torchs_own(kind: type[nn.Linear]) -> None:
    plain, wide = _pair(kind, 64, 48, bias=True)
    rows = torch.randn(4, 64, dtype=torch.bfloat16)
    outcome = wide(rows)
    assert torch.equal(outcome, plain(rows))
    outcome.sum().backward()
    assert wide.weight.grad is not None


@pytest.mark.parametrize(("engine", "kind"), [("x86", PackedLinear), ("qnnpack", WideLinear)])
def test_packed_where_torch_can(engine: str, kind: type[nn.Linear], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends, "quantized", SimpleNamespace(engine=engine))
    model = nn.Sequential(nn.Linear(2, 2))
    widen_products(model)
    assert type(model[0]) is kind


@pytest.mark.parametrize("lacks", [False, True])
def test_models_are_loaded_with_them_where_the_machine_needs_them(lacks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "lacks_sixteen_bits", lambda device, dtype: lacks)
    settings = compose_settings("spec_decoding", "model=random model.dtype=bfloat16", SpeculativeSettings)
    device = open_device(settings.device)
    whole = models.load_model(settings.model, device).model
    some = layers.load_layers(settings.model, device, range(2), embedding=True, head=True)
    for model in (whole, some):
        kinds = {type(module) for module in model.modules() if isinstance(module, nn.Linear)}
        assert (kinds != {nn.Linear}) == lacks
        assert (model.config._attn_implementation == row_attention.NAME) == lacks
