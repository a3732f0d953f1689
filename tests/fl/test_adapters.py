import bz2
import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from fl.adapters import AdapterIndex, PackedAdapter, load_into, lora_parameters, read_from
from fl.settings import WireDtype

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 101,
}


def small_model(targets: list[str] = LINEAR, **lora: Any) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(
        LlamaForCausalLM(LlamaConfig(**SMALL)),
        LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False, **lora),
    )
    assert isinstance(model, PeftModel)
    return model


def llama_index(
    layers: int, hidden: int, intermediate: int, keys: int, rank: int, dtype: WireDtype, targets: list[str] = LINEAR
) -> AdapterIndex:
    """The names and shapes that peft gives a llama of that size."""
    extents = {"k_proj": (hidden, keys), "v_proj": (hidden, keys), "down_proj": (intermediate, hidden)}
    extents |= {"gate_proj": (hidden, intermediate), "up_proj": (hidden, intermediate)}
    shapes = {}
    for layer, target in itertools.product(range(layers), targets):
        block = "mlp" if target in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        name = f"base_model.model.model.layers.{layer}.{block}.{target}"
        into, out = extents.get(target, (hidden, hidden))
        shapes[f"{name}.lora_A.weight"] = (rank, into)
        shapes[f"{name}.lora_B.weight"] = (out, rank)
    names = tuple(sorted(shapes))
    return AdapterIndex(names, tuple(shapes[name] for name in names), dtype)


SMOLLM2 = llama_index(30, 576, 1536, 192, 8, WireDtype.float32)
LLAMA_8B = llama_index(32, 4096, 14336, 1024, 8, WireDtype.float32)
LLAMA_70B = llama_index(80, 8192, 28672, 1024, 8, WireDtype.bfloat16, ["q_proj", "k_proj", "v_proj", "o_proj"])
EXPERTS = AdapterIndex.of(
    {
        f"base_model.model.layers.{layer}.mlp.experts.{expert}.{kind}.lora_{half}.weight": torch.empty(2, 3)
        for layer, expert, kind, half in itertools.product(range(48), range(128), ("up", "gate", "down"), "AB")
    },
    WireDtype.bfloat16,
)


@pytest.mark.parametrize(
    "index", [SMOLLM2, LLAMA_8B, LLAMA_70B, EXPERTS], ids=["smollm2", "llama_8b", "llama_70b", "experts"]
)
def test_an_index_is_small_whatever_the_model(index: AdapterIndex) -> None:
    assert len(index.encode()) < max(1024, 1.5 * len(index.names))
    assert AdapterIndex.decode(index.encode()) == index


names = st.lists(
    st.sampled_from(["0", "1", "2", "10", "01", "#", '"', "ä", "lora_A", "layers", ""]), min_size=1, max_size=4
)
shapes = st.lists(st.integers(1, 5), max_size=3).map(tuple)


@settings(deadline=None)
@given(st.dictionaries(names.map(".".join), shapes, min_size=1, max_size=12), st.sampled_from(WireDtype))
def test_any_names_and_shapes_survive_index_and_packing(named: dict[str, tuple[int, ...]], dtype: WireDtype) -> None:
    state = {name: torch.randn(shape).to(dtype.torch) for name, shape in named.items()}
    index = AdapterIndex.of(state, dtype)
    assert AdapterIndex.decode(index.encode()) == index
    packed = PackedAdapter.pack(state, index)
    assert packed.array.shape == (index.size,)
    assert packed.array.nbytes == index.tensor_bytes
    assert packed.array.nbytes == sum(tensor.nbytes for tensor in state.values())
    unpacked = packed.unpack()
    assert list(unpacked) == sorted(state)
    assert all(torch.equal(unpacked[name], state[name]) for name in state)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.binary(max_size=40).map(lambda tail: SMOLLM2.encode()[:-60] + tail))
def test_bytes_that_are_no_index_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="index must be an encoded adapter index"):
        AdapterIndex.decode(data)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"float32": 1}',
        '[[], [], "float32"]',
        '[["a"], [[1]], "float64"]',
        '[["a"], [[1]], "float32", 3]',
        '[["a"], [[1]]]',
        '[["b", "a"], [[1], [1]], "float32"]',
        '[["a", "a"], [[1], [2]], "float32"]',
        '[["a"], [[1], [2]], "float32"]',
        '[["a"], [1], "float32"]',
        '[["a"], [[-4]], "float32"]',
        '[["a"], [[0]], "float32"]',
        '[["a"], [[1.5]], "float32"]',
        '[["a"], [[true]], "float32"]',
        '[["a"], [[99999999999]], "float32"]',
        '[[1], [[1]], "float32"]',
        json.dumps([(many := [f"{n:05}" for n in range(65_537)]), [[1]] * len(many), "float32"]),
        "[" * 5_000,
        " " * (9 << 20),
    ],
    ids=lambda text: text[:30],
)
def test_an_index_that_lies_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="index must be an encoded adapter index"):
        AdapterIndex.decode(bz2.compress(text.encode()))


def test_bfloat16_travels_bit_by_bit_and_rounds_to_nearest_even() -> None:
    state = {"a": torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -math.pi, 3e-39])}
    index = AdapterIndex.of(state, WireDtype.bfloat16)
    packed = PackedAdapter.pack(state, index)
    assert packed.array.dtype == np.uint16
    assert torch.equal(packed.unpack()["a"], state["a"].to(torch.bfloat16))
    values = packed.to_float32()
    assert values.tolist() == state["a"].to(torch.bfloat16).float().tolist()
    assert PackedAdapter.from_float32(values, index).array.tolist() == packed.array.tolist()


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (np.ones(7, np.float32), r"must be float32 \(6,\), got float32 \(7,\)"),
        (np.ones(6), r"got float64"),
        (np.ones((2, 3), np.float32), r"got float32 \(2, 3\)"),
    ],
)
def test_a_packed_array_of_another_type_or_size_is_refused(packed: np.ndarray[Any, Any], message: str) -> None:
    index = AdapterIndex(("a", "b"), ((2,), (2, 2)), WireDtype.float32)
    with pytest.raises(ValueError, match=message):
        PackedAdapter(index, packed).unpack()


def test_packing_names_the_tensor_that_does_not_fit() -> None:
    index = AdapterIndex(("a", "b"), ((2,), (2, 2)), WireDtype.float32)
    with pytest.raises(ValueError, match=r"b must have shape \[2, 2\], got \[4\]"):
        PackedAdapter.pack({"a": torch.ones(2), "b": torch.ones(4)}, index)
    with pytest.raises(ValueError, match="the first is b"):
        PackedAdapter.pack({"a": torch.ones(2)}, index)


def test_an_adapter_read_from_one_model_and_loaded_into_another_makes_them_equal() -> None:
    first, second = small_model(), small_model()
    with torch.no_grad():
        for parameter in lora_parameters(first).values():
            parameter.normal_()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before, want = second(ids).logits, first(ids).logits
        load_into(second, read_from(first))
        assert torch.equal(second(ids).logits, want)
        assert not torch.equal(before, want)
    state = read_from(first)
    assert list(state) == sorted(state)
    assert set(state) == set(read_from(second))
    with torch.no_grad():
        next(iter(lora_parameters(first).values())).zero_()
    assert all(tensor.any() for tensor in state.values()), "what was read must not follow the model"


@pytest.mark.parametrize("how", ["unknown", "missing", "shape"])
def test_loading_is_strict_where_peft_is_silent(how: str) -> None:
    model = small_model()
    before = read_from(model)
    state = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    name = sorted(state)[5]
    if how == "unknown":
        state["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 48)
        message = "the first is base_model.model.model.layers.9"
    elif how == "missing":
        del state[name]
        message = f"the first is {name}"
    else:
        state[name] = state[name].T.contiguous()
        message = f"{name} must have shape"
    with pytest.raises(ValueError, match=message):
        load_into(model, state)
    after = read_from(model)
    assert all(torch.equal(before[key], after[key]) for key in before)
    if how != "shape":
        set_peft_model_state_dict(model, state)  # the control: peft itself does not mind


def test_a_model_that_trains_more_than_lora_is_refused() -> None:
    with pytest.raises(ValueError, match=r"LoRA tensors only, but .*lm_head"):
        read_from(small_model(["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match=r"LoRA tensors only, but .*embed_tokens"):
        read_from(small_model(["q_proj"]).requires_grad_(True))
