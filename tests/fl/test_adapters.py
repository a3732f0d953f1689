import itertools
import math
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from fl.adapters import (
    ADAPTER,
    ARRAYS,
    INDEX,
    AdapterIndex,
    from_float32,
    from_records,
    index_from,
    load_into,
    lora_parameters,
    message_bytes,
    pack,
    packed_from,
    read_from,
    to_float32,
    to_records,
    unpack,
)
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


@pytest.fixture(autouse=True)
def _inside_a_run() -> None:
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1


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


def message_of(index: AdapterIndex, reply: bool) -> Message:
    """A message as it travels: random values, and everything a client's reply holds."""
    rng = np.random.default_rng(0)
    content = to_records(rng.integers(0, 2**16, index.size, np.uint16).astype(index.dtype.numpy), index)
    if reply:
        names = ["num-examples", "partition-id", "train_loss", "train_seconds", "peak_rss_bytes", "gradient_norm"]
        content["metrics"] = MetricRecord(dict.fromkeys(names, 1.5))
        content["evaluate"] = MetricRecord(dict.fromkeys(names[:3], 1.5))
    else:
        content["config"] = ConfigRecord({"server-round": 12, "learning-rate": 2e-4})
    return Message(content, 2**63 + 5, "train", ttl=600.0, group_id="12")


@pytest.mark.parametrize("reply", [False, True])
@pytest.mark.parametrize("index", [SMOLLM2, LLAMA_8B, LLAMA_70B], ids=["smollm2", "llama_8b", "llama_70b"])
def test_a_serialised_message_is_its_tensors_and_next_to_nothing(index: AdapterIndex, reply: bool) -> None:
    message = message_of(index, reply)
    serialised = sum(len(item.deflate()) for item in get_all_nested_objects(message).values())
    assert message_bytes(message) == serialised
    assert index.tensor_bytes < serialised <= index.tensor_bytes + 4096
    assert serialised <= 1.01 * index.tensor_bytes


def test_flowers_one_array_a_tensor_is_what_packing_avoids() -> None:
    arrays = {name: torch.randn(shape) for name, shape in zip(SMOLLM2.names, SMOLLM2.shapes)}
    unpacked = Message(RecordDict({ARRAYS: ArrayRecord(arrays)}), 5, "train")
    assert message_bytes(unpacked) > SMOLLM2.tensor_bytes + 4096


def test_a_message_survives_flowers_own_serialisation() -> None:
    message = message_of(SMOLLM2, reply=True)
    contents = {key: item.deflate() for key, item in get_all_nested_objects(message).items()}
    received = inflate_object_from_contents(message.object_id, contents)
    assert isinstance(received, Message)
    state, index = from_records(received.content)
    assert index == SMOLLM2
    assert pack(state, index).tobytes() == packed_from(message.content, SMOLLM2).tobytes()


@pytest.mark.parametrize(
    "index", [SMOLLM2, LLAMA_8B, LLAMA_70B, EXPERTS], ids=["smollm2", "llama_8b", "llama_70b", "experts"]
)
def test_an_index_is_small_whatever_the_model(index: AdapterIndex) -> None:
    assert len(index.encode()) < 512
    assert AdapterIndex.decode(index.encode()) == index


names = st.lists(
    st.sampled_from(["0", "1", "2", "10", "01", "a#", "a", "lora_A", "layers", ""]), min_size=1, max_size=4
)
shapes = st.lists(st.integers(1, 5), max_size=3).map(tuple)


@settings(deadline=None)
@given(st.dictionaries(names.map(".".join), shapes, min_size=1, max_size=12), st.sampled_from(WireDtype))
def test_any_names_and_shapes_survive_index_and_packing(named: dict[str, tuple[int, ...]], dtype: WireDtype) -> None:
    state = {name: torch.randn(shape).to(dtype.torch) for name, shape in named.items()}
    index = AdapterIndex.of(state, dtype)
    assert AdapterIndex.decode(index.encode()) == index
    packed = pack(state, index)
    assert packed.shape == (index.size,)
    assert packed.nbytes == index.tensor_bytes
    assert packed.nbytes == sum(tensor.nbytes for tensor in state.values())
    unpacked = unpack(packed, index)
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
        '{"float32": 1}',
        '["float32", []]',
        '["float64", [["a", [1], [[]]]]]',
        '["float32", [["a", [1], [[]], 3]]]',
        '["float32", [["a.#", [1], [[[[0, 9999999]]]]]]]',
        '["float32", [["a.#", [1], [[[[0, 9999999], [9999999, 5]]]]]]]',
        '["float32", [["#.#.#", [1], [[[[0, 999]], [[0, 999]], [[0, 999]]]]]]]',
        '["float32", [["a.#", [1], [[]]]]]',
        '["float32", [["a", [1], [[[[0, 1]]]]]]]',
        '["float32", [["a", [1], [[]]], ["a", [2], [[]]]]]',
        '["float32", [["a", [1], [[], []]]]]',
        '["float32", [["a", [-4], [[]]]]]',
        '["float32", [["a", [1.5], [[]]]]]',
        '["float32", [["a", [99999999999], [[]]]]]',
        '["float32", [["a.#", [1], [[[[-3, -1]]]]]]]',
        '["float32", [[1, [1], [[]]]]]',
        "[" * 5_000,
        " " * (2 << 20),
    ],
)
def test_an_index_that_lies_is_refused_before_it_is_expanded(text: str) -> None:
    with pytest.raises(ValueError, match="index must be an encoded adapter index"):
        AdapterIndex.decode(zlib.compress(text.encode()))


def test_bfloat16_travels_bit_by_bit_and_rounds_to_nearest_even() -> None:
    state = {"a": torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -math.pi, 3e-39])}
    index = AdapterIndex.of(state, WireDtype.bfloat16)
    packed = pack(state, index)
    assert packed.dtype == np.uint16
    assert torch.equal(unpack(packed, index)["a"], state["a"].to(torch.bfloat16))
    values = to_float32(packed, index)
    assert values.tolist() == state["a"].to(torch.bfloat16).float().tolist()
    assert from_float32(values, index).tolist() == packed.tolist()


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
        unpack(packed, index)


def test_packing_names_the_tensor_that_does_not_fit() -> None:
    index = AdapterIndex(("a", "b"), ((2,), (2, 2)), WireDtype.float32)
    with pytest.raises(ValueError, match=r"b must have shape \[2, 2\], got \[4\]"):
        pack({"a": torch.ones(2), "b": torch.ones(4)}, index)
    with pytest.raises(ValueError, match="the first is b"):
        pack({"a": torch.ones(2)}, index)


def test_content_without_an_index_or_array_is_refused() -> None:
    content = to_records(np.ones(6, np.float32), AdapterIndex(("a",), ((6,),), WireDtype.float32))
    del content[INDEX]
    with pytest.raises(ValueError, match="index must be a ConfigRecord with bytes"):
        index_from(content)
    with pytest.raises(ValueError, match="the one array 'adapter'"):
        packed_from(RecordDict(), SMOLLM2)
    array = content.array_records[ARRAYS][ADAPTER]
    index = AdapterIndex(("a",), ((6,),), WireDtype.float32)
    good = array.data
    for data, stype, message in (
        (b"\x80\x04pickled", "numpy.ndarray", "must be a flat numpy array"),
        (good.replace(b"<f4", b"|O "), "numpy.ndarray", r"must be <f4 x 6, got \|O  x 6"),
        (good[:-1], "numpy.ndarray", "must hold 24 bytes, got 23"),
        (good, "raw", "must be a flat numpy array, got float32"),
    ):
        array.data, array.stype = data, stype
        with pytest.raises(ValueError, match=message):
            packed_from(content, index)
    array.data, array.stype = good, "numpy.ndarray"
    assert packed_from(content, index).tolist() == [1.0] * 6


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


def test_names_that_would_confuse_the_index_are_refused() -> None:
    with pytest.raises(ValueError, match=r"component #, got a\.#"):
        AdapterIndex(("a.#",), ((1,),), WireDtype.float32)
