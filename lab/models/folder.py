"""A model's folder: config.json, its weights with or without an index, tokenizer, generation_config.json.

All of it is read as transformers reads it, and a file that cannot be read is refused in one line. Only JSON and
safetensors are read; no code of a folder runs. Knows nothing about the source of a folder, or about parts of a model.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from lab.models.quantized import READ, Unreadable, WeightFormat, find_weight_format, unpacked
from lab.settings import UserError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DESCRIPTIONS = ("*.json", "*.model", "*.txt", "*.jinja")
"""Files of a model besides its weights: config, index, tokenizer, chat template."""
GENERATION = "generation_config.json"
ATTENTIONS = (None, "eager", "sdpa")
"""Permitted values of `attn_implementation` in a config; transformers would fetch others from the hub, as code."""

PROBE = "A b\n\u00e9\U0001f600"
PLACEHOLDERS = ("image_token", "audio_token", "video_token")
"""Tokens in the tokenizer of text-only models for which they have no rows: it is shared with other models (Gemma 3)."""


@dataclass(frozen=True)
class ModelFolder:
    """One folder. Every method raises UserError, which names `setting`, for anything that it cannot read."""

    path: Path
    setting: str = "model.path"
    """Setting that names the folder; errors begin with it."""

    @cached_property
    def files(self) -> dict[str, str]:
        """The weight file of each stored tensor, by the tensor's name; no other file counts.

        As in transformers: model.safetensors where there is one, else the files that the index names.
        """
        if (self.path / SINGLE).is_file():
            return dict.fromkeys(self._stored_in(SINGLE), SINGLE)
        if not self.has_weights:
            raise self._damaged("be a folder with config.json and safetensors")
        named = self._json(INDEX).get("weight_map")
        if not isinstance(named, dict) or not named or not all(_is_file_name(file) for file in named.values()):
            raise self._refused("have an index that names a file of the folder for each tensor", INDEX)
        return dict(named)

    @cached_property
    def weight_files(self) -> list[str]:
        """The files that hold its tensors, sorted; not all of them need be there while `check` was not called."""
        return sorted(set(self.files.values()))

    @property
    def has_weights(self) -> bool:
        """Whether there is a file or an index that lists its tensors."""
        return (self.path / SINGLE).is_file() or (self.path / INDEX).is_file()

    def missing_files(self) -> list[str]:
        """Weight files that the index names and the folder lacks."""
        return [file for file in self.weight_files if not (self.path / file).is_file()]

    def check(self, files: Collection[str] | None = None) -> None:
        """UserError unless config.json exists and these weight files (None: all) are whole and match the index."""
        if not (self.path / CONFIG).is_file():
            raise self._damaged("be a folder with config.json and safetensors")
        if (self.path / "adapter_config.json").exists():
            raise self._refused("be a base model alone (an adapter goes to model.adapter)", "adapter_config.json")
        for file in self.weight_files if files is None else files:
            self._tensors_in(file)

    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype (as safetensors names it) and shape of every tensor in the files that are here."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        if self.has_weights:
            for file in set(self.weight_files).difference(self.missing_files()):
                found |= self._tensors_in(file)
        return found

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Tensors mapped from their files: read from the disk when they are used."""
        by_file = defaultdict(list)
        for name in names:
            if name not in self.files:
                raise UserError(f"{self.setting} must hold the tensors of its architecture, got none named {name!r}")
            by_file[self.files[name]].append(name)
        found: dict[str, torch.Tensor] = {}
        for file, wanted in by_file.items():
            self._tensors_in(file)
            with self._open(file) as tensors:
                found |= {name: tensors.get_tensor(name) for name in wanted}
        return found

    @contextmanager
    def lazy(self, names: Collection[str]) -> Iterator[dict[str, Any]]:
        """The tensors among `names` that are here, as safetensors' slices: read only when they are used."""
        with ExitStack() as stack:
            found: dict[str, Any] = {}
            for file in self.weight_files:
                if (self.path / file).is_file():
                    self._tensors_in(file)
                    tensors = stack.enter_context(self._open(file))
                    here = set(names).intersection(tensors.keys())
                    found |= {name: tensors.get_slice(name) for name in here}
            yield found

    def config(self) -> PreTrainedConfig:
        """The config, if its architecture has a causal language model in transformers."""
        described = self._json(CONFIG)
        if "transformers_weights" in described:
            raise self._refused("have a config.json that names no weight files of its own", CONFIG)
        with self.reading("have a config.json that transformers can read", CONFIG):
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                self.path, local_files_only=True, trust_remote_code=False
            )
            text: Any = config.get_text_config(decoder=True)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise self._refused("be a causal language model", str(described.get("model_type")))
        for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
            value = getattr(text, name, None)
            if type(value) is not int or value < 1:
                raise UserError(f"{self.setting} must have a config.json with {name} at least 1, got {value!r}")
        for part in (config, text):
            if part._attn_implementation not in ATTENTIONS:
                raise self._refused("ask for no other attention than eager or sdpa", str(part._attn_implementation))
        return config

    def weight_format(self, config: PreTrainedConfig) -> WeightFormat:
        """The format of its matrices, by the config that `config` returned."""
        try:
            return find_weight_format(config, self.shapes(), self.files if self.has_weights else ())
        except Unreadable as found:
            raise UserError(f"{self.setting} must be {READ}, got {found}") from None

    def load(self, config: PreTrainedConfig, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
        """The whole model as transformers makes it; UserError for tensors that it would have to invent.

        Args:
            config: What `config` returned.
            dtype: Dtype of the computation.
            options: `lab.models.quantized.load_options`.
        """
        with self.reading("hold a model that transformers can load", self.path.name):
            model, report = cast(Any, AutoModelForCausalLM).from_pretrained(
                self.path,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
        if missing := sorted(report["missing_keys"]):
            raise UserError(f"{self.setting} must hold the tensors of its architecture, got none named {missing[0]!r}")
        assert not report["mismatched_keys"], "transformers refuses them itself"
        if getattr(model, "is_loaded_in_4bit", False) and (bare := unpacked(model)):
            raise UserError(
                f"{self.setting} must hold all 4-bit weights that its config speaks of, got none for {bare!r}"
            )
        loaded: PreTrainedModel = model
        return loaded

    def check_computes(self, model: PreTrainedModel) -> None:
        """UserError for a model that cannot compute two tokens: some configs make a model that fails only then."""
        ids = torch.zeros((1, 2), dtype=torch.long, device=model.device)
        model.train()  # in evaluation mode bitsandbytes may repack 4-bit layers, which have no gradient then
        with self.reading("hold a model that computes", self.path.name), torch.inference_mode():
            model(input_ids=ids, use_cache=True)
        model.eval()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, including the chat template; each of its ids has a row in the embedding."""
        config: Any = self.config().get_text_config(decoder=True)
        with self.reading("have a tokenizer that transformers can read", self.path.name):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.path, local_files_only=True, trust_remote_code=False
            )
            ids = tokenizer.get_vocab()
            tokenizer(PROBE)  # some find out only then that they lack a token they need
        added = tokenizer.get_added_vocab()
        if not ids.keys() - added.keys():  # transformers makes an empty one where the files are missing
            raise self._refused("have a tokenizer with a vocabulary", str(self.path))
        pictures = {getattr(tokenizer, name, None) for name in PLACEHOLDERS}
        token = max(ids.keys() - pictures, key=lambda token: ids[token])
        if ids[token] >= config.vocab_size:
            raise UserError(
                f"{self.setting} must have a row of its embedding for each id of its tokenizer, "
                f"got id {ids[token]} ({token!r}) and {config.vocab_size} rows"
            )
        return tokenizer

    def end_ids(self) -> list[int]:
        """The ids that end a text, from generation_config.json, else from the config."""
        config = self.config()
        text: Any = config.get_text_config(decoder=True)
        if (self.path / GENERATION).exists():
            self._json(GENERATION)
            with self.reading("have a generation_config.json that transformers can read", GENERATION):
                found = GenerationConfig.from_pretrained(
                    str(self.path), local_files_only=True, trust_remote_code=False
                ).eos_token_id
        else:
            found = GenerationConfig.from_model_config(config).eos_token_id
        ends = [] if found is None else found if isinstance(found, list) else [found]
        for end in ends:
            if type(end) is not int or not 0 <= end < text.vocab_size:
                raise UserError(f"{self.setting} must end texts with ids below {text.vocab_size}, got {found!r}")
        return list(dict.fromkeys(ends))

    def _json(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads((self.path / name).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise self._damaged(f"have a {name} that is JSON", str(self.path / name), error) from None
        if not isinstance(found, dict):
            raise self._refused(f"have a {name} that is a JSON object", str(self.path / name))
        return found

    def _tensors_in(self, file: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The result of `_stored_in`, checked against the index."""
        found = self._stored_in(file)
        expected = {name for name, place in self.files.items() if place == file}
        if odd := sorted(found.keys() ^ expected):
            place = self.files.get(odd[0], "no file") if odd[0] in found else "this file"
            raise UserError(
                f"{self.setting} must have an index that says what each file holds, got {str(self.path / file)!r} "
                f"{'with' if odd[0] in found else 'without'} {odd[0]!r}, which the index says is in {place}"
            )
        return found

    def _stored_in(self, file: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        with self._open(file) as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}

    @contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        place = self.path / file
        if not place.is_file():
            raise self._damaged("have all files that its index names", str(place))
        try:
            opened = safe_open(place, framework="pt")
        except Exception:  # SafetensorError, which has no public name, or what the system says
            raise self._damaged("hold whole safetensors files", str(place)) from None
        with opened as tensors:
            yield tensors

    @contextmanager
    def reading(self, rule: str, what: str) -> Iterator[None]:
        """Turn any error of transformers into a UserError of one line, and silence its other output."""
        with quietly():
            try:
                yield
            except UserError:
                raise
            except Exception as error:
                raise self._refused(rule, what, error) from None

    def _damaged(self, rule: str, got: str | None = None, error: Exception | None = None) -> UserError:
        refused = self._refused(rule, got, error)
        remedy = f": remove the folder {str(self.path)!r}, and it is made again" * (self.setting == "model.cache_dir")
        return UserError(f"{refused}{remedy}")

    def _refused(self, rule: str, got: str | None = None, error: Exception | None = None) -> UserError:
        got = str(self.path) if got is None else got
        reason = f" ({type(error).__name__}: {' '.join(str(error).split())[:200]})" if error else ""
        return UserError(f"{self.setting} must {rule}, got {got!r}{reason}")


@contextmanager
def quietly() -> Iterator[None]:
    """Silence transformers' bars and reports, such as those of tensors that a part of a model does not need."""
    transformers_logging.disable_progress_bar()  # weights are mapped, not read: its bar is over before it shows
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def write_index(folder: Path, files: Mapping[str, str], total_bytes: int) -> None:
    """Write the index of a folder: the file of each tensor, by the tensor's name."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(files)}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")


def _is_file_name(file: Any) -> bool:
    return isinstance(file, str) and file.endswith(".safetensors") and Path(file).name == file
