"""Layers compiled to machine code: one call a layer for any number of rows, each row computed as if it were alone.

A row is one token of one sequence: its slot in the cache and its position say all that it sees. So a draft token that
is checked among others gets, bit by bit, what a pass of its own gives it, and what shares a pass does not matter.
Attention is written as products and sums that the compiler fuses; the matrix products stay torch's own kernels, which
know rows of their own (`lab.models.packed`).

A layer of an architecture is exported once with sizes left open (rows, slots, columns) and compiled ahead of time by
torch's inductor. The package lies in the model cache; a second start maps it. On CUDA all layers of a pass are one
graph (`lab.engine.graphs`); no GPU has run this yet. On every device, code is compared at each start with the layer
that it was made of.

Shapes: N rows, C hidden size, H query heads, G key/value heads, D head size, S slots, L columns.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import logging
import math
import os
import platform
import re
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast
from zipfile import ZipFile

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3Model

from lab.engine.base import MOST_ROWS
from lab.engine.graphs import Graphs, cuda_recorder
from lab.engine.kv import SlotCache
from lab.engine.wide_products import PackedLinear, WideLinear
from lab.files import path_of
from lab.models.packed import KERNEL_ROWS, IntLinear, join, multiply
from lab.settings import DeviceSettings, ModelSettings, UserError

log = logging.getLogger(__name__)

LAYERS = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)
"""Layers that are compiled: these exact classes of transformers."""
DECODERS = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)
"""Decoders whose layers are compiled: an embedding, the layers and a norm, nothing else."""
PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""A layer's matrices; those of one group have the same input, and are one product where they are packed: it needs fewer
starts, for which two threads wait for each other each time."""
COMPILERS = ("g++", "clang++", "c++")
INDUCTOR: dict[str, Any] = {
    "compile_threads": 1,
    # Queries are stored once they are rotated; otherwise inductor rotates them anew for every column of the cache.
    "realize_opcount_threshold": 8,
    "realize_reads_threshold": 3,
    # Headers that are compiled before pay off from the third layer on, and most models have one kind.
    "aot_inductor.precompile_headers": False,
}
WORK_FOLDERS = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
"""Variables of the environment that say where inductor works."""
PROBED_ROWS = (*range(2, 16), 17, 20, 24, 25, 28, 30, 31, 40, 64, 96, 150, 192)
"""Rows of the products that are compared with single rows."""
WIDTHS = (192, 31, 14)
"""Most rows of a product: the first of these that rounds each row as if it were alone. With the row that `_linear`
adds, products of 2 to 15 rows round alike in float32 (MKL), and those of 2 to 32 rows in bfloat16 with AMX (oneDNN)."""
HEAD_ROWS = 31
"""Most rows of logits at once: those of 192 would take more memory than the layers."""
PROBED_COLUMNS = 256
VECTOR = 16
"""Columns that are summed at once, on any processor at most."""
LARGEST_ERROR = 0.1
"""Largest difference of what compiled code adds to hidden states from what its layer adds, as a share of its norm, on
top of the rounding of their sum: in bfloat16 the two round at different places. A wrong term costs all of it."""


class NotCompiled(ValueError):
    """The reason why a model runs without compiled layers, for people."""


@dataclass(frozen=True)
class LayerPlan:
    """All that decides the code of a layer; layers with equal plans share one package."""

    heads: int
    kv_heads: int
    head_size: int
    hidden_size: int
    scaling: float
    epsilon: float
    window: int | None
    """Positions that a row sees, its own included; None: all before it."""
    has_head_norms: bool
    """Whether queries and keys are normed by head (Qwen3)."""
    outputs: tuple[tuple[int, ...], ...]
    """Number of outputs of each of `PROJECTIONS`."""
    kinds: tuple[tuple[str, ...], ...]
    """Of each of `PROJECTIONS`: dtype of its weight, or int8 or int4, with `+` if it has a bias."""
    dtype: str
    """Dtype of activations and cache."""


class CompiledLayer(nn.Module):
    """The code of one layer, with everything that differs between layers as its inputs."""

    def __init__(self, plan: LayerPlan) -> None:
        super().__init__()
        self.plan = plan

    def forward(
        self,
        hidden_NC: Tensor,
        cos_ND: Tensor,
        sin_ND: Tensor,
        slot_N: Tensor,
        position_N: Tensor,
        column_L: Tensor,
        keys_SGLD: Tensor,
        values_SGLD: Tensor,
        tensors: list[Tensor],
    ) -> Tensor:
        """The hidden states behind the layer, N x C; keys and values are written into the cache."""
        plan, left = self.plan, iter(tensors)
        attention_norm, feed_forward_norm = next(left), next(left)
        head_norms = (next(left), next(left)) if plan.has_head_norms else None
        groups = [_Projections(kinds, outputs, left) for kinds, outputs in zip(plan.kinds, plan.outputs, strict=True)]
        into_attention, out, into_feed_forward, down = groups
        query, key, value = into_attention(_norm(hidden_NC, attention_norm, plan.epsilon))
        query_NHD = query.unflatten(1, (plan.heads, plan.head_size))
        key_NGD = key.unflatten(1, (plan.kv_heads, plan.head_size))
        value_NGD = value.unflatten(1, (plan.kv_heads, plan.head_size))
        if head_norms is not None:
            query_NHD = _norm(query_NHD, head_norms[0], plan.epsilon)
            key_NGD = _norm(key_NGD, head_norms[1], plan.epsilon)
        query_NHD, key_NGD = _rotated(query_NHD, cos_ND, sin_ND), _rotated(key_NGD, cos_ND, sin_ND)
        where = (slot_N[:, None], torch.arange(plan.kv_heads, device=slot_N.device)[None], position_N[:, None])
        keys_SGLD.index_put_(where, key_NGD)
        values_SGLD.index_put_(where, value_NGD)
        seen_NHD = self._attend(query_NHD, slot_N, position_N, column_L, keys_SGLD, values_SGLD)
        hidden_NC = hidden_NC + out(seen_NHD.flatten(1))[0]
        gate, up = into_feed_forward(_norm(hidden_NC, feed_forward_norm, plan.epsilon))
        outcome: Tensor = hidden_NC + down(functional.silu(gate) * up)[0]
        return outcome

    def _attend(
        self,
        query_NHD: Tensor,
        slot_N: Tensor,
        position_N: Tensor,
        column_L: Tensor,
        keys_SGLD: Tensor,
        values_SGLD: Tensor,
    ) -> Tensor:
        """Attention in float32; Q query heads share a key/value head."""
        plan, columns = self.plan, column_L.shape[0]
        key_NGLD, value_NGLD = keys_SGLD[slot_N][:, :, :columns], values_SGLD[slot_N][:, :, :columns]
        query_NGQD = query_NHD.unflatten(1, (plan.kv_heads, -1)).float() * plan.scaling
        score_NGQL = (query_NGQD[:, :, :, None] * key_NGLD[:, :, None].float()).sum(-1)
        distance_NL = position_N[:, None] - column_L[None]
        hidden_NL = distance_NL < 0 if plan.window is None else (distance_NL < 0) | (distance_NL >= plan.window)
        score_NGQL = score_NGQL.masked_fill(hidden_NL[:, None, None], -math.inf)
        weight_NGQL = (score_NGQL - score_NGQL.amax(-1, keepdim=True)).exp()
        # Divided last: a softmax would be divided anew for every number that it weighs.
        seen_NGQD: Tensor = (weight_NGQL[..., None] * value_NGLD[:, :, None].float()).sum(-2)
        seen_NGQD = seen_NGQD / weight_NGQL.sum(-1, keepdim=True)
        return seen_NGQD.flatten(1, 2).to(query_NHD.dtype)


class _Projections:
    """The matrices of a group, from the tensors that are left."""

    def __init__(self, kinds: Sequence[str], outputs: Sequence[int], left: Iterator[Tensor]) -> None:
        self._outputs = outputs
        self._joined = (next(left), next(left)) if kinds[0].startswith("int") else None
        self._weights = [] if self._joined else [next(left) for _ in kinds]
        self._biases = [next(left) if kind.endswith("+") else None for kind in kinds]

    def __call__(self, rows_NK: Tensor) -> list[Tensor]:
        if self._joined is None:
            return [_linear(rows_NK, *own) for own in zip(self._weights, self._biases, strict=True)]
        product, first, found = multiply(rows_NK.to(torch.bfloat16), *self._joined).to(rows_NK.dtype), 0, []
        for outputs, bias in zip(self._outputs, self._biases, strict=True):
            part = product[:, first : first + outputs]
            found.append(part if bias is None else part + bias)
            first += outputs + -outputs % KERNEL_ROWS
        return found


def _linear(rows_NK: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A product in float. A single row would be computed by another kernel, which rounds otherwise, so that there is
    always one more; it takes no longer."""
    return functional.linear(torch.cat((rows_NK, rows_NK[:1])), weight, bias)[:-1]


def _norm(states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm as Llama has it: in float32, rounded, and then scaled."""
    wide = states.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(states.dtype)


def _rotated(states_NXD: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
    """Rotary embedding, the two halves of a head being the pairs."""
    half = states_NXD.shape[-1] // 2
    turned_NXD = torch.cat((-states_NXD[..., half:], states_NXD[..., :half]), -1)
    return states_NXD * cos_ND[:, None] + turned_NXD * sin_ND[:, None]


def plan_of(layer: nn.Module, dtype: torch.dtype) -> LayerPlan:
    """The plan of a layer of a model; NotCompiled for one whose code is not ours."""
    if type(layer) not in LAYERS:
        raise NotCompiled(f"no code is compiled for a {type(layer).__name__}")
    any_layer = cast(Any, layer)
    attention, mlp, norm = any_layer.self_attn, any_layer.mlp, any_layer.input_layernorm
    groups = _projections_of(layer)
    parts = [part for group in groups for part in group]
    if any(isinstance(part, PackedLinear | WideLinear) for part in parts):
        raise NotCompiled("this processor has no instructions for model.dtype=bfloat16")
    if odd := [type(part).__name__ for part in parts if type(part) not in (nn.Linear, IntLinear)]:
        raise NotCompiled(f"a layer holds a {odd[0]}")
    if any(len({part.bits if isinstance(part, IntLinear) else None for part in group}) > 1 for group in groups):
        raise NotCompiled("matrices with the same input are packed in different ways")
    if not isinstance(mlp.act_fn, nn.SiLU) and type(mlp.act_fn).__name__ != "SiLUActivation":
        raise NotCompiled(f"a layer's activation is {type(mlp.act_fn).__name__}")
    return LayerPlan(
        heads=parts[0].out_features // attention.head_dim,
        kv_heads=parts[1].out_features // attention.head_dim,
        head_size=attention.head_dim,
        hidden_size=norm.weight.shape[0],
        scaling=attention.scaling,
        epsilon=norm.variance_epsilon,
        # Mistral's layers do not know their window: all of them have the config's.
        window=getattr(attention.config if type(layer) is MistralDecoderLayer else attention, "sliding_window", None),
        has_head_norms=hasattr(attention, "q_norm"),
        outputs=tuple(tuple(part.out_features for part in group) for group in groups),
        kinds=tuple(tuple(map(_kind, group)) for group in groups),
        dtype=str(dtype)[6:],
    )


def _projections_of(layer: nn.Module) -> list[list[nn.Linear]]:
    any_layer = cast(Any, layer)
    attention, mlp = any_layer.self_attn, any_layer.mlp
    return [[getattr(attention, name, None) or getattr(mlp, name) for name in group] for group in PROJECTIONS]


def _kind(part: nn.Linear) -> str:
    kind = f"int{part.bits}" if isinstance(part, IntLinear) else str(part.weight.dtype)[6:]
    return kind + ("+" if part.bias is not None else "")


def tensors_of(layer: nn.Module) -> list[Tensor]:
    """The tensors of a layer in the order in which its code takes them; those of packed groups become views of one."""
    any_layer = cast(Any, layer)
    attention = any_layer.self_attn
    found = [any_layer.input_layernorm.weight, any_layer.post_attention_layernorm.weight]
    if hasattr(attention, "q_norm"):
        found += [attention.q_norm.weight, attention.k_norm.weight]
    for group in _projections_of(layer):
        packed = [part for part in group if isinstance(part, IntLinear)]
        found += join(packed) if packed else [part.weight for part in group]
        found += [part.bias for part in group if part.bias is not None]
    return [tensor.detach() for tensor in found]


Code = Callable[[list[Tensor]], list[Tensor]]
"""A compiled layer: its inputs in one list, its one output in another."""


def compiled_code(plan: LayerPlan, tensors: Sequence[Tensor], folder: Path, *, may_compile: bool) -> Code:
    """The code of a layer, compiled where `folder` has none of this plan for this machine.

    Raises:
        NotCompiled: it has none and may not compile it; there is no C++ compiler, or it fails; the folder cannot be
            used, or others can change it.
    """
    device = tensors[0].device
    package = folder / f"{_digest(plan, device)}.pt2"
    try:
        if not _is_whole(package):
            if not may_compile:
                raise NotCompiled("no such layer has been compiled yet")
            if not any(map(shutil.which, COMPILERS)):
                raise NotCompiled(f"this machine has no C++ compiler ({', '.join(COMPILERS)})")
            package.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(package.with_suffix(".lock")):  # the shards of a machine start together
                if not _is_whole(package):
                    _compile(plan, tensors, package)
        for place in (folder, package):
            _check_own(place)
    except OSError as error:
        raise NotCompiled(f"compiled layers cannot be kept in {str(folder)!r} ({error.strerror})") from None
    return _load(package, device)


def _is_whole(package: Path) -> bool:
    """Whether it is there, and its parts have their checksums, which torch does not look at. Raises OSError for a file
    that cannot be opened."""
    try:
        stream = package.open("rb")
    except FileNotFoundError:
        return False
    with stream:
        try:
            with ZipFile(stream) as parts:
                return parts.testzip() is None
        except Exception:  # whatever zipfile makes of other bytes, OSError among it
            return False


def _load(package: Path, device: torch.device) -> Code:
    # torch's function for this first compiles and runs a probe of the processor, below /tmp; `_digest` names it.
    make_loader = cast(Any, torch._C)._aoti.AOTIModelPackageLoader
    try:
        # One runner. For several threads it marks the end of each run with events, which CUDA graphs cannot hold.
        loader = make_loader(
            str(package), "model", device.type == "cuda", 1, -1 if device.index is None else device.index
        )
    except Exception as error:  # whatever zip, file system and linker say
        raise NotCompiled(f"a compiled layer does not load: {_in_short(error)}") from None
    return cast(Code, loader.boxed_run)


def _in_short(error: Exception) -> str:
    """An error on one line; of a compiler's pages its first complaint."""
    said = next((line for line in str(error).splitlines() if "error: " in line), str(error))
    return " ".join(f"{type(error).__name__}: {said}".split())[:200]


def _check_own(place: Path) -> None:
    """NotCompiled for what another user owns or can change: a package is machine code, and the cache may be shared."""
    if hasattr(os, "getuid"):
        found = place.stat()
        if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            remedy = "it must be yours and only you may write to it (chmod go-w), or set model.cache_dir"
            raise NotCompiled(f"other users can change {str(place)!r}, which holds machine code: {remedy}")


def _digest(plan: LayerPlan, device: torch.device) -> str:
    """All that the machine code depends on: plan, source, torch, processor, what torch uses of it, threads, GPU."""
    machine = [platform.machine(), platform.processor(), _instructions(), torch.backends.cpu.get_cpu_capability()]
    if device.type == "cuda":
        machine += [torch.cuda.get_device_name(device), str(torch.cuda.get_device_capability(device))]
    source = [Path(__file__).read_text(encoding="utf-8"), inspect.getsource(multiply)]
    known = "\n".join([torch.__version__, *machine, str(torch.get_num_threads()), str(asdict(plan)), *source])
    return hashlib.sha256(known.encode()).hexdigest()[:32]


def _instructions() -> str:
    """The processor's features, as Linux reports them: machines of the same name may share a cache."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
            return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        return ""


def _compile(plan: LayerPlan, tensors: Sequence[Tensor], package: Path) -> None:
    import torch._inductor
    import torch._inductor.config as inductor
    import torch.fx.experimental._config as shapes
    from torch.export import Dim, export

    log.info("compiling a layer once (about 20 s)")
    began, dtype, device = time.monotonic(), getattr(torch, plan.dtype), tensors[0].device
    with torch.device(device):
        states = [torch.zeros(3, size, dtype=dtype) for size in (plan.hidden_size, plan.head_size, plan.head_size)]
        stored = [torch.zeros(5, plan.kv_heads, 128, plan.head_size, dtype=dtype) for _ in range(2)]
        arguments = (*states, torch.arange(3), torch.arange(3), torch.arange(64), *stored, list(tensors))
    rows, slots, room = Dim("rows", min=1, max=2**16), Dim("slots", min=1, max=2**16), Dim("room", min=2, max=2**24)
    cache = {0: slots, 2: room}
    sizes: Any = (*[{0: rows}] * 5, {0: Dim("columns", min=2, max=2**24)}, cache, cache, [None] * len(tensors))
    made = io.BytesIO()  # not its file: torch's own writer aborts the process where a disk is full
    try:
        # Rows and slots may be one, for which torch would compile code of its own.
        with (
            _work_folder(package.parent),
            torch.no_grad(),
            cast(Any, shapes).patch(backed_size_oblivious=True),
            inductor.patch(INDUCTOR),
            warnings.catch_warnings(action="ignore", category=FutureWarning),  # torch's exporter warns of itself
        ):
            exported = export(CompiledLayer(plan), arguments, dynamic_shapes=sizes)
            torch._inductor.aoti_compile_and_package(exported, package_path=made)
    except NotCompiled:
        raise
    except Exception as error:  # whatever exporter, compiler and linker say
        raise NotCompiled(f"a layer did not compile: {_in_short(error)}") from None
    _keep(made.getvalue(), package)
    log.info("compiled a layer in %.0f s", time.monotonic() - began)


@contextmanager
def _work_folder(own: Path) -> Iterator[None]:
    """Let torch's inductor work in a new folder for the time of the block, below `own` if it must not be elsewhere.

    Its default is below /tmp, under a name that anybody knows, and other users might change code in it. It also puts
    paths unquoted into the compiler's command line. NotCompiled where there is no path that this does no harm to.
    """
    installed = Path(torch.__file__).parent
    if not _is_plain(installed):
        raise NotCompiled(f"torch must be installed in a path without spaces and quotes, got {str(installed)!r}")
    parents = [Path(tempfile.gettempdir()), own]
    parent = next(filter(_is_plain, parents), None)
    if parent is None:
        names = " and ".join(repr(str(parent)) for parent in parents)
        raise NotCompiled(f"TMPDIR or model.cache_dir must be a path without spaces and quotes, got {names}")
    with tempfile.TemporaryDirectory(prefix="compile-", dir=parent) as folder:
        before = {name: os.environ.get(name) for name in WORK_FOLDERS}
        os.environ.update(dict.fromkeys(WORK_FOLDERS, folder))
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _is_plain(path: Path) -> bool:
    return not re.search(r"[\s'\"\\]", str(path))


def _keep(data: bytes, package: Path) -> None:
    """Write a package whole, or raise OSError."""
    temporary = package.with_suffix(".partial")
    try:
        temporary.touch(mode=0o600)
        temporary.write_bytes(data)
        temporary.replace(package)
    finally:
        temporary.unlink(missing_ok=True)


class CompiledModel:
    """A model, or a slice of its layers, that runs by rows over a cache.

    Args:
        model: A model in evaluation mode, or a slice (`lab.models.slices`).
        layers: Numbers of the layers that it holds.
        cache: Its cache.
        folder: Where compiled layers are kept.
        may_compile: Whether layers that are not there are compiled now, which takes about 20 s.

    Raises:
        NotCompiled: it is none of `DECODERS`, has other layers than `LAYERS`, rotary frequencies that depend on a
            text's length, or an adapter beside its layers; or there is no compiler.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[int], cache: SlotCache, folder: Path, *, may_compile: bool = True
    ) -> None:
        any_model = cast(Any, model)
        decoder = any_model.get_decoder()
        if type(decoder) not in DECODERS:
            raise NotCompiled(f"no code is compiled for a {type(decoder).__name__}")
        self._device: torch.device = any_model.device
        if self._device.type not in ("cpu", "cuda"):
            raise NotCompiled(f"layers are compiled for CPUs and CUDA, not for {self._device.type}")
        if any_model.dtype not in (torch.bfloat16, torch.float32):
            raise NotCompiled(f"compiled layers compute in bfloat16 or float32, not in {any_model.dtype}")
        if (kind := getattr(decoder.rotary_emb, "rope_type", "default")) in ("dynamic", "longrope"):
            raise NotCompiled(f"its rotary frequencies ({kind}) depend on the length of a text")
        self._embedding, self._rotary, self._norm = decoder.embed_tokens, decoder.rotary_emb, decoder.norm
        self._head, self._cache = any_model.get_output_embeddings(), cache
        plans = {number: plan_of(decoder.layers[number], any_model.dtype) for number in layers}
        self._tensors = {number: tensors_of(decoder.layers[number]) for number in layers}
        by_plan: dict[LayerPlan, Code] = {}
        for number, plan in plans.items():
            if plan not in by_plan:
                by_plan[plan] = compiled_code(plan, self._tensors[number], folder, may_compile=may_compile)
        self._codes = {number: by_plan[plan] for number, plan in plans.items()}
        self._columns = torch.arange(0, device=self._device)
        self._graphs = Graphs(cuda_recorder()) if self._device.type == "cuda" else None
        first = {plan: number for number, plan in reversed(plans.items())}
        for plan, number in first.items():
            self._check(number, plan, decoder.layers[number])
        found = 0
        if cache.bucket % VECTOR == 0:  # else sums over columns end in a part of a vector in one pass, not in another
            found = min(self._invariant_rows(number, plan) for plan, number in first.items())
        self.row_invariant = found > 0
        """Whether a row gets the same bits in every company, as tried on random rows with these weights."""
        self._most_rows = found or WIDTHS[0]

    def run(self, states: Tensor, slots: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Append `counts[i]` rows to `slots[i]`, whose lengths are set; rows lie piece by piece.

        Args:
            states: Ids N, or hidden states N x C.
            slots: A slot for each piece.
            counts: Its rows.

        Returns:
            Hidden states N x C behind the last layer; nothing is committed to the cache yet.
        """
        cache = self._cache
        starts = [cache.lengths[slot] for slot in slots]
        columns = cache.begin_rows(slots, counts)
        if columns != len(self._columns):
            self._columns = torch.arange(columns, device=self._device)
        positions = [start + row for start, count in zip(starts, counts, strict=True) for row in range(count)]
        of_slots = [slot for slot, count in zip(slots, counts, strict=True) for _ in range(count)]
        position_N, slot_N = (torch.tensor(numbers, device=self._device) for numbers in (positions, of_slots))
        states = states.to(self._device)
        hidden_NC = states if states.is_floating_point() else self._embedding(states)
        cos_1ND, sin_1ND = self._rotary(hidden_NC, position_N[None])
        inputs = (hidden_NC, cos_1ND[0], sin_1ND[0], slot_N, position_N, self._columns)
        if self._graphs is None:
            return self._layers(inputs)
        return self._graphs.run(self._layers, inputs, [part for number in self._codes for part in cache.stored(number)])

    def _layers(self, inputs: Sequence[Tensor]) -> Tensor:
        """The hidden states behind all layers, of rows as the code of a layer takes them, and the columns."""
        *of_rows, columns_L = inputs
        parts = [list(part) for part in zip(*map(self._parts, of_rows), strict=True)]
        for number, code in self._codes.items():
            stored, tensors = self._cache.stored(number), self._tensors[number]
            for part in parts:  # in order: a row sees the rows of its sequence that lie before it
                [part[0]] = code([*part, columns_L, *stored, *tensors])
        return torch.cat([part[0] for part in parts])

    def logits(self, hidden_NC: Tensor) -> Tensor:
        """N x V, of hidden states behind the last layer."""
        most = min(HEAD_ROWS, self._most_rows)
        return torch.cat([self._logits(part_NC) for part_NC in hidden_NC.split(most)])

    def _parts(self, rows: Tensor) -> Sequence[Tensor]:
        return cast(Sequence[Tensor], rows.split(self._most_rows))

    def _logits(self, hidden_NC: Tensor) -> Tensor:
        normed_NC, head = self._norm(hidden_NC), self._head
        if type(head) is nn.Linear:
            return _linear(normed_NC, head.weight, head.bias)
        return cast(Tensor, head(normed_NC))

    @torch.inference_mode()
    def _check(self, number: int, plan: LayerPlan, layer: nn.Module) -> None:
        """NotCompiled for code that computes something else than its layer, as tried on a text of random rows."""
        dtype, device = getattr(torch, plan.dtype), self._device
        position_N = torch.arange(MOST_ROWS, device=device)
        noise = torch.randn(MOST_ROWS, plan.hidden_size, generator=torch.Generator().manual_seed(number))
        hidden_NC = noise.to(device, dtype)
        turns = self._rotary(hidden_NC, position_N[None])
        room = (1, plan.kv_heads, MOST_ROWS, plan.head_size)
        stored = [torch.zeros(room, dtype=dtype, device=device) for _ in range(2)]
        given = [turns[0][0], turns[1][0], torch.zeros_like(position_N), position_N, position_N]
        [ours_NC] = self._codes[number]([hidden_NC, *given, *stored, *self._tensors[number]])
        distance_NN = position_N[:, None] - position_N
        hidden_NN = (distance_NN < 0) | (distance_NN >= (plan.window or MOST_ROWS))
        mask_NN = torch.zeros(hidden_NN.shape, dtype=dtype, device=device).masked_fill(hidden_NN, -math.inf)
        theirs_NC = layer(hidden_NC[None], attention_mask=mask_NN[None, None], position_embeddings=turns)[0]
        added, rounding = (theirs_NC - hidden_NC.float()).norm(), torch.finfo(dtype).eps * theirs_NC.float().norm()
        error = float((ours_NC.float() - theirs_NC).norm() / (LARGEST_ERROR * added + rounding))
        if not error <= 1:
            raise NotCompiled(f"compiled layer {number} differs from what it was made of, {error:.2g} times too much")

    @torch.inference_mode()
    def _invariant_rows(self, number: int, plan: LayerPlan) -> int:
        """The most rows of a product, of `WIDTHS`, that get what each of them gets alone; 0 where there are none."""
        generator = torch.Generator().manual_seed(number)
        dtype = getattr(torch, plan.dtype)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self._device, dtype)

        most = max(PROBED_ROWS)
        hidden_NC, cos_ND, sin_ND = (noise(most, size) for size in (plan.hidden_size, plan.head_size, plan.head_size))
        stored = [noise(2, plan.kv_heads, PROBED_COLUMNS, plan.head_size) for _ in range(2)]
        row_N, column_L = (torch.arange(count, device=self._device) for count in (most, PROBED_COLUMNS))
        slot_N, position_N = row_N % 2, PROBED_COLUMNS - most + row_N

        def run(rows: slice) -> Tensor:
            given = [tensor[rows].contiguous() for tensor in (hidden_NC, cos_ND, sin_ND, slot_N, position_N)]
            [outcome_NC] = self._codes[number]([*given, column_L, *stored, *self._tensors[number]])
            return outcome_NC

        run(slice(0, most))  # from here on, each row finds in the cache what it writes
        alone_NC = torch.cat([run(slice(row, row + 1)) for row in range(most)])
        alone_RV = torch.cat([self._logits(row_1C) for row_1C in alone_NC[:HEAD_ROWS].split(1)])

        def is_alike(rows: int) -> bool:
            of_head = min(rows, HEAD_ROWS)
            return torch.equal(run(slice(0, rows)), alone_NC[:rows]) and torch.equal(
                self._logits(alone_NC[:of_head]), alone_RV[:of_head]
            )

        wrong = next((rows for rows in PROBED_ROWS if not is_alike(rows)), most + 1)
        return next((width for width in WIDTHS if width < wrong), 0)


@dataclass(frozen=True)
class Compiler:
    """Whether a role compiles its layers, as `device.compile` and `model.quantization` say."""

    wanted: bool | str
    """`device.compile`."""
    is_packed: bool
    """Whether the model is int8 or int4."""
    lasts: bool
    """Whether the role runs for so long that compiling pays."""
    folder: Path

    @classmethod
    def of(cls, model: ModelSettings, device: DeviceSettings, *, lasts: bool) -> Compiler:
        """The compiler of a role with these settings."""
        folder = path_of(model.cache_dir, "model.cache_dir") / "compiled"
        return cls(device.compile, model.quantization.bits is not None, lasts, folder)

    def open(self, model: nn.Module, layers: Sequence[int], cache: SlotCache) -> CompiledModel | None:
        """The model over compiled layers, None where it runs without.

        Raises:
            UserError: `device.compile=true`, and it cannot be.
        """
        if self.wanted is False or (self.wanted == "auto" and not self.is_packed):
            return None
        try:
            return CompiledModel(model, layers, cache, self.folder, may_compile=self.lasts or self.wanted is True)
        except NotCompiled as reason:
            if self.wanted is True:
                raise UserError(f"device.compile must be false or auto here, got true: {reason}") from None
            log.info("layers are not compiled: %s", reason)
            return None
