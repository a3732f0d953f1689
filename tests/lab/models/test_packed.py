"""Weights of 8 and 4 bits: the numbers, the kernels, what transformers reads, and what a GGUF file says."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GPT2Config

from lab.command.entry import compose_settings
from lab.decode import DecodeSettings
from lab.models import conversion, packed, packed_folder
from lab.models.conversion import byte_tokenizer
from lab.models.gguf.blocks import BITS, GgufBlocks
from lab.models.gguf.file import gguf_file
from lab.models.layers import load_layers, load_proved
from lab.models.packed import WIDE_ROWS, IntLinear, halves
from lab.models.packed_folder import pack_model
from lab.models.proof import try_packed
from lab.models.quantized import PACKED, WeightFormat, load_options
from lab.models.slices import read_slice, run_slice
from lab.models.sources import list_tensors, load_model, prepare_checkpoint
from lab.models.structure import find_structure
from lab.settings import Dtype, ModelSettings, ModelSource, Quantization, UserError
from speculative.drafter.sources import add_noise_to_head
from tests.lab.models.adapters import make_adapter, peft_says, slices_say
from tests.lab.models.gguf_files import write_gguf
from tests.random_models import random_model

CPU = torch.device("cpu")
INTEGERS = (Quantization.int8, Quantization.int4)


pytestmark = pytest.mark.usefixtures("one_thread")


def _settings(quantization: Quantization, **changes: Any) -> ModelSettings:
    return replace(compose_settings("decode", "", DecodeSettings).model, quantization=quantization, **changes)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 32), (259, 96), (50, 576), (1100, 64)])
def test_numbers_are_the_nearest_and_the_kernel_multiplies_by_them(bits: int, outputs: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(outputs)
    weight_NK = torch.randn(outputs, inputs, generator=generator)
    bias = nn.Parameter(torch.randn(outputs, generator=generator), requires_grad=False)
    layer = IntLinear.of(weight_NK, bits, bias)
    plain = layer.in_float()
    groups = weight_NK.unflatten(1, (-1, 32))
    step = ((groups.amax(2) - groups.amin(2)) / (2**bits - 1)).repeat_interleave(32, 1)
    # Half a step of rounding; scale, zero and the weight itself are bfloat16: 2 ** -8 of the largest.
    assert bool(((plain.weight - weight_NK).abs() <= 0.5 * step + weight_NK.abs().max() * 2**-7).all())
    rows = torch.randn(7, inputs, generator=generator)
    expected, found = plain(rows.bfloat16().float()), layer(rows)
    assert found.dtype is torch.float32
    assert found.shape == (7, outputs)
    assert torch.allclose(found, expected, rtol=2**-7, atol=float(expected.abs().max()) * 2**-7)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_depends_on_itself_alone(bits: int) -> None:
    layer = IntLinear.of(torch.randn(200, 96), bits)
    rows = torch.randn(33, 96)
    alone = torch.cat([layer(row[None]) for row in rows])
    for width in (2, 3, 4, 5, 8, 9, 16, 33):
        assert torch.equal(layer(rows[:width]), alone[:width])


@pytest.mark.parametrize("bits", [8, 4])
def test_joined_layers_say_what_each_says(bits: int) -> None:
    _check_joined(bits)


def _check_joined(bits: int) -> None:
    layers = [IntLinear.of(torch.randn(outputs, 96), bits) for outputs in (200, 64, 30)]
    rows, bytes_before = torch.randn(5, 96).bfloat16(), sum(layer.weight.nbytes for layer in layers)
    before = [packed.multiply(rows, layer.weight, layer.scales) for layer in layers]
    numbers, scales = packed.join(layers)
    assert torch.equal(packed.multiply(rows, numbers, scales), torch.cat(before, 1))
    after = [packed.multiply(rows, layer.weight, layer.scales) for layer in layers]
    assert all(map(torch.equal, before, after))
    storages = {layer.weight.untyped_storage().data_ptr() for layer in layers}
    assert storages == {numbers.untyped_storage().data_ptr()}, "a second copy"
    assert numbers.nbytes == bytes_before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_many_rows_of_a_sequence_meet_the_same_weights_widened(
    bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packed.kernel_block():
        pytest.skip("the kernel's order of numbers is not known here")
    monkeypatch.setattr(packed, "_wide_dtype", lambda: dtype)
    monkeypatch.setattr(packed, "WIDENED_AT_ONCE", 128)
    layer = IntLinear.of(torch.randn(200, 96), bits, nn.Parameter(torch.randn(200), requires_grad=False))
    rows = torch.randn(1, WIDE_ROWS, 96).bfloat16().float()
    expected, kernels = layer.in_float()(rows), layer(rows[:, :-1])
    found = layer(rows)
    assert found.dtype is torch.float32
    assert torch.allclose(found, expected, rtol=2**-7, atol=float(expected.abs().max()) * 2**-7)
    assert not torch.equal(found[:, :-1], kernels), "the kernel computed them"
    assert torch.equal(layer(torch.cat((rows, rows)))[:, :-1], kernels.expand(2, -1, -1)), "a second sequence is there"
    assert torch.equal(layer(rows[0])[:-1], kernels[0]), "whose rows they are is not known"
    assert torch.equal(layer(rows.requires_grad_()), found)
    rows.requires_grad_(False)
    monkeypatch.setattr(packed, "kernel_block", lambda: 0)
    assert torch.equal(layer(rows)[:, :-1], kernels), "widened in an order that is not known"


def test_an_order_of_numbers_that_is_not_known_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packed.kernel_block() in (0, 16, 32, 64)
    monkeypatch.setattr(packed, "_in_kernel_order", lambda halves_NX: halves_NX)
    packed.kernel_block.cache_clear()
    try:
        assert packed.kernel_block() == 0
    finally:
        packed.kernel_block.cache_clear()


class _Cuda:
    """What torch's kernels for CUDA do (aten/src/ATen/native/cuda/int4mm.cu), on a CPU: the order of an own making."""

    def __init__(self, even_is_high: bool = True) -> None:
        self._even_is_high = even_is_high

    def order(self, halves_NX: Tensor, tiles: int) -> Tensor:
        assert halves_NX.is_contiguous()
        assert halves_NX.dtype == torch.uint8
        assert len(halves_NX) % 8 == 0
        assert 2 * halves_NX.shape[1] % (16 * tiles) == 0
        pair = (halves_NX >> 4, halves_NX & 15) if self._even_is_high else (halves_NX & 15, halves_NX >> 4)
        q_NK = torch.stack(pair, 2).flatten(1).int()
        blocks = q_NK.view(len(q_NK) // 8, 8, -1, 16 * tiles).permute(0, 2, 3, 1)
        words = sum(blocks[..., place] << 4 * place for place in range(8))
        assert isinstance(words, Tensor)
        return words.view(*words.shape[:2], 32, tiles // 2).int()

    def product(self, rows_RK: Tensor, numbers: Tensor, group: int, scales: Tensor) -> Tensor:
        assert rows_RK.dtype == scales.dtype == torch.bfloat16
        assert numbers.dtype == torch.int32
        assert numbers.dim() == 4
        words = numbers.long().flatten(2)
        q_NK = torch.stack([words >> 4 * place & 15 for place in range(8)], 1).flatten(2).flatten(0, 1)
        scale_NK, zero_NK = (part.t().float().repeat_interleave(group, 1) for part in scales.unbind(2))
        return (rows_RK.double() @ ((q_NK - 8) * scale_NK + zero_NK).t().double()).bfloat16()


@pytest.mark.parametrize("even_is_high", [True, False])
def test_what_is_written_for_cuda_is_tried_before_it_is_used(
    even_is_high: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU here: a fake with the shapes and the order that torch's source describes, and one with another order."""
    fake = _Cuda(even_is_high)
    monkeypatch.setattr(packed, "_is_cuda", lambda tensor: True)
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", fake.order)
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", fake.product)
    packed.kernel_fault.cache_clear()
    try:
        fault = packed.kernel_fault(CPU)
    finally:
        packed.kernel_fault.cache_clear()
    if even_is_high:
        assert fault is None
        _check_joined(8)
        _check_joined(4)
    else:
        assert fault == "its weights of 8 bits are not those that were stored"


def test_the_kernel_of_this_processor_is_right() -> None:
    assert packed.kernel_fault(CPU) is None


def test_a_cuda_device_gets_its_weights_before_they_are_ordered() -> None:
    """The order depends on the device: a model must not be moved once its layers are packed."""
    for stored in PACKED:
        options = load_options(stored, None, torch.device("cuda"), torch.bfloat16)
        assert options == {"device_map": {"": torch.device("cuda")}}
        assert load_options(stored, None, CPU, torch.bfloat16) == {}


FAMILIES = (
    "llama",
    "gemma3",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "mixtral",
    "qwen3_moe",
)


@pytest.mark.parametrize("stored", [WeightFormat.int8, WeightFormat.int4])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_proved(family: str, stored: WeightFormat) -> None:
    proof = try_packed(CONFIG_MAPPING[family](), stored=stored)
    assert proof.engine is None
    assert proof.slices is None


def test_wrong_products_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    right = packed.multiply

    def wrong(rows_RK: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
        return right(rows_RK, numbers, scales.roll(1, 0))  # another output's scale, another group's

    in_float = IntLinear.in_float

    def truthful(layer: IntLinear) -> nn.Linear:
        with monkeypatch.context() as patch:
            patch.setattr(packed, "multiply", right)
            return in_float(layer)

    monkeypatch.setattr(packed, "multiply", wrong)
    monkeypatch.setattr(IntLinear, "in_float", truthful)
    for stored in (WeightFormat.int8, WeightFormat.int4):
        against = try_packed(CONFIG_MAPPING["llama"](), stored=stored).engine
        assert against is not None
        assert "from those of the same numbers in float" in against


def test_wrong_weights_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole and slices would agree about them, and so would their numbers in float."""
    right = packed.quantise
    monkeypatch.setattr(packed_folder, "quantise", lambda weight_NK, bits: right(weight_NK.roll(1, 0), bits))
    against = try_packed(CONFIG_MAPPING["gpt2"](), stored=WeightFormat.int4).engine
    assert against is not None
    assert re.fullmatch(r"its packed transformer\.h\.0\.attn\.c_attn\.weight is off by 1\d\d\.\d%", against)


@pytest.mark.parametrize("quantization", INTEGERS)
def test_slices_are_the_whole_and_a_second_start_packs_nothing(quantization: Quantization, tmp_path: Path) -> None:
    random_model("qwen2", torch.float32, hidden_size=64, intermediate_size=96).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    settings = _settings(
        quantization, source=ModelSource.path, path=str(tmp_path / "model"), package=None, cache_dir=str(tmp_path / "c")
    )
    whole: Any = load_proved(settings, CPU).model
    folder = next((tmp_path / "c").glob(f"*-float32-{quantization.name}"))
    written = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    first = load_layers(settings, CPU, range(0, 1), embedding=True, head=False)
    second = load_layers(settings, CPU, range(1, 4), embedding=False, head=True)
    ids = torch.arange(1, 20)[None]
    with torch.inference_mode():
        assert torch.equal(run_slice(second, run_slice(first, ids)), whole(ids).logits)
    assert all(type(part) is not nn.Linear for part in (*whole.modules(), *first.modules(), *second.modules()))
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == written
    plain: Any = load_model(replace(settings, quantization=Quantization.none), CPU).model
    with torch.inference_mode():
        assert not torch.equal(plain(ids).logits, whole(ids).logits)


@pytest.mark.parametrize("quantization", INTEGERS)
def test_an_adapter_stays_beside_packed_layers(quantization: Quantization, tmp_path: Path) -> None:
    base = tmp_path / "model"
    random_model("qwen2", torch.float32, hidden_size=64, intermediate_size=96).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    settings = _settings(
        quantization, source=ModelSource.path, path=str(base), package=None, cache_dir=str(tmp_path / "c")
    )
    adapter = make_adapter(base, tmp_path / "adapter")
    load_model(settings, CPU)
    [packed_folder] = (tmp_path / "c").glob(f"*-{quantization.name}")
    expected = peft_says(replace(settings, path=str(packed_folder)), adapter)
    assert torch.equal(slices_say(settings, adapter, (0, 2, 4)), expected)
    assert not torch.equal(peft_says(replace(settings, path=str(packed_folder)), None), expected)


def test_noise_comes_over_a_packed_head(tmp_path: Path) -> None:
    model = random_model("qwen2", torch.float32, hidden_size=64, intermediate_size=96)
    pack_model(model, find_structure(model), tmp_path, 4, torch.float32)
    read: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, local_files_only=True)
    ids = torch.arange(1, 20)[None]
    with torch.inference_mode():
        before = read(ids).logits
        add_noise_to_head(read, 0.01, seed=0)
        after = read(ids).logits
    assert 0 < float((after - before).norm() / before.norm()) < 0.1


def test_a_gguf_file_keeps_its_own_numbers() -> None:
    settings = _settings(Quantization.int4, dtype=Dtype.bfloat16)
    model = load_model(settings, CPU).model
    from gguf import GGUFReader, dequantize

    tensors = {tensor.name: tensor for tensor in GGUFReader(gguf_file(settings)).tensors}
    for name, theirs in {"mlp.down_proj": "ffn_down", "mlp.up_proj": "ffn_up", "self_attn.v_proj": "attn_v"}.items():
        tensor = tensors[f"blk.7.{theirs}.weight"]
        ours = model.get_submodule(f"model.layers.7.{name}").in_float().weight  # type: ignore[operator]
        exact = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
        # Scale and zero are rounded to bfloat16, and so is the weight that is read back.
        assert float((ours - exact).abs().max() / exact.abs().max()) < 2**-7
        step = exact.unflatten(1, (-1, 32))
        step = (step.amax(2) - step.amin(2)) / 15
        assert float(((ours - exact).abs().unflatten(1, (-1, 32)).amax(2) / step).max()) < 0.2, "a number differs"


@pytest.mark.parametrize("bits", [8, 4])
def test_an_outlier_coarsens_its_own_group_alone(bits: int) -> None:
    weight_NK = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    before = IntLinear.of(weight_NK, bits).in_float().weight
    weight_NK[:, 5] = 100
    after = IntLinear.of(weight_NK, bits).in_float().weight
    assert torch.equal(after[:, 32:], before[:, 32:])
    assert not torch.equal(after[:, 6:32], before[:, 6:32])


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_are_found_in_any_order_of_rows(kind: str, tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize

    weight = np.random.default_rng(0).normal(size=(96, 128)).astype(np.float32)
    blocks = quantize(weight, GGMLQuantizationType[kind])
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("w", blocks, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    exact = torch.from_numpy(dequantize(blocks, GGMLQuantizationType[kind]))
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    bits = BITS[kind]
    for dtype in (torch.float32, torch.bfloat16):
        file = GgufBlocks(GGUFReader(tmp_path / "a.gguf"), dtype, {4, 8})
        assert file.find(exact[order].to(dtype), 12 - bits) is None, "numbers of other bits"
        found = file.find(exact[order].to(dtype), bits)
        assert found is not None
        numbers, scales = found
        q = torch.stack((numbers & 15, numbers >> 4), 2).flatten(1).float()
        scale, zero = (scales[..., part].t().float().repeat_interleave(32, 1) for part in (0, 1))
        summed = ((q - 8) * scale + zero).unflatten(1, (-1, 128)).sum(1)
        # Only scale and zero are rounded; with another number a weight would be a whole step off.
        most = exact[order].abs() * 2**-7.9 if bits == 8 else 0.1 * scale.abs()
        assert bool(((summed - exact[order]).abs() <= most).all())
    other = exact[order].clone()
    other[3, 5] += 1
    assert GgufBlocks(GGUFReader(tmp_path / "a.gguf"), torch.float32, {4, 8}).find(other, bits) is None


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        (
            Quantization.int4,
            [
                "3 of 8 layers keep the numbers",
                "stores its layers as Q8_0: rounded to int4",
                "stores its head as F32: rounded to int8",
            ],
        ),
        (
            Quantization.int8,
            [
                "4 of 8 layers keep the numbers",
                "stores its layers as Q4_1: rounded to int8",
                "stores its head as F32: rounded to int8",
            ],
        ),
    ],
)
def test_what_is_not_repacked_is_said(
    quantization: Quantization, said: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    file, _ = write_gguf(tmp_path / "tiny.gguf", inner=64, kinds={"ffn": "Q4_1", "attn": "Q8_0"})
    load_model(_settings(quantization, package=None, path=str(file), cache_dir=str(tmp_path / "c")), CPU)
    lines = [record.message for record in caplog.records if " the GGUF file" in f" {record.message}"]
    assert len(lines) == len(said)
    assert all(part in line for part, line in zip(said, lines, strict=True))


def test_a_packed_folder_is_one_only_under_its_own_setting(tmp_path: Path) -> None:
    """Under `none`, no guard that goes by the setting would hold: of float64, training, other devices."""
    settings = _settings(Quantization.int4, source=ModelSource.random, package=None, cache_dir=str(tmp_path))
    folder = prepare_checkpoint(settings).folder
    stored = replace(settings, source=ModelSource.path, path=str(folder))
    assert load_model(stored, CPU).checkpoint.folder == folder
    for other in (Quantization.none, Quantization.nf4, Quantization.int8):
        refused = rf"^model\.quantization must be int4 for a model that is stored as int4, got {other.name}$"
        with pytest.raises(UserError, match=refused):
            load_model(replace(stored, quantization=other), CPU)
        with pytest.raises(UserError, match=refused):
            load_layers(replace(stored, quantization=other), CPU, range(1), embedding=True, head=True)


@pytest.mark.parametrize("source", [ModelSource.path, ModelSource.gguf])
@pytest.mark.parametrize("quantization", INTEGERS)
def test_a_shard_packs_its_own_layers_and_what_all_pack_is_the_whole(
    quantization: Quantization, source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_model("llama", torch.float32, hidden_size=64, intermediate_size=96).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    place = tmp_path / "model" if source is ModelSource.path else write_gguf(tmp_path / "a.gguf", inner=64, layers=4)[0]
    settings = _settings(quantization, source=source, path=str(place), package=None, cache_dir=str(tmp_path / "c"))
    list_tensors(settings)  # tries the architecture in small
    read: set[str] = set()
    _watch_reads(monkeypatch, read)
    first = load_layers(settings, CPU, range(0, 1), embedding=True, head=False)
    assert {int(name.split(".")[2]) for name in read if ".layers." in name} == {0}
    assert not any("lm_head" in name for name in read)
    [folder] = (tmp_path / "c").glob(f"*-float32-{quantization.name}")
    assert {file.name for file in folder.glob("*.safetensors")} == {"embedding.safetensors", "layer-00000.safetensors"}
    read.clear()
    second = load_layers(settings, CPU, range(2, 4), embedding=False, head=True)
    third = load_layers(settings, CPU, range(1, 2), embedding=False, head=False)
    assert {int(name.split(".")[2]) for name in read if ".layers." in name} == {1, 2, 3}
    assert not any("embed_tokens" in name for name in read)
    read.clear()
    whole: Any = load_proved(settings, CPU).model
    assert not read, "all parts are there"
    assert not list((tmp_path / "c").glob("*-float32")), "a float copy of the file is left"
    ids = torch.arange(1, 20)[None]
    with torch.inference_mode():
        states = run_slice(third, run_slice(first, ids))
        assert torch.equal(run_slice(second, states), whole(ids).logits)
    shutil.rmtree(folder)
    monkeypatch.setattr(conversion, "FLOATS_AT_ONCE", 0)
    again: Any = load_proved(settings, CPU).model
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, whole(ids).logits), "how many layers are read together is no matter"


def _watch_reads(monkeypatch: pytest.MonkeyPatch, read: set[str]) -> None:
    """Note the names of all tensors of the model in float whose values are read."""

    class Watched:
        def __init__(self, name: str, tensor: Any) -> None:
            self._name, self._tensor = name, tensor

        def __getitem__(self, key: Any) -> Any:
            read.add(self._name)
            return self._tensor[key]

    def watching(config: Any, tensors: Any, *arguments: Any, **options: Any) -> Any:
        return read_slice(config, {name: Watched(name, one) for name, one in tensors.items()}, *arguments, **options)

    monkeypatch.setattr(packed_folder, "read_slice", watching)


def test_a_random_model_that_does_not_fit_is_refused_before_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "total_bytes", lambda device: 2**10)
    settings = _settings(Quantization.int4, source=ModelSource.random, package=None, cache_dir=str(tmp_path / "c"))
    with pytest.raises(UserError, match=r"^model must fit into the .* GiB of memory here in float, once"):
        load_model(settings, CPU)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    place = tmp_path / "model"
    random_model("llama", torch.float32, hidden_size=64, intermediate_size=96).save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    tensors, name = load_file(place / "model.safetensors"), "model.layers.2.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name][:64].clone()}, place / "model.safetensors", metadata={"format": "pt"})
    settings = _settings(
        Quantization.int4, source=ModelSource.path, path=str(place), package=None, cache_dir=str(tmp_path / "c")
    )
    refused = rf"^model\.path must hold tensors of its config's shapes, got another for '{name}'$"
    with pytest.raises(UserError, match=refused):
        load_proved(settings, CPU)
    with pytest.raises(UserError, match=refused):
        load_layers(replace(settings, quantization=Quantization.none), CPU, range(4), embedding=True, head=True)
    load_layers(settings, CPU, range(1), embedding=True, head=False)


def test_a_full_disk_leaves_no_half_of_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, file: Path, **options: Any) -> None:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    settings = _settings(Quantization.int4, source=ModelSource.random, package=None, cache_dir=str(tmp_path / "c"))
    folder = list_tensors(settings).path
    with monkeypatch.context() as patch:
        patch.setattr(packed_folder, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            prepare_checkpoint(settings)
    assert not list(folder.glob("*.safetensors"))
    prepare_checkpoint(settings)


@pytest.mark.skipif(sys.platform == "win32", reason="no such permissions")
def test_all_users_of_a_shared_cache_may_add_layers(tmp_path: Path) -> None:
    """Commands write for their owner only; whoever may write to the cache must get past the lock of the first one."""
    cache = tmp_path / "c"
    cache.mkdir()
    cache.chmod(0o777)
    settings = _settings(Quantization.int4, source=ModelSource.random, package=None, cache_dir=str(cache))
    before = os.umask(0o077)
    try:
        load_layers(settings, CPU, range(1), embedding=True, head=False)
    finally:
        os.umask(before)
    [folder], [lock] = cache.glob("*-int4"), cache.glob(".*-int4.lock")
    assert [place.stat().st_mode & 0o777 for place in (folder, lock)] == [0o777, 0o666]
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o666}


def test_weights_of_other_kinds_are_not_copied_beside_packed_ones(tmp_path: Path) -> None:
    plain = _settings(Quantization.none, source=ModelSource.random, package=None, cache_dir=str(tmp_path / "c"))
    shutil.copytree(prepare_checkpoint(plain).folder, tmp_path / "clone")
    (tmp_path / "clone" / "pytorch_model.bin").write_bytes(b"as large as the model")
    cloned = replace(plain, source=ModelSource.path, path=str(tmp_path / "clone"), quantization=Quantization.int4)
    folder = prepare_checkpoint(cloned).folder
    assert (folder / "tokenizer.json").exists()
    assert not (folder / "pytorch_model.bin").exists()


def test_what_cannot_be_packed_is_named(tmp_path: Path) -> None:
    for part, width in (("thin", 48), ("other", 64)):
        config = GPT2Config(vocab_size=300, n_embd=width, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / part)
        byte_tokenizer().save_pretrained(tmp_path / part)
    settings = _settings(
        Quantization.int4, source=ModelSource.path, path=str(tmp_path / "thin"), package=None, cache_dir=str(tmp_path)
    )
    with pytest.raises(UserError, match=r"^model must .* gpt2: .*c_attn has 48 inputs, which is no multiple of 32$"):
        load_model(settings, CPU)
    # In small, this one has another width.
    odd = random_model("llama", torch.float32, hidden_size=64, intermediate_size=1000)
    odd.save_pretrained(tmp_path / "odd")
    byte_tokenizer().save_pretrained(tmp_path / "odd")
    with pytest.raises(UserError, match=r"widths that int4 can pack, got a llama: .*down_proj has 1000 inputs, .* 32$"):
        load_model(replace(settings, path=str(tmp_path / "odd")), CPU)
    assert not list(tmp_path.glob("*-int4")), "a half-written folder is left"
    with pytest.raises(UserError, match=r"model\.dtype must be float32 or bfloat16 for int4, got float64"):
        load_model(replace(settings, path=str(tmp_path / "other"), dtype=Dtype.float64), CPU)
    without = [(torch.device("mps"), "there is no kernel for it")]
    if not torch.cuda.is_available():
        without.append((torch.device("cuda"), ".+"))
    for kind, why in without:
        refused = rf"^model\.quantization must be none or nf4 on {kind}, got int4: {why}$"
        with pytest.raises(UserError, match=refused):
            load_model(replace(settings, path=str(tmp_path / "other")), kind)
        with pytest.raises(UserError, match=refused):
            load_layers(replace(settings, path=str(tmp_path / "other")), kind, range(1), embedding=True, head=True)


def test_halves_hold_two_numbers() -> None:
    q = torch.arange(16, dtype=torch.uint8)[None]
    assert halves(q).tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]
    assert packed.GROUP % 2 == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives pages back on request")
def test_pages_of_a_file_that_was_copied_are_given_back_unharmed(tmp_path: Path) -> None:
    def of_files() -> int:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))

    save_file({"large": torch.arange(2**23, dtype=torch.int32)}, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as opened:
        large = opened.get_tensor("large")
        total = large.sum()  # reads all 32 MiB
        read = of_files()
        packed._forget_pages(large)
        assert of_files() < read - 2**14
        assert large.sum() == total


PACK = """
import sys
from dataclasses import replace
from pathlib import Path

from lab.command.entry import compose_settings
from lab.decode import DecodeSettings
from lab.device import forget_peak_rss, peak_rss_bytes
from lab.models import conversion
from lab.models.sources import list_tensors, prepare_checkpoint
from lab.settings import ModelSource, Quantization

place = Path(sys.argv[1])
model = compose_settings("decode", "", DecodeSettings).model
model = replace(model, source=ModelSource.path, path=str(place / "model"), package=None, quantization=Quantization.int4)
for at_once in (2**24, 2**40):
    conversion.FLOATS_AT_ONCE = at_once
    settings = replace(model, cache_dir=str(place / str(at_once)))
    list_tensors(settings)
    forget_peak_rss()
    before = peak_rss_bytes()
    prepare_checkpoint(settings)
    print(peak_rss_bytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets the peak of a process's memory on request")
def test_a_model_is_never_in_float_as_a_whole_while_it_is_packed(tmp_path: Path) -> None:
    large = random_model("llama", torch.float32, hidden_size=512, intermediate_size=1408, num_hidden_layers=24)
    large.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    in_float = sum(weight.nbytes for weight in large.parameters())
    command = [sys.executable, "-c", PACK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    in_parts, at_once = map(int, done.stdout.split())
    assert in_parts < 0.35 * in_float
    assert at_once > 0.9 * in_float, "the negative control: all layers are read together"
