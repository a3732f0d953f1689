"""Folders that come quantised: which kinds are read, how, and which are refused by name.

`fp8` (float8 with block scales) is dequantised by transformers' own reader. `bitsandbytes` in 4 bits stays as it is.
All others are refused: either their packages are not part of the lab, or a request's result would depend on the
requests beside it (bitsandbytes in 8 bits picks its outlier columns over all rows of a pass).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from transformers import BitsAndBytesConfig, FineGrainedFP8Config, PreTrainedConfig

from lab.settings import Quantization

READ = "unquantised, fp8 with block scales, or bitsandbytes in 4 bits"
Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Stored tensors by name: dtype as safetensors names it, and shape."""


class Stored(Enum):
    """How a folder keeps its matrices."""

    plain = "plain"
    fp8 = "fp8"
    nf4 = "nf4"
    fp4 = "fp4"


class Unreadable(ValueError):
    """A way of storing weights that the lab does not read; the text is what was found."""


def stored_kind(config: PreTrainedConfig, tensors: Shapes) -> Stored:
    """How the tensors of a folder with this config are stored. Raises `Unreadable` for what is not read."""
    described = description(config)
    if described is None:
        _check_plain(tensors)
        return Stored.plain
    method = described.get("quant_method")
    if described.get("load_in_8bit"):
        raise Unreadable("bitsandbytes in 8 bits, where a request's result depends on the requests beside it")
    if described.get("load_in_4bit"):
        return _four_bits(described)
    if method == "fp8":
        _check_fp8(described, tensors)
        return Stored.fp8
    raise Unreadable(f"quant_method={method!r}")


def description(config: PreTrainedConfig) -> dict[str, Any] | None:
    """`quantization_config` of a config or of its text part, as transformers looks for it; None for none."""
    for part in (config, config.get_text_config(decoder=True)):
        found = getattr(part, "quantization_config", None)
        if isinstance(found, dict):
            return found
        if found is not None:
            raise Unreadable(f"quantization_config={found!r}")
        if getattr(part, "compression_config", None) is not None:
            raise Unreadable("a compression_config")
    return None


def load_options(
    stored: Stored, wanted: BitsAndBytesConfig | None, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """What `from_pretrained` has to be told besides config and dtype.

    Args:
        stored: How the folder keeps its matrices.
        wanted: How to quantise them while they are loaded; only plain ones can be.
        device: Where the model will be.
        dtype: What it computes in.
    """
    if dtype is torch.float64 and stored is Stored.plain:
        return {"experts_implementation": "eager"}  # torch's grouped product has no float64
    if stored is Stored.fp8:  # never its kernels: they would be fetched from the hub
        return {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    if stored is not Stored.plain:
        return {"device_map": {"": device}}
    return {"quantization_config": wanted, "device_map": {"": device}} if wanted else {}


def can_become(stored: Stored, wanted: Quantization) -> bool:
    """Whether a folder stored so can be used under `model.quantization`."""
    return wanted is Quantization.none or stored in (Stored.plain, Stored.nf4)


def _four_bits(described: Mapping[str, Any]) -> Stored:
    kind, storage = described.get("bnb_4bit_quant_type", "fp4"), described.get("bnb_4bit_quant_storage", "uint8")
    if kind not in ("nf4", "fp4") or storage != "uint8":
        raise Unreadable(f"bitsandbytes with bnb_4bit_quant_type={kind!r}, bnb_4bit_quant_storage={storage!r}")
    return Stored[kind]


def _check_plain(tensors: Shapes) -> None:
    for name, (dtype, _) in tensors.items():
        if name.endswith("weight") and (dtype.startswith("F8") or dtype in ("I8", "U8")):
            raise Unreadable(f"{name!r} in {dtype} without a quantization_config")


def _check_fp8(described: Mapping[str, Any], tensors: Shapes) -> None:
    """Every float8 matrix has its scales, one for each block; transformers takes other grids for other blocks."""
    block = described.get("weight_block_size")
    for name, (dtype, shape) in tensors.items():
        if not name.endswith("weight") or not (dtype.startswith("F8") or dtype in ("I8", "U8")):
            continue
        if dtype != "F8_E4M3":
            raise Unreadable(f"fp8 with {name!r} in {dtype}")
        scale_dtype, scale_shape = tensors.get(f"{name}_scale_inv", ("", ()))
        if scale_dtype not in ("F32", "BF16", "F16"):
            raise Unreadable(f"fp8 with no float scales {name + '_scale_inv'!r}")
        if len(shape) != 2 or not _is_grid(shape, scale_shape, block):
            raise Unreadable(
                f"fp8 with scales of shape {scale_shape} for {name!r} of shape {shape} in blocks of {block}"
            )


def _is_grid(shape: tuple[int, ...], scales: tuple[int, ...], block: Any) -> bool:
    if block is None:
        return all(size == 1 for size in scales)
    if not (isinstance(block, list | tuple) and len(block) == 2 and len(scales) == 2):
        return False
    return all(
        isinstance(width, int) and width > 0 and ((count == 1 and size <= width) or count * width == size)
        for size, count, width in zip(shape, scales, block)
    )
