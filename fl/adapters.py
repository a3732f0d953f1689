"""An adapter on the wire and in a model: LoRA tensors only, one packed array a message, and a small index of it.

An adapter (a *state*) is a `dict[str, torch.Tensor]` whose names are PEFT's own (`...q_proj.lora_A.weight`, without the
adapter's name), in the canonical order: sorted by name. Knows nothing about rounds, weights or files.
"""

import itertools
import math
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import InflatableObject
from peft import get_peft_model_state_dict
from torch import nn

from fl.settings import WireDtype

ARRAYS = "arrays"
"""Record of a message that holds the adapter: an ArrayRecord with the one array ADAPTER."""
ADAPTER = "adapter"
INDEX = "index"
"""Record of a message that says what the packed array is made of: a ConfigRecord with the one bytes value INDEX."""

MAX_INDEX_BYTES = 1 << 20  # inflated; a real one is a few hundred
MAX_TENSORS = 1 << 16
HOLE = "#"  # stands for a number in a template

NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([^']{1,8})', 'fortran_order': False, 'shape': \(([0-9]{1,18}),\), \} *\n",
    re.DOTALL,
)
"""Start of a version 1.0 .npy file of one dimension: what numpy.save writes (numpy.lib.format)."""

Adapter = Mapping[str, torch.Tensor]
Packed = npt.NDArray[Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class AdapterIndex:
    """What a packed adapter is made of: tensor names (sorted, distinct), their shapes, and the type on the wire."""

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    dtype: WireDtype

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("adapter must have at least 1 tensor, got 0")
        if list(self.names) != sorted(set(self.names)) or len(self.shapes) != len(self.names):
            raise ValueError(f"index names must be distinct, sorted and have one shape each, got {self.names[:3]}...")
        if odd := [name for name in self.names if HOLE in name.split(".")]:
            raise ValueError(f"tensor names must not have a component {HOLE}, got {odd[0]}")

    @classmethod
    def of(cls, state: Adapter, dtype: WireDtype) -> "AdapterIndex":
        """The index of an adapter's tensors."""
        names = tuple(sorted(state))
        return cls(names, tuple(tuple(state[name].shape) for name in names), dtype)

    @property
    def size(self) -> int:
        """Number of values in all tensors."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def tensor_bytes(self) -> int:
        """Sum of the tensors' bytes on the wire."""
        return self.size * self.dtype.itemsize

    def encode(self) -> bytes:
        """A few hundred bytes, whatever the number of layers: names that differ only in numbers share one template."""
        groups: dict[tuple[str, Shape], list[tuple[int, ...]]] = {}
        for name, shape in zip(self.names, self.shapes):
            template, numbers = _template(name)
            groups.setdefault((template, shape), []).append(numbers)
        entries = [_Entry(template, shape, _boxes(found)) for (template, shape), found in sorted(groups.items())]
        return zlib.compress(msgspec.json.encode(_Index(self.dtype, entries)), 9)

    @classmethod
    def decode(cls, data: bytes) -> "AdapterIndex":
        """The index that `encode` wrote. ValueError when the bytes are anything else, or too large to be believed."""
        try:
            inflater = zlib.decompressobj()
            text = inflater.decompress(data, MAX_INDEX_BYTES)
            if not inflater.eof or inflater.unused_data:
                raise ValueError("it does not end where it should")
            index = msgspec.json.decode(text, type=_Index)
            shapes = _expand(index.entries)
            names = tuple(sorted(shapes))
            return cls(names, tuple(shapes[name] for name in names), index.dtype)
        except (zlib.error, msgspec.DecodeError, ValueError) as error:
            raise ValueError(f"index must be an encoded adapter index, got {len(data)} bytes: {error}") from error

    def difference(self, other: "AdapterIndex") -> str | None:
        """What the other index has that this one does not expect, in one phrase naming the tensor; None if equal."""
        if self == other:
            return None
        mine, theirs = dict(zip(self.names, self.shapes)), dict(zip(other.names, other.shapes))
        if missing := sorted(mine.keys() - theirs.keys()):
            return f"{len(missing)} of {len(mine)} tensors are missing, the first is {missing[0]}"
        if unknown := sorted(theirs.keys() - mine.keys()):
            return f"{len(unknown)} tensors are unknown, the first is {unknown[0]}"
        for name in self.names:
            if mine[name] != theirs[name]:
                return f"{name} must have shape {list(mine[name])}, got {list(theirs[name])}"
        return f"values must be {self.dtype.name}, got {other.dtype.name}"


def pack(state: Adapter, index: AdapterIndex) -> Packed:
    """The adapter as one flat array [index.size] of the wire's type (rounded to nearest even for bfloat16).

    ValueError naming the tensor when names or shapes are not the index's.
    """
    if (difference := index.difference(AdapterIndex.of(state, index.dtype))) is not None:
        raise ValueError(f"adapter does not fit its index: {difference}")
    flat = torch.cat([state[name].detach().reshape(-1).to("cpu", index.dtype.torch) for name in index.names])
    return _to_numpy(flat)


def unpack(packed: Packed, index: AdapterIndex) -> dict[str, torch.Tensor]:
    """The adapter's tensors in the wire's type, views of one copy of the array. ValueError when type or size differ."""
    if packed.dtype != index.dtype.numpy or packed.shape != (index.size,):
        expected = f"{index.dtype.numpy} ({index.size},)"
        raise ValueError(f"packed adapter must be {expected}, got {packed.dtype} {packed.shape}")
    flat = torch.from_numpy(packed.copy())
    parts = flat.view(index.dtype.torch).split([math.prod(shape) for shape in index.shapes])
    return {name: part.view(shape) for name, shape, part in zip(index.names, index.shapes, parts)}


def to_float32(packed: Packed, index: AdapterIndex) -> npt.NDArray[np.float32]:
    """The packed values as float32 [index.size]; exact, and no copy when the wire is float32 already."""
    if index.dtype is WireDtype.float32:
        return packed
    return (packed.astype(np.uint32) << 16).view(np.float32)


def from_float32(values: npt.NDArray[np.float32], index: AdapterIndex) -> Packed:
    """Float32 values [index.size] in the wire's type, rounded to nearest even for bfloat16; no copy for float32."""
    return _to_numpy(torch.from_numpy(values).to(index.dtype.torch))


def to_array_record(packed: Packed) -> ArrayRecord:
    """The one-array record in which a packed adapter travels."""
    return ArrayRecord({ADAPTER: Array(packed)})


def to_records(packed: Packed, index: AdapterIndex) -> RecordDict:
    """A message's content with the adapter (ARRAYS) and its index (INDEX); add metrics or a config to it."""
    return RecordDict({ARRAYS: to_array_record(packed), INDEX: ConfigRecord({INDEX: index.encode()})})


def index_from(content: RecordDict) -> AdapterIndex:
    """The index a message carries. ValueError when it has none, or one that does not decode."""
    record = content.get(INDEX)
    data = record.get(INDEX) if isinstance(record, ConfigRecord) else None
    if not isinstance(data, bytes):
        raise ValueError(f"{INDEX} must be a ConfigRecord with bytes under {INDEX!r}, got {_names(content)}")
    return AdapterIndex.decode(data)


def packed_from(content: RecordDict, index: AdapterIndex) -> Packed:
    """The packed adapter a message carries, read-only and not copied, checked against the index.

    ValueError when the record is missing, or type, size or serialisation are not what the index says.
    """
    # Not content.array_records: that view refers to itself, and keeps the whole reply until the garbage collector runs.
    record = content.get(ARRAYS)
    if not isinstance(record, ArrayRecord) or list(record) != [ADAPTER]:
        raise ValueError(f"{ARRAYS} must be an ArrayRecord with the one array {ADAPTER!r}, got {_names(content)}")
    return _read_npy(record[ADAPTER], index)


def from_records(content: RecordDict) -> tuple[dict[str, torch.Tensor], AdapterIndex]:
    """The adapter and the index a message carries. ValueError when either is missing or they do not agree."""
    index = index_from(content)
    return unpack(packed_from(content, index), index), index


def message_bytes(message: Message) -> int:
    """Bytes of the message as Flower serialises it: every nested object with its header, metadata included.

    Flower sends an array in chunks of 5 MiB, each with about 90 bytes of names around it (the environment variable
    FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE, read when flwr is imported, makes them larger).
    """
    return _object_bytes(message)


def read_from(model: nn.Module) -> dict[str, torch.Tensor]:
    """The LoRA tensors of a PEFT model's active adapter in canonical order, detached copies on the CPU.

    ValueError when the adapter trains anything else (modules_to_save, biases): those would have to travel too.
    """
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in lora_parameters(model).items()}


def load_into(model: nn.Module, state: Adapter) -> None:
    """Copy an adapter into a PEFT model's active adapter, in place; all of it or nothing.

    Strict, because `peft.set_peft_model_state_dict` drops unknown names in silence: ValueError naming the first tensor
    that is unknown, missing or of another shape. Values are converted to the model's own type and device.
    """
    parameters = lora_parameters(model)
    expected = AdapterIndex.of(parameters, WireDtype.float32)
    if (difference := expected.difference(AdapterIndex.of(state, WireDtype.float32))) is not None:
        raise ValueError(f"adapter does not fit the model: {difference}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def lora_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's own LoRA parameters (no copies) under PEFT's names, sorted by name."""
    adapter_name = model.active_adapter
    assert isinstance(adapter_name, str), "one adapter is active in a federated model"
    # Parameters only: a whole state dict would serialise every 4-bit layer's quantisation state for nothing.
    lora = {name: value for name, value in model.named_parameters() if "lora_" in name}
    if other := [name for name, value in model.named_parameters() if value.requires_grad and name not in lora]:
        raise ValueError(f"adapter must consist of LoRA tensors only, but {other[0]} is trained too")
    named = get_peft_model_state_dict(model, state_dict=lora, adapter_name=adapter_name, save_embedding_layers=False)
    return {name: named[name] for name in sorted(named)}


_Extent = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
_Number = Annotated[int, msgspec.Meta(ge=0, le=10**9)]
_Box = list[list[tuple[_Number, _Number]]]  # for each number in a template: half-open runs of its values


class _Entry(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """All tensors of one shape whose names fit one template."""

    template: str
    shape: tuple[_Extent, ...]
    boxes: list[_Box]


class _Index(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """What an encoded index consists of."""

    dtype: WireDtype
    entries: list[_Entry]


def _template(name: str) -> tuple[str, tuple[int, ...]]:
    """`a.12.b` -> (`a.#.b`, (12,)): whole dotted components that are plain decimal numbers become `#`."""
    parts = name.split(".")
    numbers = tuple(int(part) for part in parts if _is_number(part))
    return ".".join(HOLE if _is_number(part) else part for part in parts), numbers


def _is_number(part: str) -> bool:
    return re.fullmatch(r"0|[1-9][0-9]{0,8}", part) is not None


def _boxes(found: Sequence[tuple[int, ...]]) -> list[_Box]:
    """The numbers of one template: one box if every combination of their values occurs, else one for each."""
    axes = [sorted(set(column)) for column in zip(*found)]
    if math.prod(len(axis) for axis in axes) == len(found):
        return [[_runs(axis) for axis in axes]]
    return [[[(number, number + 1)] for number in numbers] for numbers in sorted(found)]


def _runs(values: Sequence[int]) -> list[tuple[int, int]]:
    """[0, 1, 2, 7] -> [(0, 3), (7, 8)]: half-open runs of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for value in values:
        if runs and runs[-1][1] == value:
            runs[-1] = (runs[-1][0], value + 1)
        else:
            runs.append((value, value + 1))
    return runs


def _expand(entries: Iterable[_Entry]) -> dict[str, Shape]:
    """Names and shapes of an index's entries; counts before it expands."""
    shapes: dict[str, Shape] = {}
    for entry in entries:
        for box in entry.boxes:
            if entry.template.split(".").count(HOLE) != len(box):
                raise ValueError(f"{entry.template} has another number of holes than {len(box)}")
            if any(start >= stop for runs in box for start, stop in runs):
                raise ValueError(f"{entry.template} has an empty run")
            count = math.prod(sum(stop - start for start, stop in runs) for runs in box)
            if count > MAX_TENSORS - len(shapes):
                raise ValueError(f"it names more than {MAX_TENSORS} tensors")
            axes = ([number for start, stop in runs for number in range(start, stop)] for runs in box)
            for numbers in itertools.product(*axes):
                parts = iter(numbers)
                name = ".".join(str(next(parts)) if part == HOLE else part for part in entry.template.split("."))
                if name in shapes:
                    raise ValueError(f"{name} is named twice")
                shapes[name] = entry.shape
    return shapes


def _object_bytes(item: InflatableObject) -> int:
    children = item.children or {}
    return len(item.deflate()) + sum(_object_bytes(child) for child in children.values())


def _to_numpy(flat: torch.Tensor) -> Packed:
    array: Packed = (flat.view(torch.uint16) if flat.dtype is torch.bfloat16 else flat).numpy()
    return array


def _read_npy(array: Array, index: AdapterIndex) -> Packed:
    """Flower's Array (one .npy file) as numpy: no copy and, unlike numpy's own reader, no evaluation of its header."""
    where = f"{ARRAYS}.{ADAPTER}"
    header = NPY_HEADER.match(array.data)
    if array.stype != "numpy.ndarray" or header is None:
        raise ValueError(f"{where} must be a flat numpy array, got {array.dtype} {array.shape} {array.stype}")
    expected = (index.dtype.numpy.str, str(index.size))
    found = (header[1].decode("latin-1"), header[2].decode("latin-1"))
    if found != expected:
        raise ValueError(f"{where} must be {' x '.join(expected)}, got {' x '.join(found)}")
    if (data_bytes := len(array.data) - header.end()) != index.tensor_bytes:
        raise ValueError(f"{where} must hold {index.tensor_bytes} bytes, got {data_bytes}")
    packed: Packed = np.frombuffer(array.data, index.dtype.numpy, offset=header.end())
    return packed


def _names(content: RecordDict) -> str:
    return ", ".join(f"{key}: {type(record).__name__}({', '.join(record)})" for key, record in content.items())
