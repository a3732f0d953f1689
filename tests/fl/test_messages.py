import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from fl.adapters import AdapterIndex, PackedAdapter
from fl.messages import ADAPTER, ARRAYS, INDEX, from_records, message_bytes, to_records
from fl.settings import WireDtype
from tests.fl.test_adapters import LLAMA_8B, LLAMA_70B, SMOLLM2


@pytest.fixture(autouse=True)
def _inside_a_run() -> None:
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1


def message_of(index: AdapterIndex, reply: bool) -> Message:
    """A message as it travels: random values, and everything a client's reply holds."""
    rng = np.random.default_rng(0)
    content = to_records(PackedAdapter(index, rng.integers(0, 2**16, index.size, np.uint16).astype(index.dtype.numpy)))
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
    packed = from_records(received.content)
    assert packed.index == SMOLLM2
    assert packed.array.tobytes() == from_records(message.content, SMOLLM2).array.tobytes()


def test_content_without_an_index_or_array_is_refused() -> None:
    index = AdapterIndex(("a",), ((6,),), WireDtype.float32)
    content = to_records(PackedAdapter(index, np.ones(6, np.float32)))
    with pytest.raises(ValueError, match="index must be a ConfigRecord with bytes"):
        from_records(RecordDict({ARRAYS: content[ARRAYS]}))
    with pytest.raises(ValueError, match="the one array 'adapter'"):
        from_records(RecordDict({INDEX: content[INDEX]}))
    with pytest.raises(ValueError, match="420 of 420 tensors are missing"):
        from_records(content, SMOLLM2)
    array = content.array_records[ARRAYS][ADAPTER]
    good = array.data
    for data, stype, message in (
        (b"\x80\x04pickled", "numpy.ndarray", "must be a flat numpy array"),
        (good.replace(b"<f4", b"|O "), "numpy.ndarray", r"must be <f4 x 6, got \|O  x 6"),
        (good[:-1], "numpy.ndarray", "must hold 24 bytes, got 23"),
        (good, "raw", "must be a flat numpy array, got float32"),
    ):
        array.data, array.stype = data, stype
        with pytest.raises(ValueError, match=message):
            from_records(content)
    array.data, array.stype = good, "numpy.ndarray"
    assert from_records(content, index).array.tolist() == [1.0] * 6
