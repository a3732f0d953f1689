"""Attention of a few rows, each as if it were alone: a draft token is checked with the bits of a decoding step.

torch's CPU kernel computes the rows of a pass together, and adds in another order than for a single row. Where matrix
products do not depend on the number of rows (`lab.engine.wide_products`), this alone would change the rounding of a
pass over several rows and flip near ties. So the rows of one text are computed like separate texts that share their
keys and values; none of those is copied.

Only in inference mode and for few rows: a prompt is computed in the same pieces with and without drafts.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import PreTrainedModel

from lab.engine.base import MOST_ROWS

NAME = "sdpa_by_row"
"""Value of `attn_implementation`."""


def attend(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BGLD: Tensor,
    value_BGLD: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention by row, with the arguments and result (B x T x H x D) of transformers' `sdpa_attention_forward`."""
    rows = query_BHTD.shape[2]
    if attention_mask is None or not 1 < rows <= MOST_ROWS or not torch.is_inference_mode_enabled():
        return sdpa_attention_forward(module, query_BHTD, key_BGLD, value_BGLD, attention_mask, **options)
    parts = []
    for query_HTD, key_GLD, value_GLD, mask_1TL in zip(query_BHTD, key_BGLD, value_BGLD, attention_mask, strict=True):
        query_TH1D = query_HTD.transpose(0, 1)[:, :, None]
        key_TGLD, value_TGLD = (tensor.expand(rows, *tensor.shape) for tensor in (key_GLD, value_GLD))
        mask_T11L = mask_1TL.transpose(0, 1)[:, :, None]
        part_T1HD, _ = sdpa_attention_forward(module, query_TH1D, key_TGLD, value_TGLD, mask_T11L, **options)
        parts.append(part_T1HD.transpose(0, 1))
    return torch.cat(parts), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def attend_by_row(model: PreTrainedModel) -> None:
    """Switch a model that uses torch's attention to attention by row."""
    if model.config._attn_implementation == "sdpa":
        model.config._attn_implementation = NAME
