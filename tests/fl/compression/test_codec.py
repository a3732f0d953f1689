import math

import numpy as np
import pytest
import torch
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from fl.adapters import AdapterIndex, PackedAdapter
from fl.compression.codec import BLOCK, BLOCK_4, Coder, largest
from fl.compression.messages import to_update_records
from fl.messages import message_bytes, to_records
from fl.settings import Codec, WireDtype

CODECS = [codec for codec in Codec if codec is not Codec.none]


def coder_of(codec: Codec, fraction: float = 0.03) -> Coder:
    return Coder(codec, fraction)


def values_of(size: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(size) * 10.0 ** rng.integers(-6, 2, size)).astype(np.float32)


@pytest.mark.parametrize(("codec", "most"), [(Codec.int8, 0.26), (Codec.int4, 0.14), (Codec.topk_int8, 0.08)])
def test_a_whole_message_takes_no_more_than_its_share_of_float32(codec: Codec, most: float) -> None:
    """All of it as Flower serialises it, index, scales and positions included."""
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    size = 600_000
    index = AdapterIndex(
        tuple(f"m{i:03d}.lora_A.weight" for i in range(400)), ((1, size // 400),) * 400, WireDtype.float32
    )
    values = values_of(size)
    whole = message_bytes(Message(to_records(PackedAdapter(index, values)), 1, "train"))
    short = message_bytes(Message(to_update_records(coder_of(codec).encode(values), index), 1, "train"))
    assert short <= most * whole


@pytest.mark.parametrize("codec", CODECS)
@given(size=st.integers(1, 3_000), seed=st.integers(0, 2**16))
def test_decoding_gives_back_what_the_format_can_hold(codec: Codec, size: int, seed: int) -> None:
    values, coder = values_of(size, seed), coder_of(codec)
    data = coder.encode(values)
    assert data.nbytes == coder.size_of(size)
    decoded = coder.decode(data, size)
    assert decoded.dtype == np.float32
    if codec is Codec.bf16:
        assert decoded.tobytes() == torch.from_numpy(values).bfloat16().float().numpy().tobytes()
    elif codec is Codec.topk_int8:
        order = sorted(range(size), key=lambda place: (-abs(values[place]), place))
        kept = sorted(order[: math.ceil(0.03 * size)])
        assert set(np.flatnonzero(decoded)) <= set(kept)
        for start in range(0, len(kept), BLOCK):
            check_block(values[kept[start : start + BLOCK]], decoded[kept[start : start + BLOCK]], 127)
    else:
        block, most = (BLOCK, 127) if codec is Codec.int8 else (BLOCK_4, 7)
        for start in range(0, size, block):
            check_block(values[start : start + block], decoded[start : start + block], most)


def check_block(values: np.ndarray, decoded: np.ndarray, most: int) -> None:
    """Nothing is off by more than half a step of the block's scale."""
    step = float(np.abs(values).max()) / most
    assert float(np.abs(values - decoded).max()) <= step * (0.5 + 1e-5)


@pytest.mark.parametrize("codec", CODECS)
def test_zeros_stay_zeros_and_what_is_not_finite_is_refused(codec: Codec) -> None:
    coder = coder_of(codec)
    assert not coder.decode(coder.encode(np.zeros(700, np.float32)), 700).any()
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="must be finite to be compressed"):
            coder.encode(np.array([1, bad], np.float32))


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_of_another_size_or_with_scales_that_are_no_numbers_are_refused(codec: Codec) -> None:
    coder, data = coder_of(codec), coder_of(codec).encode(values_of(1_000))
    with pytest.raises(ValueError, match=f"{codec.name} must have {data.nbytes} bytes, got uint8"):
        coder.decode(data[:-1], 1_000)
    with pytest.raises(ValueError, match="must have"):
        coder.decode(data, 1_600)
    spoilt = data.copy()
    spoilt[120 : 124 if codec is Codec.topk_int8 else 4] = 0xFF
    spoilt[: 0 if codec is Codec.topk_int8 else 4] = 0xFF  # a NaN in the first scale, or value
    with pytest.raises(ValueError, match="an update must be finite"):
        coder.decode(spoilt, 1_000)


def test_positions_that_do_not_rise_or_lie_outside_are_refused() -> None:
    coder = coder_of(Codec.topk_int8)
    for place, position in ((0, 999), (29, 1_000)):
        data = coder.encode(values_of(1_000))
        data[: 4 * 30].view("<u4")[place] = position
        with pytest.raises(ValueError, match="topk_int8 must have rising positions below 1000"):
            coder.decode(data, 1_000)


def test_of_equal_magnitudes_the_first_are_kept() -> None:
    values = np.array([1, -2, 2, 2, -1, 2], np.float32)
    assert largest(values, 3).tolist() == [1, 2, 3]
    assert largest(values, 5).tolist() == [0, 1, 2, 3, 5]
    assert largest(values, 6).tolist() == [*range(6)]


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_rounded_away_arrives_with_the_next_updates(codec: Codec) -> None:
    """Error feedback: after many rounds, what has arrived is short of what was meant by one round's error."""
    coder, update = coder_of(codec, 0.1), values_of(500, 3)
    error, arrived, without = np.zeros(500, np.float32), np.zeros(500), np.zeros(500)
    for _ in range(40):
        decoded = coder.decode(coder.encode(update + error), 500)
        error = update + error - decoded
        arrived += decoded
        without += coder.decode(coder.encode(update), 500)
    np.testing.assert_allclose(arrived + error, 40.0 * update, rtol=1e-4, atol=1e-4)
    assert np.linalg.norm(40.0 * update - arrived) < 0.5 * np.linalg.norm(40.0 * update - without)
