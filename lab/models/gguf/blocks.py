"""The numbers of 4 and 8 bits of a GGUF file, as `lab.models.packed` has them: a model is not rounded a second time.

transformers reads a GGUF file into float matrices, and may reorder their rows (Llama's rotary pairs). So the numbers of
a layer are found by the rows of its matrix: each is looked up among the dequantised rows of the file, and all must be
there, to the bit.

Shapes: N outputs, K inputs, G blocks of a row.
"""

import re
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab.models.packed import GROUP, PACKED_AT_ONCE, stored_form

MULTIPLIER = 6364136223846793005
"""Multiplier of Knuth's linear congruential generator (MMIX): a row's digest is a polynomial in it."""


BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
"""Bits of a number, by the kinds of blocks that are taken over."""


def stored_kinds(reader: Any) -> tuple[set[str], set[str]]:
    """How a GGUF file stores the matrices of its layers, such as Q6_K, and that of its head: a tied one is the
    embedding."""
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    heads = [kinds[name] for name in ("output.weight", "token_embd.weight") if name in kinds]
    return {kind for name, kind in kinds.items() if name.startswith("blk.")}, {*heads[:1]}


class GgufBlocks:
    """The matrices of a file whose blocks are 32 weights with one scale: Q4_0 (w = d (q - 8)), Q4_1 (w = d q + m) and
    Q8_0 (w = d q).

    Args:
        reader: gguf's `GGUFReader` of the file.
        bits: Numbers of these bits are looked for.
        dtype: Dtype to which the matrices were rounded after they had been dequantised.
        layers: Only their matrices are looked at; None: those of all.
        head: Whether matrices of no layer are looked at.
    """

    def __init__(
        self,
        reader: Any,
        dtype: torch.dtype,
        bits: Collection[int],
        layers: Collection[int] | None = None,
        *,
        head: bool = True,
    ) -> None:
        self.found = 0
        """Number of matrices found so far."""
        self._dtype = dtype
        self._tensors: dict[int, Any] = {}
        for tensor in reader.tensors:
            layer = re.match(r"blk\.(\d+)\.", tensor.name)
            is_asked = head if layer is None else layers is None or int(layer[1]) in layers
            if is_asked and BITS.get(tensor.tensor_type.name) in bits and len(tensor.shape) == 2:
                self._tensors[_digest(self._row_digests(tensor))] = tensor

    def find(self, weight_NK: Tensor, bits: int) -> tuple[Tensor, Tensor] | None:
        """Numbers and scales of a matrix, as `lab.models.packed.quantise` returns them; None if the file does not have
        it, or not in numbers of so many bits. Scale and zero are rounded to bfloat16; the numbers are the file's."""
        digests_N = np.concatenate([_digests(rows_NK) for rows_NK in weight_NK.split(PACKED_AT_ONCE)])
        tensor = self._tensors.get(_digest(digests_N))
        if tensor is None or BITS[tensor.tensor_type.name] != bits:
            return None
        order_N = self._row_digests(tensor).argsort()[digests_N.argsort().argsort()]
        made = []
        for start in range(0, len(order_N), PACKED_AT_ONCE):
            rows_N = order_N[start : start + PACKED_AT_ONCE]
            q_NK, scale_NG, minimum_NG = _blocks(tensor, rows_N)
            if not torch.equal(self._dequantised(q_NK, scale_NG, minimum_NG), weight_NK[start : start + len(rows_N)]):
                return None
            zero_NG = minimum_NG + 2 ** (bits - 1) * scale_NG
            made.append(stored_form(q_NK, scale_NG, zero_NG, bits))
        self.found += 1
        numbers, scales = zip(*made, strict=True)
        return torch.cat(numbers), torch.cat(scales, 1)

    def _row_digests(self, tensor: Any) -> Any:
        outputs = np.arange(int(tensor.shape[1]))
        parts = np.split(outputs, range(PACKED_AT_ONCE, len(outputs), PACKED_AT_ONCE))
        return np.concatenate([_digests(self._dequantised(*_blocks(tensor, rows_N))) for rows_N in parts])

    def _dequantised(self, q_NK: Tensor, scale_NG: Tensor, minimum_NG: Tensor) -> Tensor:
        wide_NGK = scale_NG[:, :, None] * q_NK.unflatten(1, (-1, GROUP)) + minimum_NG[:, :, None]
        return torch.Tensor.to(wide_NGK.flatten(1), self._dtype)


def _blocks(tensor: Any, rows_N: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of some rows, q of each weight (uint8 N x K), and scale and minimum of each block (float32 N x G): w = scale q +
    minimum.

    A block is d, for Q4_1 m, both float16, and its numbers: 16 bytes whose low halves are the first 16 weights, or 32
    signed bytes.
    """
    name, outputs = tensor.tensor_type.name, int(tensor.shape[1])
    floats = 2 if name == "Q4_1" else 1
    size = 2 * floats + GROUP * BITS[name] // 8
    bytes_NGX = np.ascontiguousarray(tensor.data.view(np.uint8).reshape(outputs, -1, size)[rows_N])
    head_NGF = torch.from_numpy(bytes_NGX[..., : 2 * floats].copy().view(np.float16).astype(np.float32))
    numbers_NGX = torch.from_numpy(bytes_NGX[..., 2 * floats :].copy())
    scale_NG = head_NGF[..., 0]
    if name == "Q8_0":
        return numbers_NGX.flatten(1) ^ 128, scale_NG, -128 * scale_NG  # a signed byte, counted from -128
    q_NK = torch.cat((numbers_NGX & 15, numbers_NGX >> 4), 2).flatten(1)
    return q_NK, scale_NG, head_NGF[..., 1] if floats == 2 else -8 * scale_NG


def _digests(weight_NK: Tensor) -> Any:
    """64-bit digests of all rows, by numpy, whose integers wrap around. Zero gets one sign: Q4_0 may have a negative
    scale."""
    words_NK = (weight_NK + 0).contiguous().view(torch.int16 if weight_NK.element_size() == 2 else torch.int32).numpy()
    with np.errstate(over="ignore"):
        powers_K = np.cumprod(np.full(weight_NK.shape[1], MULTIPLIER, dtype=np.uint64), dtype=np.uint64)
        return words_NK.astype(np.uint64) @ powers_K


def _digest(digests_N: Any) -> int:
    """A digest of a set of rows, independent of their order."""
    return int(digests_N.sum(dtype=np.uint64))
