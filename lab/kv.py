"""The one KV cache of the lab: fixed slots, each with a length of its own, advanced together in one batched forward.

A pass is three calls: ``begin`` takes slots and counts and gives the position ids and masks for the model, the model
calls ``update`` in every attention layer, ``commit`` moves the lengths. Rewinding is an assignment to ``lengths``:
what lies beyond a length is masked out and overwritten later. Keys are kept for all positions, sliding windows are
folded into the masks, so that a rewind never meets a window that has already moved on.

Knows nothing about sessions, tokens or sampling. Indices of layers are local: a slice of a model brings its own config,
with its own ``num_hidden_layers`` and ``layer_types``, and gets a cache over its own layers.

Shapes: S slots, B batch rows (one slot each), T positions in this pass, L cache columns, H key/value heads, D head size,
N positions written in this pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, get_layer_types_and_kwargs

Mask = Tensor | dict[str, Tensor]


class CacheFull(RuntimeError):
    """No slot is free, or the next positions do not fit into the limit in bytes. Nothing was changed."""


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What one attention layer keeps."""

    heads: int
    """Key/value heads."""
    head_size: int
    """Numbers in one key, and in one value, of one head."""
    window: int | None
    """How many positions, its own included, a token sees; None: all before it."""


@dataclass(frozen=True)
class Pass:
    """What the model needs to run the slots of one `begin`."""

    position_ids_BT: Tensor
    attention_mask: Mask
    """Boolean B x 1 x T x L (True: visible), or additive for eager attention; a dict by layer type for hybrid models."""
