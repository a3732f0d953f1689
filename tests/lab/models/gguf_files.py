"""GGUF files of random models, written here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from lab.models import conversion

HIDDEN, ROWS, EXPERTS = 32, 259, 4
EXPERT_WIDTH = 768
"""What transformers takes for qwen3moe, whatever the file says."""


def write_gguf(
    file: Path,
    without: str = "",
    inner: int = 48,
    kinds: Mapping[str, str] | None = None,
    layers: int = 1,
    architecture: str = "llama",
    kv_heads: int = 4,
) -> tuple[Path, dict[str, torch.Tensor]]:
    """A model over the byte tokens and one merge.

    Args:
        file: Its name ends in .gguf.
        without: A tensor that is left out.
        inner: Width of the feed-forward layers.
        kinds: How to store `attn` and `ffn` matrices.
        layers: Number of layers.
        architecture: llama, gemma2 (more norms, tied) or qwen3moe (stacked experts, norms of heads).
        kv_heads: Heads of keys and values, of 4 of queries.
    """
    import gguf

    generator = torch.Generator().manual_seed(0)
    shapes = {"token_embd.weight": (ROWS, HIDDEN), "output_norm.weight": (HIDDEN,)}
    if architecture != "gemma2":
        shapes["output.weight"] = (ROWS, HIDDEN)
    head = 256 if architecture == "gemma2" else HIDDEN // 4
    for layer in range(layers):
        of_layer = _shapes_of_layer(architecture, inner, 4 * head, kv_heads * head, head)
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(ROWS)
    if architecture == "qwen3moe":
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(2)
    byte_ids = conversion.byte_tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(byte_ids, key=lambda token: byte_ids[token]), "ab"])
    writer.add_token_types([1] * 256 + [3] * 2 + [1])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(256)
    for name, tensor in tensors.items():
        kind = (kinds or {}).get(re.sub(r"^blk\.\d+\.", "", name).partition("_")[0]) if tensor.dim() > 1 else None
        if kind is not None:
            stored = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(tensor.numpy(), stored), raw_dtype=stored)
        elif name != without:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, tensors


def _shapes_of_layer(architecture: str, inner: int, queries: int, keys: int, head: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "attn_q": (queries, HIDDEN),
        "attn_k": (keys, HIDDEN),
        "attn_v": (keys, HIDDEN),
        "attn_output": (HIDDEN, queries),
        "attn_norm": (HIDDEN,),
        "ffn_norm": (HIDDEN,),
    }
    if architecture == "qwen3moe":
        stacked = {"gate": (EXPERT_WIDTH, HIDDEN), "up": (EXPERT_WIDTH, HIDDEN), "down": (HIDDEN, EXPERT_WIDTH)}
        shapes |= {f"ffn_{name}_exps": (EXPERTS, *shape) for name, shape in stacked.items()}
        return shapes | {"ffn_gate_inp": (EXPERTS, HIDDEN), "attn_q_norm": (head,), "attn_k_norm": (head,)}
    shapes |= {"ffn_gate": (inner, HIDDEN), "ffn_up": (inner, HIDDEN), "ffn_down": (HIDDEN, inner)}
    if architecture == "gemma2":
        shapes |= {"post_attention_norm": (HIDDEN,), "post_ffw_norm": (HIDDEN,)}
    return shapes
