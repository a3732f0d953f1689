"""The structure of an architecture, observed while a small twin of it runs: which modules are its blocks, what a block
returns, which modules a text never passes. Nothing is derived from names.
"""

import re
from collections.abc import Collection, Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from lab.models.shape import ModelShape


class Unsliceable(ValueError):
    """A model cannot be cut between its layers; the message says why."""


@dataclass(frozen=True)
class Structure:
    """The modules of a causal language model that matter for its slices."""

    blocks: str
    """The name of the list of layers, such as `model.layers` or `transformer.h`."""
    outputs: int
    """Shape of a layer's output: 0 for the hidden states alone, else the length of a tuple that begins with them."""
    embedding: str
    head: str
    embedding_size: int
    """Size of a row of the embedding; not always the hidden size (OPT)."""
    closing: list[str]
    """Modules with weights that a text passes after the last layer, such as a final norm; the head is one of them."""
    unused: list[str]
    """Modules that a text never passes through, such as the tower of an image model."""

    def layer_of(self, name: str) -> int | None:
        """The layer of a tensor or module, by its name in the whole model; None outside of the layers."""
        if not name.startswith(f"{self.blocks}."):
            return None
        return int(name[len(self.blocks) + 1 :].partition(".")[0])

    def stored_names(
        self, names: Collection[str], layers: Container[int], *, embedding: bool, head: bool, ties: bool
    ) -> set[str]:
        """Names of the tensors of a checkpoint that a slice may need: all but those of other layers, of ends that it
        lacks, and of modules that no text passes.

        Stored names are not always the model's own, so only tensors that are certainly not needed are left out.
        """
        number = re.compile(rf"(?:^|\.){re.escape(self.blocks.rpartition('.')[2])}\.(\d+)\.")
        ends = {self.embedding: embedding or (head and ties), self.head: head or (embedding and ties)}
        absent = [re.escape(name.rpartition(".")[2]) for name, is_needed in ends.items() if not is_needed]
        of_ends = re.compile(rf"(?:^|\.)(?:{'|'.join(absent) or '(?!)'})\.\w+$")
        passed = [*self.unused, *(() if head else (name for name in self.closing if name != self.head))]
        return {
            name
            for name in names
            if not ((found := number.search(name)) and int(found[1]) not in layers)
            and not of_ends.search(name)
            and not name.startswith(tuple(f"{module}." for module in passed))
        }


@dataclass
class _Call:
    at: int
    """Number of modules that had ended before it."""
    name: str
    hidden: Tensor | None
    output: Any


@torch.inference_mode()
def find_structure(model: PreTrainedModel) -> Structure:
    """Run a model over a few tokens and record the calls of its modules.

    Args:
        model: A small one, with weights.

    Raises:
        Unsliceable: no list with one module per layer is called in order, with hidden states as input and output.
    """
    embedding, head = _name_of(model, model.get_input_embeddings()), _name_of(model, model.get_output_embeddings())
    if embedding is None or head is None:
        raise Unsliceable("the model does not say which modules are its embedding and its head")
    calls, called = _watch(model)
    layers, hidden_size, *_ = ModelShape.of(model.config)
    for blocks in _lists(model, layers):
        passed = [call for call in calls if call.name.rpartition(".")[0] == blocks]
        if [call.name.rpartition(".")[2] for call in passed] != [str(number) for number in range(layers)]:
            continue
        if any(call.hidden is None or call.hidden.dim() != 3 or call.hidden.shape[2] != hidden_size for call in passed):
            raise Unsliceable(f"hidden states between its layers are not of the shape batch x tokens x {hidden_size}")
        outputs = {len(call.output) if isinstance(call.output, tuple) else 0 for call in passed}
        if len(outputs) != 1:
            raise Unsliceable("its layers do not all return the same number of things")
        table: Any = model.get_submodule(embedding)
        size = int(getattr(table, "embedding_dim", 0) or table.weight.shape[-1])
        closing = [name for name, at in called.items() if at > passed[-1].at and _has_own_weights(model, name)]
        return Structure(blocks, outputs.pop(), embedding, head, size, closing, _unused(model, called, blocks))
    raise Unsliceable(f"it has no list of {layers} layers that a text passes through one after the other")


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str | None:
    return next((name for name, module in model.named_modules() if module is wanted and name), None)


def _lists(model: nn.Module, length: int) -> list[str]:
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == length
    ]


def _has_own_weights(model: nn.Module, name: str) -> bool:
    return any(True for _ in model.get_submodule(name).parameters(recurse=False))


def _watch(model: PreTrainedModel) -> tuple[list[_Call], dict[str, int]]:
    """The calls of members of lists, in order, and all modules that were called, with their place in the order."""
    calls: list[_Call] = []
    called: dict[str, int] = {}
    handles = []
    in_lists = {
        f"{name}.{number}"
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for number in range(len(module))
    }
    for name, module in model.named_modules():

        def note(_: nn.Module, arguments: Any, options: Any, output: Any, name: str = name) -> None:
            called[name] = len(called)
            if name in in_lists:
                first = arguments[0] if arguments else options.get("hidden_states")
                calls.append(_Call(called[name], name, first if isinstance(first, Tensor) else None, output))

        handles.append(module.register_forward_hook(note, with_kwargs=True))
    try:
        any_model: Any = model
        any_model(input_ids=torch.arange(1, 9, device=model.device)[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls, called


def _unused(model: nn.Module, called: Collection[str], blocks: str) -> list[str]:
    """The outermost modules with tensors that no forward pass of a text called, nor anything within them."""
    found: list[str] = []
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        is_within = any(name.startswith(f"{outer}.") for outer in (*found, blocks))
        if not name or name == blocks or is_within or (parent and parent not in called and f"{parent}." not in name):
            continue
        has_tensors = any(True for _ in (*module.parameters(), *module.buffers()))
        runs = any(other == name or other.startswith(f"{name}.") for other in called)
        if has_tensors and not runs and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            found.append(name)
    return found
