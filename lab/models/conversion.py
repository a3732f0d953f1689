"""Conversion of other sources of models into folders: GGUF files, random weights from a seed, weights of 8 or 4 bits.

Each is written once, below `model.cache_dir` by digest and dtype; every later start maps it into memory.
"""

import logging
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lab.device import GIB, TORCH_DTYPES, total_bytes
from lab.file_digests import RECORD_FILE
from lab.files import cannot_use, path_of, require_writable, share_like_parent
from lab.models.folder import DESCRIPTIONS, INDEX, ModelFolder, write_index
from lab.models.gguf.blocks import BITS, GgufBlocks, stored_kinds
from lab.models.gguf.file import GgufModel, gguf_file
from lab.models.packed import HEAD_BITS
from lab.models.packed_folder import PackedFolder
from lab.models.proof import Use, require
from lab.models.quantized import WeightFormat, load_options
from lab.settings import Dtype, ModelSettings, ModelSource, UserError, digest

log = logging.getLogger(__name__)

CONVERSION = 3
"""Part of the cache key: raise it when the same source would be written differently."""
PACKING = 3
"""Likewise for packed models."""
FLOATS_AT_ONCE = 2**28
"""Bytes of tensors, or of layers, that are in float together while a model is converted; at least one is."""
SHARE = "int8 and int4 weights (model.quantization) need less; shards share them (python -m split.plan)"
"""What to do about a model that is too large for a machine."""


def cache_folder(settings: ModelSettings) -> Path:
    """`model.cache_dir` as an absolute path."""
    return path_of(settings.cache_dir, "model.cache_dir")


def _write_gguf(settings: ModelSettings, folder: Path, dtype: torch.dtype) -> None:
    model = GgufModel(gguf_file(settings))
    log.info("converting %s once (about 20 s for 135M parameters)", settings.name)
    config = model.describe(folder)
    config.dtype = dtype
    config.save_pretrained(folder)
    files: dict[str, str] = {}
    for number, together in enumerate(_some_at_once(_gguf_tensors(model, config), dtype), 1):
        file = f"model-{number:05}.safetensors"
        save_file(together, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(together, file)
    write_index(folder, files, sum(file.stat().st_size for file in folder.glob("*.safetensors")))


def _gguf_tensors(model: GgufModel, config: PreTrainedConfig) -> Mapping[str, Any]:
    if not model.is_read_whole:
        return model.tensors(config)
    _check_fits_in_float(model.weight_count)
    return model.whole()


def _some_at_once(tensors: Mapping[str, Any], dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """Tensors that are read when they are used, in groups of `FLOATS_AT_ONCE` bytes or of one tensor."""
    together: dict[str, Tensor] = {}
    for name, stored in tensors.items():
        tensor = stored[...].to(dtype).contiguous()
        if together and sum(one.nbytes for one in (*together.values(), tensor)) > FLOATS_AT_ONCE:
            yield together
            together = {}
        together[name] = tensor
    if together:
        yield together


def check_fits(needed: float, device: torch.device, how: str, remedy: str) -> None:
    """UserError for weights of so many bytes that take more than all memory of a device: the system would swap, or end
    the process."""
    if needed > (total := total_bytes(device)):
        raise UserError(
            f"model must fit into the {total / GIB:.3g} GiB of memory here{how}, got weights of {needed / GIB:.3g}: "
            f"{remedy}"
        )


def _check_fits_in_float(weights: int) -> None:
    remedy = "convert it on a larger machine, and copy its folder out of model.cache_dir (model.source=path)"
    check_fits(weights * torch.float32.itemsize, torch.device("cpu"), " in float, once, to be converted", remedy)


def _write_random(settings: ModelSettings, folder: Path, dtype: torch.dtype) -> None:
    config = random_config(settings)
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    _check_fits_in_float(sum(weight.numel() for weight in outline.parameters()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
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


def described_gguf(settings: ModelSettings, identity: str) -> Path:
    """`<cache>/<digest>-described`: config and tokenizer of a GGUF file, without its tensors."""
    target = cache_folder(settings) / f"{identity.partition(':')[2]}-v{CONVERSION}-described"
    return _written_once(target, settings.name, GgufModel(gguf_file(settings)).describe)


def packed_path(settings: ModelSettings, identity: str) -> Path:
    """`<cache>/<digest>-<dtype>-int4`, the folder of a packed model."""
    name = f"{digest(identity)}-v{PACKING}-{_stored_dtype(settings).name}-{settings.quantization.name}"
    return cache_folder(settings) / name


def packed_folder(settings: ModelSettings, identity: str, described: ModelFolder) -> PackedFolder:
    """The folder of a model with its linear layers packed as `model.quantization` says, with config, index and
    tokenizer; `pack` writes its parts.

    Args:
        settings: The model's.
        identity: `model_identity` of these settings.
        described: The same model in float; its weights need not be there.

    Raises:
        UserError: an architecture that is not proved with packed layers, or has layers that cannot be packed.
    """
    config, quantization = described.config(), settings.quantization
    assert quantization.bits is not None, "asked for where model.quantization says how"
    proof = require(config, Use.engine, settings.cache_dir, packed=WeightFormat[quantization.name])
    assert proof.structure is not None, "what is proved with packed layers was proved in slices"
    dtype = TORCH_DTYPES[_stored_dtype(settings)]
    made = PackedFolder(packed_path(settings, identity), config, proof.structure, quantization.bits, dtype)

    def write(folder: Path) -> None:
        try:
            replace(made, path=folder).describe()
        except ValueError as error:
            rule = f"have widths that {quantization.name} can pack"
            raise UserError(f"model must {rule}, got a {config.model_type}: {error}") from None
        for part in described.path.iterdir():
            is_described = any(map(part.match, DESCRIPTIONS)) and part.name not in (INDEX, RECORD_FILE)
            if is_described and part.is_file() and not (folder / part.name).exists():
                shutil.copyfile(part, folder / part.name)

    _written_once(made.path, settings.name, write)
    return made


def pack(
    settings: ModelSettings,
    made: PackedFolder,
    names: Collection[str],
    stored: Callable[[Collection[str] | None], ModelFolder],
) -> None:
    """Write the parts that a packed folder lacks to have these tensors. No other layer is read.

    Matrices of a GGUF file whose numbers have as many bits keep them (`lab.models.gguf.blocks`): Q4_0 and Q4_1 in an
    int4 model, Q8_0 in an int8 model and in the head of both.

    Args:
        settings: The model's.
        made: From `packed_folder`.
        names: Names in the packed folder.
        stored: Returns the folder of the same model in float with the files that hold some of its tensors, as
            `lab.models.sources.fetch` does. A GGUF file is read itself.

    Raises:
        UserError: so many packed weights do not fit into this machine's memory.
    """
    check_fits(made.count_bytes(names), torch.device("cpu"), "", SHARE)
    require_writable(made.path, "model.cache_dir")
    lock = made.path.parent / f".{made.path.name}.lock"
    with _alone(lock, f"{settings.name} is being packed by another process"):
        if not (parts := made.missing(names)):
            return
        log.info("packing %s to %s once (about 10 s for 135M parameters)", settings.name, settings.quantization.name)
        if settings.source is ModelSource.gguf:
            _pack_gguf(GgufModel(gguf_file(settings)), made, parts)
        else:
            _pack_folder(stored, made, parts)


def _pack_folder(stored: Callable[[Collection[str] | None], ModelFolder], made: PackedFolder, parts: set[str]) -> None:
    listed = stored(())
    if not listed.has_weights:  # a hub repository without an index has one file, which every part needs
        listed = stored(None)
    folder = stored(made.needed(parts, listed.files))
    options = load_options(folder.weight_format(made.config), None, torch.device("cpu"), made.dtype)
    for together in made.groups(parts, FLOATS_AT_ONCE):
        with (
            folder.lazy(folder.files) as tensors,  # opened anew: what was read can be forgotten
            folder.reading("hold a model that transformers can load", folder.path.name),
        ):
            model = made.read(together, tensors, dtype=made.dtype, **options)
        made.write(together, model)


def _pack_gguf(model: GgufModel, made: PackedFolder, parts: set[str]) -> None:
    has_head = made.ends(parts)["head"]
    blocks = GgufBlocks(model.reader, made.dtype, {made.bits, HEAD_BITS}, made.part_layers(parts), head=has_head)
    tensors, packed = _gguf_tensors(model, made.config), 0
    for together in made.groups(parts, FLOATS_AT_ONCE):
        with model.reading():
            read = made.read(together, tensors, dtype=made.dtype)
        packed += made.write(together, read, blocks.find)
    log.info("%d of %d layers keep the numbers of the GGUF file", blocks.found, packed)
    for what, kinds, wanted in zip(("layers", "head"), stored_kinds(model.reader), (made.bits, HEAD_BITS)):
        if others := sorted(kind for kind in kinds if BITS.get(kind) != wanted):
            log.info("the GGUF file stores its %s as %s: rounded to int%d", what, ", ".join(others), wanted)


def _written_once(target: Path, name: str, write: Callable[[Path], object]) -> Path:
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
        except PermissionError as error:
            raise cannot_use("model.cache_dir", lock_file, error) from None
    with suppress(OSError):  # of another user, who has done so
        share_like_parent(lock_file)
    try:
        yield
    finally:
        lock.release()
