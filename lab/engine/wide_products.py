"""Matrix products of 16-bit weights by way of float32, for a CPU that has no instructions for 16-bit floats.

On such a CPU torch computes a product number by number: each further row costs as much as the first, so a prompt takes
eight times as long as in float32 (AVX2), and checking one draft token as long as a decoding step. So weights stay in 16
bits, are converted to float32 piece by piece, multiplied by all rows, and the result is rounded: the same as a product
of 16-bit numbers, except for the order of sums.

If torch has FBGEMM (x86), `PackedLinear` uses its product of float32 rows and float16 weights, which widens them in
registers. SmolLM2's matrices take 28 ms over one to three rows there and 46 over nine; as blocks 46 to 69 and 90; in
torch's own way 30 over one and 27 for each further. Every row is summed in the same order, whatever the number of rows,
so checking a draft token gives, bit by bit, the result of a decoding step. Its weights have another layout: a second
copy next to the pages of the checkpoint, which are mapped, and which the system can drop.

Without FBGEMM, `WideLinear` converts one block of a matrix at a time, for all rows.

Only in inference mode: a backward pass would keep the wide numbers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

BLOCK_NUMBERS = 2**20
"""Numbers in one block of a matrix: 4 MiB in float32, which a cache holds."""

KERNEL_ROWS = 3
"""FBGEMM cuts rows into groups of up to six. Of a multiple of three none has one or two rows, which are summed in
another order; and one row takes hardly less time than three."""

FLOAT16_EXPONENT = 16
"""All numbers of float16 are below two to this power."""


class WideLinear(nn.Linear):
    """A linear layer that multiplies several rows in float32."""

    @override
    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Linear gives it
        if input.numel() <= self.in_features or not torch.is_inference_mode_enabled():
            return super().forward(input)
        rows = max(1, BLOCK_NUMBERS // self.in_features)
        wide = input.float()
        biases = [None] * len(self.weight) if self.bias is None else self.bias.float().split(rows)
        parts = [
            functional.linear(wide, block.float(), bias).to(input.dtype)
            for block, bias in zip(self.weight.split(rows), biases, strict=False)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


@dataclass(frozen=True)
class _Packed:
    """A weight in FBGEMM's layout, and the version of the weight that was packed."""

    weight: Tensor
    version: int | None
    scale: float
    """Factor for the rows that undoes the scaling of the weight."""
    product: Any


class PackedLinear(nn.Linear):
    """A linear layer that multiplies by FBGEMM; a row has the same bits alone and among others."""

    _packed: _Packed | None = None

    @override
    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_inference_mode_enabled():
            return super().forward(input)
        packed, rows = self.pack(), input.numel() // self.in_features
        wide = input.new_zeros(rows + -rows % KERNEL_ROWS, self.in_features, dtype=torch.float32)
        wide[:rows] = input.reshape(rows, self.in_features)
        outcome: Tensor = torch.ops.quantized.linear_dynamic_fp16(wide.mul_(packed.scale), packed.product)
        if self.bias is not None:
            outcome += self.bias
        return outcome[:rows].to(input.dtype).view(*input.shape[:-1], self.out_features)

    def pack(self) -> _Packed:
        """The current weights, packed again only if they have changed.

        They are scaled by a power of two to float16's range, which keeps all bits of bfloat16 weights except those
        below 2**-40 of the largest, which float32 sums would lose as well.
        """
        weight, packed = self.weight, self._packed
        version = None if weight.is_inference() else weight._version  # one made for inference has none, and stays
        if packed is None or packed.weight is not weight or packed.version != version:
            wide = weight.detach().float()
            up = FLOAT16_EXPONENT - int(torch.frexp(wide.abs().max()).exponent)
            product = torch.ops.quantized.linear_prepack_fp16(wide * 2.0**up, None)
            self._packed = packed = _Packed(weight, version, 2.0**-up, product)
        return packed


def widen_products(model: nn.Module) -> None:
    """Let every plain linear layer of a model multiply in float32; its weights stay as they are."""
    kind = PackedLinear if torch.backends.quantized.engine in ("fbgemm", "x86") else WideLinear
    for module in model.modules():
        if type(module) is nn.Linear:
            # Not replaced by a new module: weights, hooks and what holds a reference to this one stay as they are.
            module.__class__ = kind


def pack_products(model: nn.Module) -> None:
    """Pack all layers now, so that the first pass need not wait for it (2 s for 135M weights)."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.pack()
