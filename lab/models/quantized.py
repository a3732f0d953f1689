"""Folders with quantised weights: which formats are read, how, and which are refused by name.

`fp8` (float8 with block scales) is dequantised by transformers' own reader. `bitsandbytes` in 4 bits stays as it is.
All others are refused: either their packages are not part of the lab, or a request's result would depend on the other
requests of a pass (bitsandbytes in 8 bits chooses its outlier columns over all rows of a pass).
"""

import logging
import re
from collections.abc import Collection, Mapping
from enum import Enum
from typing import Any

import torch
from transformers import BitsAndBytesConfig, FineGrainedFP8Config, PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from lab.models.packed import METHOD, IntLinear
from lab.settings import Quantization, UserError

log = logging.getLogger(__name__)

READ = "unquantised, fp8 with block scales, or bitsandbytes in 4 bits"
Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Stored tensors by name: dtype as safetensors names it, and shape."""


_QUANT_STATE = re.compile(
    r"(.+\.weight)\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__(\w+))"
)
"""Names of the tensors that bitsandbytes stores with a packed weight: the weight's name, and the 4-bit kind if
given."""


class WeightFormat(Enum):
    """The format in which a folder stores its matrices."""

    plain = "plain"
    fp8 = "fp8"
    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"
    int4 = "int4"


PACKED = (WeightFormat.int8, WeightFormat.int4)
"""Formats whose linear layers are packed for inference (`lab.models.packed`)."""


class Unreadable(ValueError):
    """A format that the lab does not read; the message names it."""


def find_weight_format(config: PreTrainedConfig, tensors: Shapes, index: Collection[str]) -> WeightFormat:
    """The format in which a folder stores its matrices.

    Args:
        config: The folder's config.
        tensors: The tensors of the files that are here, possibly not all.
        index: The names of all tensors, wherever their files are.

    Raises:
        Unreadable: the format is not read, or lacks a tensor that the index does not have either.
    """
    described = description(config)
    if described is None:
        for name, dtype in _narrow(tensors).items():
            raise Unreadable(f"{name!r} in {dtype} without a quantization_config")
        return WeightFormat.plain
    method = described.get("quant_method")
    if described.get("load_in_8bit"):
        raise Unreadable("bitsandbytes in 8 bits, where a request's result depends on the other requests of its pass")
    if described.get("load_in_4bit"):
        return _four_bits(described, tensors, index)
    if method == METHOD and f"int{described.get('bits')}" in WeightFormat.__members__:
        return WeightFormat[f"int{described['bits']}"]
    if method == "fp8":
        _check_fp8(described, tensors, index)
        return WeightFormat.fp8
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
    stored: WeightFormat, wanted: BitsAndBytesConfig | None, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments for `from_pretrained` besides config and dtype.

    Args:
        stored: Format of the folder's matrices.
        wanted: Quantisation while they are loaded, of plain matrices only.
        device: Where the model will be.
        dtype: Dtype of the computation.
    """
    if dtype is torch.float64 and stored is WeightFormat.plain:
        return {"experts_implementation": "eager"}  # torch's grouped product has no float64
    if stored is WeightFormat.fp8:  # never its kernels: they would be fetched from the hub
        return {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    if stored in PACKED:  # its config says all of it but the device, whose kernel wants an order of its own
        return {} if device.type == "cpu" else {"device_map": {"": device}}
    if stored is not WeightFormat.plain:
        return {"device_map": {"": device}}
    return {"quantization_config": wanted, "device_map": {"": device}} if wanted else {}


def can_become(stored: WeightFormat, wanted: Quantization) -> bool:
    """Whether a folder in this format can be used under `model.quantization`."""
    if stored in PACKED:  # what is refused or tried for int8 and int4 goes by the setting
        return stored.name == wanted.name
    if wanted.bits is not None:
        return stored in (WeightFormat.plain, WeightFormat.fp8)
    return wanted is Quantization.none or stored in (WeightFormat.plain, WeightFormat.nf4)


def _four_bits(described: Mapping[str, Any], tensors: Shapes, index: Collection[str]) -> WeightFormat:
    kind, storage = described.get("bnb_4bit_quant_type", "fp4"), described.get("bnb_4bit_quant_storage", "uint8")
    if kind not in ("nf4", "fp4") or storage != "uint8":
        raise Unreadable(f"bitsandbytes with bnb_4bit_quant_type={kind!r}, bnb_4bit_quant_storage={storage!r}")
    narrow = _narrow(tensors)
    packed = {name for name, dtype in narrow.items() if name.endswith("weight") and dtype == "U8"}
    if tensors and not packed and len(tensors) == len(index):
        raise Unreadable("bitsandbytes in 4 bits with no weight packed so")
    if bare := sorted(name for name in packed if f"{name}.absmax" not in index):
        raise Unreadable(f"bitsandbytes in 4 bits without {bare[0] + '.absmax'!r}")
    for name in sorted(narrow.keys() - packed):
        part = _QUANT_STATE.fullmatch(name)
        if part is None or part[1] not in index or part[2] not in (None, kind) or narrow[name] != "U8":
            raise Unreadable(f"bitsandbytes in 4 bits with {name!r} in {narrow[name]}")
    return WeightFormat[kind]


def unpacked(model: torch.nn.Module) -> str | None:
    """A module of a model loaded in 4 bits whose weight is not packed, by its path; None when all are."""
    from bitsandbytes.nn import Linear4bit

    found = (
        path for path, part in model.named_modules() if isinstance(part, Linear4bit) and part.weight.quant_state is None
    )
    return next(found, None)


def stored_bytes(model: torch.nn.Module) -> int:
    """Size of all tensors of a model; a tied one counts once, one in 4 bits with its scales."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    packed = [state for tensor in tensors.values() if (state := getattr(tensor, "quant_state", None)) is not None]
    return sum(tensor.nbytes for tensor in (*tensors.values(), *(state.absmax for state in packed)))


def check_packed(model: PreTrainedModel, quantization: Quantization) -> None:
    """Warn if most of a model's weights, besides embedding and head, are left unpacked.

    Args:
        model: A model, or a slice of one.
        quantization: The quantisation with which it was loaded.

    Raises:
        UserError: Nothing was packed.
    """
    from bitsandbytes.nn import Linear4bit

    linear = [part for part in model.modules() if isinstance(part, Linear4bit | IntLinear)]
    packed = sum(part.in_features * part.out_features for part in linear)
    if not packed:
        raise UserError(
            f"model.quantization must be none for a model of which {quantization.name} packs nothing, "
            f"got {quantization.name} for a {model.config.model_type}"
        )
    head = model.get_output_embeddings()
    ends = [part for part in model.modules() if isinstance(part, torch.nn.Embedding) or part is head]
    left_out = {id(weight) for part in (*linear, *ends) for weight in part.parameters()}
    others = sum(weight.numel() for weight in model.parameters() if id(weight) not in left_out)
    if others > packed:
        log.warning(
            "%s leaves %.0f %% of the weights unpacked (embedding and head not counted): they are in no linear module",
            quantization.name,
            100 * others / (packed + others),
        )


def _check_fp8(described: Mapping[str, Any], tensors: Shapes, index: Collection[str]) -> None:
    """Every float8 matrix has its scales, one for each block; transformers takes other grids for other blocks.

    transformers looks for scales only of tensors whose name ends in `weight`: fused experts would stay unscaled.
    """
    block = described.get("weight_block_size")
    for name, dtype in _narrow(tensors).items():
        if dtype != "F8_E4M3" or name.rpartition(".")[2] != "weight":
            raise Unreadable(f"fp8 with {name!r} in {dtype}")
        shape, scale = tensors[name][1], f"{name}_scale_inv"
        if scale in index and scale not in tensors:  # in a file that was not fetched
            continue
        scale_dtype, scale_shape = tensors.get(scale, ("", ()))
        if scale_dtype not in ("F32", "BF16", "F16"):
            raise Unreadable(f"fp8 with no float scales {scale!r}")
        if len(shape) != 2 or not _is_grid(shape, scale_shape, block):
            raise Unreadable(
                f"fp8 with scales of shape {scale_shape} for {name!r} of shape {shape} in blocks of {block}"
            )


def _narrow(tensors: Shapes) -> dict[str, str]:
    """The dtype of each tensor in 8 bits or fewer, by its name; without causal masks, which no model reads."""
    return {
        name: dtype
        for name, (dtype, shape) in tensors.items()
        if (dtype.startswith(("F4", "F6_", "F8")) or dtype in ("I8", "U8")) and not _is_mask(name, dtype, shape)
    }


def _is_mask(name: str, dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a causal mask, which older checkpoints of GPT-2, GPT-Neo and GPT-NeoX hold."""
    square = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return dtype == "U8" and square and name.endswith((".attn.bias", ".attention.bias"))


def _is_grid(shape: tuple[int, ...], scales: tuple[int, ...], block: Any) -> bool:
    if block is None:
        return all(size == 1 for size in scales)
    if not (isinstance(block, list | tuple) and len(block) == 2 and len(scales) == 2):
        return False
    return all(
        isinstance(width, int) and width > 0 and ((count == 1 and size <= width) or count * width == size)
        for size, count, width in zip(shape, scales, block)
    )
