"""Model folders with one thing wrong, against what transformers itself makes of them.

    python -m tests.folder_fuzz 1500

Each input is a good folder of one of a few families, changed in one place: a file missing, cut, empty or of another
kind, a key of config.json gone or of another value. The lab must load the same model as transformers (to the bit: ids
of the tokenizer, ends, logits), or refuse in one line where transformers makes something up; it must never raise
anything but `UserError`, and never succeed where transformers does not.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from lab.command.entry import compose_settings
from lab.models.conversion import byte_tokenizer
from lab.models.folder import GENERATION
from lab.models.sources import end_ids_of, load_model
from lab.settings import ModelSettings, UserError
from split.plan import own_architecture
from split.settings import SplitSettings
from tests.random_models import VOCABULARY, random_model

IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 89]])
TEXT = "The quick brown fox <eos> é"
FAMILIES = ("llama", "qwen2", "gemma2")
FILES = (
    "config.json", "generation_config.json", "model.safetensors.index.json", "model-1", "tokenizer.json",
    "tokenizer_config.json",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 10**9, 1.5, -0.0, float("nan"), float("inf"), "", "x", "llama", [], [1], [[]],
    {}, {"a": 1}, "é" * 50, [None] * 4, "full_attention", "silu", "float16", "bfloat16",
)  # fmt: skip
KEYS = (
    "auto_map", "quantization_config", "compression_config", "transformers_weights", "attn_implementation",
    "_attn_implementation", "experts_implementation", "rope_parameters", "rope_scaling", "sliding_window",
    "layer_types", "text_config", "tokenizer_class", "num_key_value_heads", "pruned_heads", "torch_dtype",
    "is_encoder_decoder", "use_cache", "output_attentions", "partial_rotary_factor", "attention_bias", "mlp_bias",
    "hidden_activation",
)  # fmt: skip
QUANTISATIONS: tuple[Any, ...] = (
    {"quant_method": "gptq", "bits": 4}, {"quant_method": "fp8"}, {"quant_method": "awq"}, {"quant_method": 3},
    {"quant_method": "compressed-tensors"}, {"load_in_8bit": True}, {"load_in_4bit": True}, {"quant_method": "mxfp4"},
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"quant_method": "nobody"},
)  # fmt: skip


@dataclass
class Found:
    """What came of the inputs."""

    inputs: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """A model that was loaded, by what can be seen of it."""

    logits_BTV: torch.Tensor
    prompt: list[int]
    ends: list[int]

    def same(self, other: Outcome) -> bool:
        """To the bit; NaN is NaN."""
        return (self.prompt, self.ends) == (other.prompt, other.ends) and torch.equal(
            self.logits_BTV.nan_to_num(nan=1e30), other.logits_BTV.nan_to_num(nan=1e30)
        )


def fuzz_folders(count: int, seed: int) -> Found:
    """`count` folders, each changed once."""
    found, dice = Found(), random.Random(seed)
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    with tempfile.TemporaryDirectory() as place:
        good = {family: good_folder(family, Path(place) / family) for family in FAMILIES}
        for number in range(count):
            family = dice.choice(FAMILIES)
            folder = Path(place) / f"changed-{number}"
            shutil.copytree(good[family], folder)
            what = f"{family}: {change(folder, dice)}"
            outcome, fault = judge(folder, Path(place))
            found.inputs += 1
            found.outcomes[outcome] += 1
            if "-v" in sys.argv and outcome.startswith("refused what"):
                print(what, "->", _ours(folder, Path(place)))
            if fault:
                found.faults.append(f"input {number}, {what}: {fault}")
            shutil.rmtree(folder)
    return found


def good_folder(family: str, folder: Path, shard: str = "60KB", **sizes: Any) -> Path:
    """A random model in several files, with a byte tokenizer and an end of its own."""
    model: Any = random_model(family, torch.float32, tie_word_embeddings=family == "gemma2", **sizes)
    model.generation_config.eos_token_id = [256]
    model.save_pretrained(folder, max_shard_size=shard)
    byte_tokenizer().save_pretrained(folder)
    return folder


def change(folder: Path, dice: random.Random) -> str:
    """Changes one thing, and says which."""
    if dice.random() < 0.4:
        return _change_file(folder, dice)
    name = dice.choice(["config.json"] * 6 + ["generation_config.json", "tokenizer_config.json", "tokenizer.json"])
    return _change_key(folder / name, dice)


def _change_file(folder: Path, dice: random.Random) -> str:
    name = dice.choice(FILES)
    if name == "model-1":
        name = dice.choice(sorted(file.name for file in folder.glob("*.safetensors")))
    file, kind = folder / name, dice.choice(["missing", "cut", "empty", "other", "folder", "flipped", "swapped"])
    data = file.read_bytes()
    file.unlink()
    if kind == "cut":
        file.write_bytes(data[: dice.randrange(len(data))])
    elif kind == "empty":
        file.touch()
    elif kind == "other":
        file.write_bytes(
            dice.choice([b"{}", b"[]", b"null", b"\x80\x04K\x01.", b"version https://git-lfs", b"\xff" * 99])
        )
    elif kind == "folder":
        file.mkdir()
    elif kind == "flipped":
        at = dice.randrange(len(data))
        file.write_bytes(data[:at] + bytes([data[at] ^ (1 << dice.randrange(8))]) + data[at + 1 :])
    elif kind == "swapped":
        file.write_bytes(dice.choice(sorted(other for other in folder.iterdir() if other.is_file())).read_bytes())
    return f"{name} {kind}"


def _change_key(file: Path, dice: random.Random) -> str:
    described = json.loads(file.read_text())
    key = dice.choice([*described, *(KEYS if file.name == "config.json" else ())])
    if dice.random() < 0.15:
        described.pop(key, None)
        value: Any = "(gone)"
    else:
        value = described[key] = dice.choice([*VALUES, *(QUANTISATIONS * 2 if key == "quantization_config" else ())])
    file.write_text(json.dumps(described))
    return f"{file.name} {key}={str(value)[:60]}"


def judge(folder: Path, cache: Path) -> tuple[str, str | None]:
    """What came of a folder, and what is wrong with that."""
    ours, theirs = _ours(folder, cache), _theirs(folder)
    if isinstance(ours, UserError):
        line = str(ours)
        if "\n" in line or not line.startswith("model"):
            return "refused", f"not one line that begins with its key: {line!r}"
        return ("refused" if isinstance(theirs, Exception) else "refused what transformers loads"), None
    if isinstance(ours, Exception):
        return "raised", f"{type(ours).__name__}: {str(ours)[:300]}"
    if isinstance(theirs, Exception):
        return "succeeded", f"transformers does not load it: {type(theirs).__name__}: {str(theirs)[:300]}"
    if not ours.same(theirs):
        return "succeeded", f"another model: {ours.prompt} {ours.ends} instead of {theirs.prompt} {theirs.ends}"
    return "the same", None


def _ours(folder: Path, cache: Path) -> Outcome | Exception:
    try:
        settings = replace(_base(), path=str(folder), cache_dir=str(cache))
        own_architecture(settings)
        loaded = load_model(settings, torch.device("cpu"))
        return Outcome(_logits(loaded.model), list(loaded.tokenizer(TEXT)["input_ids"]), end_ids_of(settings))
    except Exception as error:
        return error


@functools.cache
def _base() -> ModelSettings:
    words = "model.source=path model.path=nowhere model.quantization=none model.dtype=float32"
    return compose_settings("split_inf", words, SplitSettings).model


def _theirs(folder: Path) -> Outcome | Exception:
    """transformers' own; an error where it invents weights, or has a vocabulary that is empty or too large."""
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True, output_loading_info=True,
            use_safetensors=True,
        )  # fmt: skip
        if report["missing_keys"]:
            raise ValueError(f"it would invent {min(report['missing_keys'])}")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        ids = tokenizer(TEXT)["input_ids"]
        if not ids or max(tokenizer.get_vocab().values()) >= VOCABULARY:
            raise ValueError("a vocabulary that does not fit")
        return Outcome(_logits(model), list(ids), _ends(model, folder))
    except Exception as error:
        return error


def _ends(model: Any, folder: Path) -> list[int]:
    if (folder / GENERATION).is_file():
        found = GenerationConfig.from_pretrained(str(folder)).eos_token_id
    else:
        found = AutoConfig.from_pretrained(folder).eos_token_id
    return [] if found is None else found if isinstance(found, list) else [found]


def _logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(IDS).logits
    return logits


def rows(found: Found) -> Iterator[str]:
    """The figures as lines."""
    yield f"{found.inputs} inputs: {dict(found.outcomes)}"
    yield from found.faults


if __name__ == "__main__":
    torch.set_num_threads(1)
    report = fuzz_folders(int(sys.argv[1]), seed=int(sys.argv[2]) if len(sys.argv) > 2 else 1)
    print("\n".join(rows(report)))
    sys.exit(bool(report.faults))
