"""Updates of an adapter in few bytes: bfloat16, blocks of 8 or 4 bits, or the largest values alone.

Decoding is a function of the bytes alone and computes in float32, value by value: every machine decodes the same bits.
It needs no other reply, so replies are decoded as they arrive, in any order. Knows nothing of adapters and messages.

Layouts, little-endian, of n values (k of them for topk_int8, k = ceil(fraction * n)):

    bf16        n x 16 bits
    int8        one float32 scale for each block of BLOCK values, n x 8 bits
    int4        the same with blocks of BLOCK_4 values, n x 4 bits: two in a byte, the first in its low half
    topk_int8   k x uint32, the positions in rising order; then the k values as int8

A value is its whole number, in [-127, 127] or [-7, 7], times the scale of its block: the block's largest magnitude over
127 or 7. What is rounded away is not lost: the sender adds it to its next update (error feedback, arXiv 1901.09847).
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fl.settings import Codec

BLOCK = 256
"""Values that share a scale in 8 bits: 1.6 % more bytes."""
BLOCK_4 = 128
"""Values that share a scale in 4 bits: 6 % more bytes."""

Bytes = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
SCALE = np.dtype("<f4")
POSITION = np.dtype("<u4")


@dataclass(frozen=True)
class Coder:
    """One codec; `topk_fraction` is the share of the values that topk_int8 keeps."""

    codec: Codec
    topk_fraction: float

    def encode(self, values: Float32) -> Bytes:
        """The bytes of a float32 vector. ValueError for values that are not finite."""
        if not np.isfinite(values).all():
            raise ValueError("an update must be finite to be compressed")
        if self.codec is Codec.bf16:
            return _bytes_of(_to_bf16(values))
        if self.codec is Codec.topk_int8:
            positions = largest(values, self._kept(len(values)))
            return np.concatenate([_bytes_of(positions.astype(POSITION)), _quantized(values[positions], BLOCK, 127)])
        block, most = (BLOCK, 127) if self.codec is Codec.int8 else (BLOCK_4, 7)
        return _quantized(values, block, most)

    def decode(self, data: Bytes, size: int) -> Float32:
        """The float32 vector [size] that `data` stands for. ValueError for bytes that `encode` does not make."""
        if data.dtype != np.uint8 or data.shape != (self.size_of(size),):
            raise ValueError(f"{self.codec.name} must have {self.size_of(size)} bytes, got {data.dtype} {data.shape}")
        if self.codec is Codec.bf16:
            return _finite((data.view("<u2").astype(np.uint32) << 16).view(np.float32))
        if self.codec is not Codec.topk_int8:
            block, most = (BLOCK, 127) if self.codec is Codec.int8 else (BLOCK_4, 7)
            return _dequantized(data, size, block, most)
        kept = self._kept(size)
        split = kept * POSITION.itemsize
        positions = data[:split].view(POSITION)
        if positions[-1] >= size or (positions[1:] <= positions[:-1]).any():
            raise ValueError(f"topk_int8 must have rising positions below {size}")
        values: Float32 = np.zeros(size, np.float32)
        values[positions] = _dequantized(data[split:], kept, BLOCK, 127)
        return values

    def size_of(self, size: int) -> int:
        """Bytes of `size` values."""
        if self.codec is Codec.bf16:
            return 2 * size
        if self.codec is Codec.topk_int8:
            kept = self._kept(size)
            return kept * POSITION.itemsize + _quantized_size(kept, BLOCK, 127)
        return _quantized_size(size, *((BLOCK, 127) if self.codec is Codec.int8 else (BLOCK_4, 7)))

    def _kept(self, size: int) -> int:
        return min(size, math.ceil(self.topk_fraction * size))


def largest(values: Float32, count: int) -> npt.NDArray[np.intp]:
    """Positions of the `count` largest magnitudes, rising; of equal ones the first."""
    magnitudes = np.abs(values)
    least = np.partition(magnitudes, len(values) - count)[len(values) - count]
    above = np.flatnonzero(magnitudes > least)
    equal = np.flatnonzero(magnitudes == least)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _to_bf16(values: Float32) -> npt.NDArray[np.uint16]:
    """To the nearest bfloat16, ties to even, as torch rounds."""
    bits = values.view(np.uint32)
    rounded: npt.NDArray[np.uint16] = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
    return rounded


def _quantized_size(size: int, block: int, most: int) -> int:
    return -(-size // block) * SCALE.itemsize + (size if most == 127 else -(-size // 2))


def _quantized(values: Float32, block: int, most: int) -> Bytes:
    blocks = -(-len(values) // block)
    padded: Float32 = np.zeros(blocks * block, np.float32)
    padded[: len(values)] = values
    scales = np.abs(padded.reshape(blocks, block)).max(axis=1) / np.float32(most)
    divisors = np.where(scales > 0, scales, np.float32(1))[:, None]
    whole = np.rint(np.clip(padded.reshape(blocks, block) / divisors, -most, most)).astype(np.int8)
    numbers = whole.reshape(-1)[: len(values)]
    codes = numbers.view(np.uint8) if most == 127 else _packed(numbers)
    return np.concatenate([_bytes_of(scales.astype(SCALE)), codes])


def _dequantized(data: Bytes, size: int, block: int, most: int) -> Float32:
    blocks = -(-size // block)
    scales = data[: blocks * SCALE.itemsize].view(SCALE)
    codes = data[blocks * SCALE.itemsize :]
    numbers = codes.view(np.int8) if most == 127 else _unpacked(codes)[:size]
    values = numbers.astype(np.float32)
    for_each = np.repeat(scales.astype(np.float32), block)[:size]
    return _finite(values * for_each)


def _packed(numbers: npt.NDArray[np.int8]) -> Bytes:
    nibbles = np.zeros(-(-len(numbers) // 2) * 2, np.uint8)
    nibbles[: len(numbers)] = numbers.view(np.uint8) & 15
    return np.bitwise_or(nibbles[0::2], np.left_shift(nibbles[1::2], np.uint8(4)))


def _unpacked(codes: Bytes) -> npt.NDArray[np.int8]:
    nibbles = np.stack([codes & 15, codes >> 4], axis=1).reshape(-1).astype(np.int8)
    return np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.int8)


def _finite(values: Float32) -> Float32:
    if not np.isfinite(values).all():
        raise ValueError("an update must be finite")
    return values


def _bytes_of(array: npt.NDArray[np.generic]) -> Bytes:
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1)
