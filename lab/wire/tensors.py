"""Tensors as a frame body: the head names dtype and shape (`TensorSpec`), the body is their raw little-endian bytes.

Not imported by `lab.wire` itself, so that a client without tensors does not load torch.
"""

import math
import sys
from collections.abc import Sequence
from enum import Enum
from typing import Annotated

import msgspec
import torch

from lab.wire.faults import BadFrame, Peer
from lab.wire.fields import Uint32
from lab.wire.frames import ALIGNMENT_BYTES, Head

assert sys.byteorder == "little", "tensors travel as they lie in memory, little-endian"


class WireDtype(Enum):
    """The dtypes that travel; names are torch's."""

    float64 = "float64"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    int8 = "int8"
    int64 = "int64"

    @property
    def torch(self) -> torch.dtype:
        """The same in torch."""
        dtype = getattr(torch, self.value)
        assert isinstance(dtype, torch.dtype)
        return dtype


class TensorSpec(Head):
    """Dtype and shape of a tensor; a field of the head of the frame that carries its bytes."""

    dtype: WireDtype
    shape: Annotated[list[Uint32], msgspec.Meta(max_length=8)]

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor in the body."""
        return math.prod(self.shape) * self.dtype.torch.itemsize


def tensor_spec(tensor: torch.Tensor) -> TensorSpec:
    """Return dtype and shape of `tensor`. Raises `ValueError` for a dtype that does not travel."""
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in WireDtype.__members__:
        raise ValueError(f"tensor dtype must be one of {', '.join(WireDtype.__members__)}, got {name}")
    return TensorSpec(dtype=WireDtype[name], shape=list(tensor.shape))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the raw bytes of `tensor`; a view of its memory when that is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def read_tensor(spec: TensorSpec, body: memoryview, *, peer: Peer) -> torch.Tensor:
    """Return the one tensor of a body; see `read_tensors`."""
    return read_tensors([spec], body, peer=peer)[0]


def read_tensors(specs: Sequence[TensorSpec], body: memoryview, *, peer: Peer) -> list[torch.Tensor]:
    """Return the tensors that lie one after the other in `body`. Raises `BadFrame` unless their sizes add up to it.

    The sizes are compared before anything is allocated. A tensor is a view of `body` when that lies where torch would
    have put it; else a copy, because the rounding of some kernels depends on the alignment and split must equal whole.
    """
    announced = sum(spec.size_bytes for spec in specs)
    if announced != len(body):
        shapes = ", ".join(f"{spec.dtype.value}{spec.shape}" for spec in specs)
        raise BadFrame(peer, f"announced {shapes} = {announced} bytes, sent {len(body)}")
    tensors, offset = [], 0
    for spec in specs:
        tensors.append(_read(spec, body[offset : offset + spec.size_bytes]))
        offset += spec.size_bytes
    return tensors


def _read(spec: TensorSpec, raw: memoryview) -> torch.Tensor:
    flat = None
    if raw and not raw.readonly:
        flat = torch.frombuffer(raw, dtype=torch.uint8)
    if flat is None or flat.data_ptr() % ALIGNMENT_BYTES:
        flat = torch.empty(len(raw), dtype=torch.uint8)
        flat.numpy().data[:] = raw
    return flat.view(spec.dtype.torch).reshape(spec.shape)
