"""Hidden states as bytes, as they cross from one shard to the next.

Shapes: N positions, H hidden size.
"""

import torch
from torch import Tensor

from split.chain.boundary import SCALE_BYTES, Boundary


def stored(hidden_NH: Tensor, boundary: Boundary) -> Tensor:
    """The numbers of N positions as they cross, from any device: in int8 still as float32. What is too large for the
    boundary's dtype is infinite here."""
    dtype = torch.bfloat16 if boundary is Boundary.bfloat16 else torch.float32
    return hidden_NH.detach().to(device="cpu", dtype=dtype)


def encode(hidden_NH: Tensor, boundary: Boundary) -> memoryview:
    """The bytes of N positions, from any device. They must be finite once they are `stored`."""
    stored_NH = stored(hidden_NH, boundary)
    return _encode_int8(stored_NH) if boundary is Boundary.int8 else _bytes(stored_NH)


def decode(
    body: memoryview, rows: int, hidden_size: int, boundary: Boundary, *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The N = `rows` positions of a body, N x H, in memory of their own: the rounding of some kernels depends on where
    a tensor lies, and split must equal whole.

    Raises:
        ValueError: the body has another size; nothing is allocated then.
    """
    expected = rows * boundary.row_bytes(hidden_size)
    if len(body) != expected:
        raise ValueError(
            f"hidden states of {rows} x {hidden_size} in {boundary.name} must be {expected} bytes, got {len(body)}"
        )
    raw = torch.empty(len(body), dtype=torch.uint8)
    raw.numpy().data[:] = body
    if boundary is Boundary.int8:
        hidden_NH = _decode_int8(raw, rows, hidden_size)
    else:
        dtype_stored = torch.float32 if boundary is Boundary.float32 else torch.bfloat16
        hidden_NH = raw.view(dtype_stored).view(rows, hidden_size)
    return hidden_NH.to(device=device, dtype=dtype)


def _encode_int8(hidden_NH: Tensor) -> memoryview:
    """All scales, then all numbers: round(127 h / max|h|)."""
    largest_N1 = hidden_NH.abs().amax(-1, keepdim=True)
    scaled_NH = hidden_NH * (127 / largest_N1.clamp(min=torch.finfo(torch.float32).tiny))
    numbers_NH = scaled_NH.round().clamp(-127, 127).to(torch.int8)
    return memoryview(bytes(_bytes(largest_N1)) + bytes(_bytes(numbers_NH)))


def _decode_int8(raw: Tensor, rows: int, hidden_size: int) -> Tensor:
    largest_N1 = raw[: rows * SCALE_BYTES].view(torch.float32).view(rows, 1)
    numbers_NH = raw[rows * SCALE_BYTES :].view(torch.int8).view(rows, hidden_size)
    return numbers_NH.float() * (largest_N1 / 127)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
