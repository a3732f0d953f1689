"""A model with a fault in one layer that shows for one id only: where that stands, the layer gives NaN or infinity."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

MARK = 1e15
"""No hidden state of a test's model is that large, but for the marked id's."""


def mark(model: Any, token: int) -> None:
    """Let the hidden states of `token` be told from others in every layer."""
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = MARK


def poison(layer: torch.nn.Module, value: float = math.nan) -> None:
    """Let a decoder layer give `value` where the marked id stands."""

    def spoil(module: Any, given: Any, output: Any) -> Any:
        hidden_BTH: Tensor = output[0] if isinstance(output, tuple) else output
        hidden_BTH[hidden_BTH.abs().amax(-1) > MARK / 10, 3] = value
        return output

    layer.register_forward_hook(spoil)
