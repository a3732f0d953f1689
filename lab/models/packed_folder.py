"""A folder of packed layers, written part by part: only a few layers at once are in float, and a shard packs its own.

Each layer is a file; so are the embedding, what a text passes after the last layer, and the rest, which is small. The
index names the tensors of all files from the beginning. A file is written when one of its tensors is needed, as that of
a model on the hub is fetched.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from lab.files import share_like_parent
from lab.models.folder import write_index
from lab.models.packed import HEAD_BITS, METHOD, linear_layers, put_packed_layers, quantise
from lab.models.shape import ModelShape
from lab.models.slices import read_slice
from lab.models.structure import Structure

EMBEDDING, CLOSING, REST = "embedding", "closing", "rest"

Own = Callable[[Tensor, int], tuple[Tensor, Tensor] | None]
"""Returns the numbers and scales that a weight (N x K) was made from, where they are known and have so many bits."""


@dataclass(frozen=True)
class PackedFolder:
    """A folder that `from_pretrained` reads with its linear layers packed.

    A tied head becomes a matrix of its own, since an embedding is looked up in float.
    """

    path: Path
    config: PreTrainedConfig
    """The config of the model in float."""
    structure: Structure
    bits: int
    """8 or 4."""
    dtype: torch.dtype
    """What all tensors that are not packed are stored in."""

    def describe(self) -> None:
        """Write config and index.

        Raises:
            ValueError: a layer whose inputs are no multiple of the group.
        """
        places = {name: f"{part}.safetensors" for name, part in self._parts.items()}
        total = sum(tensor.nbytes for tensor in self._outline.state_dict().values())
        write_index(self.path, places, total)
        config: Any = copy.deepcopy(self.config)
        for part in (config, config.get_text_config(decoder=True)):
            part.tie_word_embeddings = False
        config.dtype, config.quantization_config = self.dtype, {"quant_method": METHOD, "bits": self.bits}
        config.save_pretrained(self.path)

    def missing(self, names: Collection[str] | None = None) -> set[str]:
        """The parts that hold these tensors (None: all) and are not written yet."""
        parts = {part for name, part in self._parts.items() if names is None or name in names}
        return {part for part in parts if not self.file(part).exists()}

    def count_bytes(self, names: Collection[str]) -> int:
        """Size of some of its tensors, written or not."""
        return sum(tensor.nbytes for name, tensor in self._outline.state_dict().items() if name in names)

    def read(self, parts: Collection[str], tensors: Mapping[str, Any], **placement: Any) -> PreTrainedModel:
        """The layers and modules of parts, in float.

        Args:
            parts: Which ones: one of `groups`.
            tensors: The model in float by its stored names, or what these parts need of it, read when it is used.
            placement: As `read_slice` takes it.
        """
        layers = self.part_layers(parts)
        between = range(min(layers), max(layers) + 1) if layers else range(0)
        structure = replace(self.structure, unused=[]) if REST in parts else self.structure
        needed = {name: tensors[name] for name in self.needed(parts, tensors)}
        return read_slice(self.config, needed, structure, between, **self.ends(parts), **placement)

    def write(self, parts: Collection[str], model: PreTrainedModel, own: Own = lambda weight, bits: None) -> int:
        """Write parts; each file is there as a whole or not at all.

        Args:
            parts: Which ones.
            model: What `read` returned for them.
            own: Where numbers are known already.

        Returns:
            The number of layers that were packed.
        """
        found: dict[str, dict[str, Tensor]] = {part: {} for part in parts}
        for name, value in model.state_dict().items():
            if (part := self._parts.get(name)) in found:
                found[part][name] = value.to(self.dtype).contiguous()
        packed, head = 0, model.get_output_embeddings()
        for name, layer in linear_layers(model).items():
            if (part := self._parts[f"{name}.weight"]) in found:
                bits, weight_NK = HEAD_BITS if layer is head else self.bits, layer.weight
                weight_NK = weight_NK if isinstance(layer, nn.Linear) else weight_NK.t().contiguous()
                made = own(weight_NK, bits) or quantise(weight_NK, bits)
                found[part][f"{name}.weight"], found[part][f"{name}.scales"] = made
                packed += 1
        for part, its_tensors in found.items():
            begun = self.file(f".{part}")
            try:
                save_file(its_tensors, begun, metadata={"format": "pt"})
                share_like_parent(begun)
                begun.replace(self.file(part))
            finally:
                begun.unlink(missing_ok=True)  # of a disk that is full
        return packed

    def needed(self, parts: Collection[str], names: Collection[str]) -> set[str]:
        """Those of the stored names of the model in float that parts may need."""
        if REST in parts and self.structure.unused:  # it has their tensors, too, whatever their names look like
            return set(names)
        ties = ModelShape.of(self.config).is_tied
        return self.structure.stored_names(names, self.part_layers(parts), ties=ties, **self.ends(parts))

    def groups(self, parts: Collection[str], most_bytes: int) -> Iterator[list[str]]:
        """Parts to write together: each end alone, and neighbouring layers of at most `most_bytes` in float."""
        yield from ([part] for part in (REST, EMBEDDING, CLOSING) if part in parts)
        sizes: dict[str, int] = defaultdict(int)
        for name, tensor in self._outline.state_dict().items():
            sizes[self._parts[name]] += 8 * tensor.numel()  # at most: two numbers of a byte have 4 bytes each in float
        layers = sorted(self.part_layers(parts))
        together: list[str] = []
        for layer in layers:
            part = _layer_part(layer)
            is_next = _layer_part(layer - 1) in together
            if together and not (is_next and sum(sizes[one] for one in (*together, part)) <= most_bytes):
                yield together
                together = []
            together.append(part)
        if together:
            yield together

    def part_layers(self, parts: Collection[str]) -> set[int]:
        """The numbers of the layers among parts."""
        return {int(part.rpartition("-")[2]) for part in parts if part not in (EMBEDDING, CLOSING, REST)}

    def ends(self, parts: Collection[str]) -> dict[str, bool]:
        """Whether embedding and head are among parts, as `read_slice` asks."""
        return {"embedding": EMBEDDING in parts, "head": CLOSING in parts}

    def file(self, part: str) -> Path:
        """The file of a part, written or not."""
        return self.path / f"{part}.safetensors"

    @cached_property
    def _outline(self) -> PreTrainedModel:
        """The packed model without its numbers."""
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                self.config, dtype=self.dtype, trust_remote_code=False
            )
            put_packed_layers(model, self.bits)
        return model

    @cached_property
    def _parts(self) -> dict[str, str]:
        """The part of each tensor."""
        return {name: self._part_of(name) for name in self._outline.state_dict()}

    def _part_of(self, name: str) -> str:
        layer = self.structure.layer_of(name)
        if layer is not None:
            return _layer_part(layer)
        if name.startswith(f"{self.structure.embedding}."):
            return EMBEDDING
        return CLOSING if any(name.startswith(f"{part}.") for part in self.structure.closing) else REST


def _layer_part(layer: int) -> str:
    return f"layer-{layer:05}"


def pack_model(model: PreTrainedModel, structure: Structure, folder: Path, bits: int, dtype: torch.dtype) -> None:
    """Write a model that is in memory as a packed folder, layer by layer; the arguments are those of `PackedFolder`."""
    made, tensors = PackedFolder(folder, model.config, structure, bits, dtype), model.state_dict()
    made.describe()
    for together in made.groups(made.missing(), most_bytes=0):
        made.write(together, made.read(together, tensors, dtype=dtype))
