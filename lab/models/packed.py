"""Linear layers with weights of 8 or 4 bits, multiplied by torch's int4 kernels; and how transformers reads them.

32 weights in a row share a scale and a zero. `int4`: w = (q - 8) * scale + zero, with q in [0, 15]. `int8`: w = (q -
128) * scale + zero, with q in [0, 255]. torch's int8 kernel has one scale for a whole row, so that an outlier coarsens
all of them; therefore the two halves of q are weights of 4 bits each, and the inputs are multiplied by both in one
product of twice as many inputs.

Inputs and outputs of the kernel's product are bfloat16, its sums float32. On a CPU an output row depends on its input
row alone, however many rows share the product. For many rows of one sequence, as parts of prompts have, the weights are
widened there to floats piece by piece and multiplied by torch's ordinary product: half the time for 256 rows.

A folder holds the numbers in the order of the matrix. The order that the kernel of this processor, or of a CUDA device,
wants is made when they are loaded, whole or in a slice. What is written for CUDA has not been run on a GPU: a device is
used only if `kernel_fault` finds none.

Shapes: N outputs, K inputs, G groups of a row, R rows.
"""

import ctypes
import mmap
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin
from typing_extensions import override

from lab.device import lacks_sixteen_bits

METHOD = "distributed-llm-lab"
"""`quant_method` in the config of a quantised folder."""
HEAD_BITS = 8
GROUP = 32
"""Weights of a row that share a scale and a zero."""
KERNEL_ROWS = 64
"""Outputs that the CPU's int4 kernel takes at once: matrices are filled up to a multiple of it. CUDA's takes 8."""
CUDA_TILES = 2
"""Tiles of 16 inputs that CUDA's kernel keeps together: with 2 any multiple of `GROUP` inputs will do."""
MADV_PAGEOUT = 21
"""Of Linux's madvise: give the pages back; those of a file are read from it again."""
WIDE_ROWS = 96
"""Rows of one sequence from which on widening its weights pays."""
WIDENED_AT_ONCE = 512
"""Outputs that are widened together: few enough for a cache where inputs are few; a multiple of `KERNEL_ROWS`."""
PACKED_AT_ONCE = 1024
"""Outputs that are rounded, or brought into the kernel's order, together; a multiple of `KERNEL_ROWS`."""


def quantise(weight_NK: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The nearest numbers of `bits` bits, and their scales, as `stored_form` returns them."""
    made = [_quantised_rows(rows_NK, bits) for rows_NK in weight_NK.split(PACKED_AT_ONCE)]
    numbers, scales = zip(*made, strict=True)
    return torch.cat(numbers), torch.cat(scales, 1)


def _quantised_rows(weight_NK: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    grouped_NGK = weight_NK.float().unflatten(1, (-1, GROUP))
    low_NG, high_NG = grouped_NGK.amin(2), grouped_NGK.amax(2)
    largest, middle = 2**bits - 1, 2 ** (bits - 1)
    scale_NG = ((high_NG - low_NG) / largest).bfloat16()
    zero_NG = (low_NG + middle * scale_NG.float()).bfloat16()
    step_NG1 = scale_NG.float().clamp(min=torch.finfo(torch.float32).tiny)[:, :, None]
    q_NGK = ((grouped_NGK - zero_NG.float()[:, :, None]) / step_NG1 + middle).round_().clamp_(0, largest)
    return stored_form(q_NGK.flatten(1).to(torch.uint8), scale_NG, zero_NG, bits)


def stored_form(q_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Numbers of `bits` bits as weights of 4 bits: w = (q - 2 ** (bits - 1)) * scale + zero.

    Returns:
        int4: uint8 N x K/2, the even column in the low half of a byte; bfloat16 G x N x 2, scale and zero.
        int8: uint8 N x K and bfloat16 2G x N x 2: the high halves of all numbers, then the low ones.
    """
    if bits == 8:
        # q - 128 is 16 * (high - 8) + (low - 8) + 8. Powers of two times a bfloat16 are exact.
        q_NK = torch.cat((q_NK >> 4, q_NK & 15), 1)
        scale_NG, zero_NG = torch.cat((16 * scale_NG, scale_NG), 1), torch.cat((zero_NG, 8 * scale_NG), 1)
    scales_NG2 = torch.stack((scale_NG, zero_NG), 2).bfloat16()
    return halves(q_NK), scales_NG2.transpose(0, 1).contiguous()


def halves(q_NK: Tensor) -> Tensor:
    """Two numbers of 4 bits in a byte."""
    return q_NK[:, ::2] | q_NK[:, 1::2] << 4


class IntLinear(nn.Linear):
    """A linear layer with a weight of 4 or 8 bits, for inference: it has no gradient for its input."""

    def __init__(self, bits: int, outputs: int, inputs: int, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)  # a Linear by its interface (PEFT asks for it), without a Linear's weight
        self.bits, self.out_features, self.in_features = bits, outputs, inputs
        self.scales: Tensor
        self.register_buffer("scales", torch.empty(inputs * bits // (4 * GROUP), outputs, 2, dtype=torch.bfloat16))
        numbers = torch.empty(outputs, inputs * bits // 8, dtype=torch.uint8)
        self.weight = nn.Parameter(numbers, requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def of(cls, weight_NK: Tensor, bits: int, bias: nn.Parameter | None = None) -> "IntLinear":
        """The layer of a weight in float, ready to multiply."""
        layer = cls(bits, weight_NK.shape[0], weight_NK.shape[1], bias)
        numbers, layer.scales = quantise(weight_NK, bits)
        layer.weight = nn.Parameter(numbers, requires_grad=False)
        layer.pack()
        return layer

    @override
    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Linear gives it
        rows_RK = input.reshape(-1, self.in_features)
        # Widened products round by the number of rows, so they are for a single sequence: an engine computes a long
        # piece alone. Layers that flatten their batch first (OPT's, shared experts) do not show whose rows they get.
        is_alone = input.ndim == 3 and input.shape[0] == 1 and not _is_cuda(input)
        if is_alone and len(rows_RK) >= WIDE_ROWS and kernel_block():
            product_RN = multiply_widened(rows_RK, self.weight, self.scales)
        else:
            product_RN = multiply(rows_RK.to(torch.bfloat16), self.weight, self.scales)
        outcome_RN = product_RN[:, : self.out_features].to(input.dtype)
        if self.bias is not None:
            outcome_RN = outcome_RN + self.bias
        return outcome_RN.view(*input.shape[:-1], self.out_features)

    def in_float(self) -> nn.Linear:
        """A plain layer in float32 with the weights that these numbers stand for, rounded to bfloat16."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        # Each row of the identity meets one weight of each output: what comes out is that weight, in bfloat16.
        one_KK = torch.eye(self.in_features, dtype=torch.bfloat16, device=self.scales.device)
        weight_KN = multiply(one_KK, self.weight, self.scales)
        plain.weight = nn.Parameter(weight_KN.t()[: self.out_features].float().contiguous(), requires_grad=False)
        plain.bias = self.bias
        return plain

    def pack(self) -> None:
        """Bring the numbers into the order of this device's kernel, once they have been read."""
        # Always copies, never pages of the file: the kernel reads beyond the end of what it needs.
        packed_NX = _in_kernel_order(self.weight)
        filled = nn.functional.pad(self.scales.to(torch.bfloat16), (0, 0, 0, -self.out_features % KERNEL_ROWS)).clone()
        _forget_pages(self.weight)
        self.weight, self.scales = nn.Parameter(packed_NX, requires_grad=False), filled


def _forget_pages(tensor: Tensor) -> None:
    """Let the system forget the pages of a file that a tensor is mapped from, once it has been copied.

    They would count as this process's until the last tensor of that file is gone. Nothing is lost: they are read again
    if anybody asks for them. Where the system has no such call, nothing happens.
    """
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.nbytes - first
    if sys.platform == "linux" and size > 0 and not tensor.is_cuda:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), MADV_PAGEOUT)


def multiply(rows_RK: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    """The product of bfloat16 rows and a weight in its kernel's order: bfloat16 R x N, N filled up to `KERNEL_ROWS`."""
    if GROUP * len(scales) > rows_RK.shape[1]:  # 8 bits: both halves of a weight meet the same input
        rows_RK = torch.cat((rows_RK, rows_RK), 1)
    scales = scales.contiguous()  # those of a joined layer are not; copying them takes less than many rows do
    if _is_cuda(rows_RK):
        return cast(Tensor, torch.ops.aten._weight_int4pack_mm(rows_RK.contiguous(), numbers, GROUP, scales))
    return cast(Tensor, torch.ops.aten._weight_int4pack_mm_for_cpu(rows_RK, numbers, GROUP, scales))


def multiply_widened(rows_RK: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    """The same product, R x N in the dtype of the rows, by weights that are widened to floats."""
    dtype, inputs = _wide_dtype(), rows_RK.shape[1]
    wide_RK, product_RN = rows_RK.detach().to(dtype), rows_RK.new_empty(len(rows_RK), len(numbers))
    parts = [part.split(WIDENED_AT_ONCE, dim) for dim, part in ((0, numbers), (1, scales), (1, product_RN))]
    for own_numbers, own_scales, own_product in zip(*parts, strict=True):
        own_product.copy_(wide_RK @ widened(own_numbers, own_scales, inputs).to(dtype))
    return product_RN


def widened(numbers: Tensor, scales: Tensor, inputs: int) -> Tensor:
    """The weights, float32 K x N, of numbers in their kernel's order."""
    outputs, block = len(numbers), kernel_block()
    bytes_KBX = numbers.view(outputs // block, -1, block // 2).transpose(0, 1)
    q_GKN = torch.stack((bytes_KBX & 15, bytes_KBX >> 4), 2).view(-1, GROUP, outputs)
    scale_G1N, zero_G1N = scales.float().unsqueeze(1).unbind(-1)
    halves_HKN = torch.addcmul(zero_G1N - 8 * scale_G1N, q_GKN.float(), scale_G1N).view(-1, inputs, outputs)
    return halves_HKN[0] if len(halves_HKN) == 1 else halves_HKN[0].add_(halves_HKN[1])


@cache
def kernel_block() -> int:
    """Outputs of a block in the order of this processor's kernel: the low halves of a block's bytes are those of its
    first half of outputs, input by input. 0 where the order is another one, as tried with random numbers."""
    inputs, generator = 3 * GROUP, torch.Generator().manual_seed(0)
    q_NK = torch.randint(0, 16, (KERNEL_ROWS, inputs), generator=generator, dtype=torch.uint8)
    packed_NX = _in_kernel_order(halves(q_NK))
    for block in (64, 32, 16):
        bytes_BKX = packed_NX.view(-1, inputs, block // 2)
        found_BKN = torch.cat((bytes_BKX & 15, bytes_BKX >> 4), 2)
        if torch.equal(found_BKN.transpose(1, 2).flatten(0, 1), q_NK):
            return block
    return 0


@cache
def _wide_dtype() -> torch.dtype:
    """bfloat16 where the processor has instructions for it."""
    return torch.float32 if lacks_sixteen_bits(torch.device("cpu"), torch.bfloat16) else torch.bfloat16


def join(layers: Sequence[IntLinear]) -> tuple[Tensor, Tensor]:
    """The numbers and scales of layers with the same input as those of one layer, whose outputs follow each other, each
    layer's filled up to `KERNEL_ROWS`. The layers themselves become views of it, so that no memory is added."""
    if len(layers) == 1:
        return layers[0].weight, layers[0].scales
    numbers, scales = torch.cat([layer.weight for layer in layers]), torch.cat([layer.scales for layer in layers], 1)
    own_numbers = numbers.split([len(layer.weight) for layer in layers])  # on CUDA tiles of outputs
    own_scales = scales.split([layer.scales.shape[1] for layer in layers], 1)
    for layer, its_numbers, its_scales in zip(layers, own_numbers, own_scales, strict=True):
        layer.weight, layer.scales = nn.Parameter(its_numbers, requires_grad=False), its_scales
    return numbers, scales


def _in_kernel_order(halves_NX: Tensor) -> Tensor:
    """Numbers of 4 bits as the device's kernel wants them: on a CPU blocks of outputs, by the instructions of this
    processor. N is filled up to `KERNEL_ROWS`."""
    if _is_cuda(halves_NX):  # it wants the even column in the high half, and a tensor core's tiles behind each other
        turned_NX = nn.functional.pad(halves_NX << 4 | halves_NX >> 4, (0, 0, 0, -len(halves_NX) % KERNEL_ROWS))
        return cast(Tensor, torch.ops.aten._convert_weight_to_int4pack(turned_NX, CUDA_TILES))
    packed_NX = halves_NX.new_empty(-(-len(halves_NX) // KERNEL_ROWS) * KERNEL_ROWS, halves_NX.shape[1])
    for start in range(0, len(halves_NX), PACKED_AT_ONCE):  # in parts: in between each number takes 32 bits
        part_NX = halves_NX[start : start + PACKED_AT_ONCE]
        part_NX = nn.functional.pad(part_NX, (0, 0, 0, -len(part_NX) % KERNEL_ROWS))
        q_NK = torch.stack((part_NX & 15, part_NX >> 4), 2).flatten(1).int()
        packed_NX[start : start + PACKED_AT_ONCE] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q_NK, 1)
    return packed_NX


def _is_cuda(tensor: Tensor) -> bool:
    return tensor.is_cuda


@cache
def kernel_fault(device: torch.device) -> str | None:
    """What is wrong with the kernel of a device, as tried with random numbers: it fails, or its products are not those
    of the weights that were stored. None where all is well."""
    if device.type not in ("cpu", "cuda"):
        return "there is no kernel for it"
    generator = torch.Generator().manual_seed(0)
    weight_NK = torch.randn(KERNEL_ROWS + 8, 5 * GROUP, generator=generator)
    rows_RK = torch.randn(70, 5 * GROUP, generator=generator).bfloat16()
    for bits in (8, 4):
        stored_NK = stored_weight(*quantise(weight_NK, bits), 5 * GROUP)
        try:
            layer = IntLinear.of(weight_NK.to(device), bits)
            found_NK = layer.in_float().weight.cpu()
            products = {rows: layer(rows_RK[:rows].to(device)).float().cpu() for rows in (1, 7, 70)}
        except Exception as error:  # of a build of torch, or a device, without the kernel
            return " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if not float((found_NK - stored_NK).abs().max() / stored_NK.abs().max()) <= 2**-7:
            return f"its weights of {bits} bits are not those that were stored"
        for rows, product_RN in products.items():
            exact_RN = rows_RK[:rows].float() @ stored_NK.t()
            if not float((product_RN - exact_RN).norm() / exact_RN.norm()) <= 2**-6:
                return f"its products of {rows} rows and weights of {bits} bits are wrong"
    return None


def stored_weight(numbers: Tensor, scales: Tensor, inputs: int) -> Tensor:
    """The weights, float32 N x K, of numbers in the order of a folder (`stored_form`)."""
    q_NGK = torch.stack((numbers & 15, numbers >> 4), 2).flatten(1).float().unflatten(1, (-1, GROUP))
    scale_NG1, zero_NG1 = scales.float().transpose(0, 1)[..., None].unbind(2)
    halves_NHK: Tensor = ((q_NGK - 8) * scale_NG1 + zero_NG1).flatten(1).unflatten(1, (-1, inputs))
    return halves_NHK.sum(1)


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of a folder with packed layers."""

    def __init__(self, bits: int, **ignored: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # a name that transformers itself does not know
        self.bits = bits


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Puts packed layers in the place of linear ones before their tensors are read, and orders the numbers after."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **ignored: Any) -> PreTrainedModel:
        put_packed_layers(model, cast(PackedConfig, self.quantization_config).bits)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **ignored: Any) -> PreTrainedModel:
        for module in model.modules():
            if isinstance(module, IntLinear):
                module.pack()
        return model

    def is_serializable(self) -> bool:
        """Not by transformers: once loaded the numbers are in the order of one kind of processor."""
        return False

    @property
    def is_trainable(self) -> bool:
        """No gradient goes through packed weights."""
        return False


def put_packed_layers(model: PreTrainedModel, bits: int) -> None:
    """Put packed layers without numbers in the place of a model's linear ones.

    The head of an int4 model has 8 bits: in 4 bits it would cost more perplexity than all other layers.

    Raises:
        ValueError: a layer whose inputs are no multiple of the group.
    """
    head = model.get_output_embeddings()
    for name, layer in linear_layers(model).items():
        outputs, inputs = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.shape[::-1]
        if inputs % GROUP:
            raise ValueError(f"{name} has {inputs} inputs, which is no multiple of {GROUP}")
        model.set_submodule(name, IntLinear(HEAD_BITS if layer is head else bits, outputs, inputs, layer.bias))


def linear_layers(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """The layers that are packed, by name; GPT-2 and its kin have `Conv1D`, with the weight the other way round."""
    return {name: part for name, part in model.named_modules() if type(part) in (nn.Linear, Conv1D)}
