"""Sources of models. Each becomes one plain folder: config.json, safetensors, tokenizer.

Knows nothing about pillars, adapters or networks.
"""

import functools
import glob
import importlib.util
import logging
import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import (
    BitsAndBytesConfig,
    PreTrainedConfig,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from lab.device import check_dtype, lacks_sixteen_bits
from lab.engine.row_attention import attend_by_row
from lab.engine.wide_products import widen_products
from lab.file_digests import RECORD_FILE, file_digests, record_in_cache
from lab.files import path_of
from lab.models.conversion import (
    SHARE,
    cache_folder,
    check_fits,
    converted,
    described_gguf,
    pack,
    packed_folder,
    random_config,
)
from lab.models.folder import CONFIG, DESCRIPTIONS, INDEX, SINGLE, ModelFolder
from lab.models.gguf.file import GgufModel, gguf_file
from lab.models.packed import kernel_fault
from lab.models.quantized import PACKED, WeightFormat, can_become, check_packed, load_options
from lab.settings import ModelSettings, ModelSource, Quantization, UserError, digest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk."""

    folder: Path
    """config.json, safetensors and tokenizer files."""
    identity: str
    """`model_identity` of its settings."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, frozen and in evaluation mode, with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    checkpoint: Checkpoint
    device: torch.device


def load_model(settings: ModelSettings, device: torch.device) -> LoadedModel:
    """The base model that `settings` describe, on `device`; UserError if it cannot be loaded."""
    disable_progress_bar()  # weights are mapped, not read: its bar is over before it shows
    dtype = check_dtype(device, settings.dtype)
    quantization = quantization_config(settings, device, dtype)
    folder = fetch(settings, None)
    config = folder.config()
    stored = check_weight_format(folder, config, settings)
    tokenizer = folder.tokenizer()
    check_room(folder.shapes().values(), stored, settings, device, dtype)
    model = folder.load(config, dtype, **load_options(stored, quantization, device, dtype))
    model = prepared(
        model, settings, device, dtype, moves=quantization is None and stored in (WeightFormat.plain, WeightFormat.fp8)
    )
    folder.check_computes(model)
    return LoadedModel(model, tokenizer, Checkpoint(folder.path, model_identity(settings)), device)


def prepared(
    model: PreTrainedModel, settings: ModelSettings, device: torch.device, dtype: torch.dtype, *, moves: bool
) -> PreTrainedModel:
    """A model, or a slice of one, ready for inference on its device; `moves`: it is not on the device yet.

    Raises:
        UserError: quantisation packed nothing.
    """
    if settings.quantization is not Quantization.none:
        check_packed(model, settings.quantization)
    if moves:
        model = model.to(device)  # type: ignore[arg-type]  # transformers wraps nn.Module.to and loses its signature
    model.requires_grad_(False)
    if lacks_sixteen_bits(device, dtype):
        widen_products(model)
    if lacks_sixteen_bits(device, dtype) or (settings.quantization.bits is not None and device.type == "cpu"):
        attend_by_row(model)
    return model


def load_tokenizer_only(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """A model's tokenizer alone: of a hub model no weights are downloaded."""
    return fetch(settings, ()).tokenizer()


def check_weight_format(folder: ModelFolder, config: PreTrainedConfig, settings: ModelSettings) -> WeightFormat:
    """The format of a folder's matrices; UserError if it cannot be read, or not under `model.quantization`."""
    stored = folder.weight_format(config)
    if not can_become(stored, settings.quantization):
        allowed = stored.name if stored in PACKED else Quantization.none.name
        raise UserError(
            f"model.quantization must be {allowed} for a model that is stored as {stored.name}, "
            f"got {settings.quantization.name}"
        )
    return stored


def check_room(
    tensors: Iterable[tuple[str, tuple[int, ...]]],
    stored: WeightFormat,
    settings: ModelSettings,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """UserError for weights that take more than all memory of the device.

    Args:
        tensors: Dtype, as safetensors names it, and shape of each.
        stored: Their format.
        settings: The model's.
        device: Where they will be.
        dtype: What those in float become.
    """
    as_stored, becomes_nf4 = stored in PACKED, settings.quantization is Quantization.nf4 and stored not in PACKED
    needed = 0.0
    for name, shape in tensors:
        bits = int((re.findall(r"\d+", name) or ["8"])[0])  # BF16, F8_E4M3, U8; BOOL
        if not as_stored and "F" in name:
            bits = 4 if becomes_nf4 else 8 * dtype.itemsize
        needed += math.prod(shape) * bits / 8
    check_fits(needed, device, "", SHARE)


def load_config(settings: ModelSettings) -> PreTrainedConfig:
    """The model's config alone: of a hub model no weights are downloaded."""
    return random_config(settings) if settings.source is ModelSource.random else fetch(settings, ()).config()


def read_own_config(settings: ModelSettings) -> PreTrainedConfig:
    """The config of a folder, or from a GGUF file's header, without conversion. UserError for other sources."""
    match settings.source:
        case ModelSource.path:
            return _model_folder(settings).config()
        case ModelSource.gguf:
            return GgufModel(gguf_file(settings)).config()
        case _:
            raise UserError(f"model.source must be path or gguf to read a config from here, got {settings.source.name}")


def end_ids_of(settings: ModelSettings) -> list[int]:
    """The ids that end a text of a model, from its generation config, else from its config; no weights are read."""
    return fetch(settings, ()).end_ids()


def model_identity(settings: ModelSettings) -> str:
    """Identity of the weights in `settings`, whatever their precision; an adapter belongs to one identity.

    It covers all bytes of config and weights of a folder, all bytes of a GGUF file, and the commit of a hub model.
    """
    match settings.source:
        case ModelSource.hub:
            return f"hub:{settings.repo}@{_described_on_hub(settings).name}"
        case ModelSource.path:
            return f"path:{_folder_digest(settings, _fetch_stored(settings, None))}"
        case ModelSource.gguf:
            file = gguf_file(settings)
            record = record_in_cache(file.parent, cache_folder(settings))
            return f"gguf:{file_digests(file.parent, [file.name], [record])[file.name][:16]}"
        case ModelSource.random:
            return f"random:{digest({'architecture': asdict(settings.architecture), 'seed': settings.seed})}"


def prepare_checkpoint(settings: ModelSettings) -> Checkpoint:
    """The folder of a model with all of its weights, after conversion if its source is not a folder."""
    return Checkpoint(fetch(settings, None).path, model_identity(settings))


def fetch(settings: ModelSettings, names: Collection[str] | None) -> ModelFolder:
    """A model's folder, with the files that hold these tensors; None: with all files.

    Config, index and tokenizer are always there. Only hub models can lack weights: each file is downloaded when one of
    its tensors is requested, always from the commit that this process saw first. A model of quantization int8 or int4
    is packed into the model cache, each layer once, when it is requested by its names there (`list_tensors`); if no
    tensors are requested, its original description is returned.

    Raises:
        UserError: a model that cannot be loaded, a folder that is not whole.
    """
    described = _described(settings)
    if _is_stored_as_used(settings, described):
        return _fetch_stored(settings, names)
    if names is not None and not names:
        return described
    made = packed_folder(settings, model_identity(settings), described)
    folder = ModelFolder(made.path, "model.cache_dir")
    wanted = folder.files.keys() if names is None else names
    if not all((made.path / folder.files[name]).is_file() for name in wanted):
        pack(settings, made, wanted, partial(_fetch_stored, settings))
    folder.check({folder.files[name] for name in wanted})
    return folder


def list_tensors(settings: ModelSettings) -> ModelFolder:
    """The folder that `fetch` returns with the list of its tensors, which themselves need not be there."""
    described = _described(settings)
    if not _is_stored_as_used(settings, described):
        return ModelFolder(packed_folder(settings, model_identity(settings), described).path, "model.cache_dir")
    # A hub repository without an index has one file, which everybody needs.
    return described if described.has_weights else _fetch_stored(settings, None)


def _described(settings: ModelSettings) -> ModelFolder:
    """A model's folder in float with config and tokenizer. If it is to be packed, no tensor of a GGUF file is read."""
    if settings.quantization.bits is None or settings.source is not ModelSource.gguf:
        return _fetch_stored(settings, ())
    return ModelFolder(described_gguf(settings, model_identity(settings)), _SETTING[settings.source])


def _is_stored_as_used(settings: ModelSettings, described: ModelFolder) -> bool:
    if settings.quantization.bits is None:
        return True
    return check_weight_format(described, described.config(), settings) in PACKED


def _fetch_stored(settings: ModelSettings, names: Collection[str] | None) -> ModelFolder:
    """A model's folder in the format of its source."""
    setting = _SETTING[settings.source]
    match settings.source:
        case ModelSource.hub:
            return _from_hub(settings, names)
        case ModelSource.path:
            folder = _model_folder(settings)
        case ModelSource.gguf | ModelSource.random:
            folder = ModelFolder(converted(settings, model_identity(settings)), setting)
    folder.check()
    check_weight_format(folder, folder.config(), settings)
    return folder


def _model_folder(settings: ModelSettings) -> ModelFolder:
    return ModelFolder(path_of(str(settings.path), "model.path"), _SETTING[ModelSource.path])


_SETTING = {
    ModelSource.hub: "model.repo",
    ModelSource.path: "model.path",
    ModelSource.gguf: "model.cache_dir",
    ModelSource.random: "model.cache_dir",
}
"""The setting that names the folder of a model, by its source."""


def quantization_config(settings: ModelSettings, device: torch.device, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The quantisation while loading, None without; UserError if 4 bits are not available."""
    if settings.quantization is Quantization.none:
        return None
    if settings.quantization.bits is not None:
        if (fault := kernel_fault(device)) is not None:
            raise UserError(
                f"model.quantization must be none or nf4 on {device.type}, got {settings.quantization.name}: {fault}"
            )
        if dtype is torch.float64:
            raise UserError(f"model.dtype must be float32 or bfloat16 for {settings.quantization.name}, got float64")
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "model.quantization must be none where bitsandbytes is not installed (pip install bitsandbytes), got nf4"
        )
    if device.type not in ("cuda", "mps", "cpu"):
        raise UserError(f"model.quantization must be none on {device.type}, got nf4")
    if dtype is torch.float64:
        raise UserError("model.dtype must be float32, bfloat16 or float16 for quantization=nf4, got float64")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _from_hub(settings: ModelSettings, names: Collection[str] | None) -> ModelFolder:
    folder = ModelFolder(_described_on_hub(settings), _SETTING[ModelSource.hub])
    if names is None or names:
        _download(settings, [SINGLE, INDEX], folder.path.name)  # a single file counts where there is one
        folder.files  # noqa: B018 (UserError where there are no weights)
        asked = folder.files.keys() if names is None else folder.files.keys() & set(names)
        wanted = {folder.files[name] for name in asked}
        if absent := sorted(wanted.intersection(folder.missing_files())):
            _download(settings, absent, folder.path.name)
        if lacking := sorted(wanted.intersection(folder.missing_files())):
            raise _unreachable(str(settings.repo), OSError(f"it has no {lacking[0]}"))
        folder.check(wanted)
    check_weight_format(folder, folder.config(), settings)
    return folder


def _described_on_hub(settings: ModelSettings) -> Path:
    return _first_seen(str(settings.repo), settings.revision)


@functools.cache
def _first_seen(repo: str, revision: str | None) -> Path:
    """The snapshot of a repository that this process uses throughout, named by its commit, with its `DESCRIPTIONS`."""
    return _snapshot(repo, revision, DESCRIPTIONS)


def _download(settings: ModelSettings, files: Sequence[str], commit: str) -> None:
    _snapshot(str(settings.repo), commit, [glob.escape(file) for file in files])


def _snapshot(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client has a dozen ways to say no; all are the user's to mend
        raise _unreachable(repo, error) from None


def _unreachable(repo: str, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(f"model.repo must be a repository that this machine can reach, got {repo!r} ({reason})")


def _folder_digest(settings: ModelSettings, folder: ModelFolder) -> str:
    """Digest over all bytes of config and weights, and the names of their files."""
    records = [folder.path / RECORD_FILE, record_in_cache(folder.path, cache_folder(settings))]
    return digest(file_digests(folder.path, [CONFIG, *folder.weight_files], records))
