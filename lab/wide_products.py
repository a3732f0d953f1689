"""Matrix products of 16-bit weights by way of float32, for a CPU that has no instructions for 16-bit floats.

torch computes such a product there number by number: many rows cost as much each as one, so that a prompt takes eight
times as long as in float32 (AVX2), and a guess that is checked as long as a pass. So weights stay in 16 bits, and where
rows share the work, a block of a matrix at a time is made float32, multiplied by all of them, and the outcome rounded:
what a product of 16-bit numbers is anyway, sums in another order.

Only in inference mode: a backward pass would keep the wide blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

BLOCK_NUMBERS = 2**20
"""Of a block: 4 MiB in float32, which a cache holds."""


class WideLinear(nn.Linear):
    """A linear layer that multiplies several rows in float32."""

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Linear gives it
        """See `nn.Linear`."""
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


def widen_products(model: nn.Module) -> None:
    """Give every plain linear layer of a model such products; its weights stay what they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = WideLinear
