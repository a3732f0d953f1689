"""A slice of a model: layers `first` to `last` - 1 of it, as a model of its own that computes what they compute.

A slice is the whole architecture without most of its tensors. Its list of layers has the full length, so that anything
that depends on a layer's number is as in the whole model; all other layers are stand-ins without tensors. The stand-in
right before the slice returns the hidden states that arrived, and so discards the work of the model between its
embedding and its first layer; the stand-in right after the slice takes the hidden states and ends the forward pass.
transformers itself reads the tensors, with its knowledge of their names and kinds.

Shapes: B sequences, T positions, H hidden size, E size of an embedding's row, V vocabulary.
"""

import copy
from collections.abc import Mapping
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.quantizers.base import get_keys_to_not_convert

from lab.models.structure import Structure
from lab.settings import UserError


class Cut:
    """The parts that a slice holds, and the hidden states that enter it."""

    def __init__(self, layers: range, structure: Structure, *, embedding: bool, head: bool) -> None:
        self.layers, self.structure = layers, structure
        self.embedding, self.head = embedding, head
        self.is_tied = False
        """Whether embedding and head are one matrix in the whole model."""
        self.entering_BTH: Tensor | None = None

    def owns(self, name: str) -> bool:
        """Whether a weight, by its name in the whole model, is this slice's to train.

        Modules before the layers are in every slice, since the model passes through them, but belong to the first.
        """
        layer = self.structure.layer_of(name)
        if layer is not None:
            return layer in self.layers
        closes = any(name.startswith(f"{module}.") for module in self.structure.closing)
        return self.head if closes else self.embedding


class _SliceEnd(Exception):
    """The forward pass has reached the end of the slice."""

    def __init__(self, hidden_BTH: Tensor) -> None:
        super().__init__()
        self.hidden_BTH = hidden_BTH


class _AbsentLayer(nn.Module):
    """A stand-in for a layer that is not in the slice; passes its input on."""

    def __init__(self, layer: nn.Module, cut: Cut) -> None:
        super().__init__()
        # What models ask of a layer from outside: its kind of attention, for one.
        self.__dict__.update(
            {name: value for name, value in vars(layer).items() if isinstance(value, (bool, int, float, str))}
        )
        self._cut = cut

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Return the hidden states in the form in which the architecture's layers return theirs."""
        return self._returned(arguments[0] if arguments else options["hidden_states"])

    def _returned(self, hidden_BTH: Tensor) -> Any:
        outputs = self._cut.structure.outputs
        return (hidden_BTH, *[None] * (outputs - 1)) if outputs else hidden_BTH


class _EntryLayer(_AbsentLayer):
    """The stand-in before the slice: brings in the hidden states from there."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Return the hidden states that arrived."""
        assert self._cut.entering_BTH is not None, "hidden states must be given to a slice that does not begin a model"
        return self._returned(self._cut.entering_BTH)


class _ExitLayer(_AbsentLayer):
    """The stand-in after the slice."""

    def forward(self, *arguments: Any, **options: Any) -> NoReturn:
        """End the forward pass with the hidden states of the slice's last layer."""
        raise _SliceEnd(arguments[0] if arguments else options["hidden_states"])


class _NoEmbedding(nn.Module):
    """A stand-in for an embedding that the slice lacks; its output is discarded before the slice's first layer."""

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self._cut = cut
        self.embedding_dim = cut.structure.embedding_size

    @property
    def weight(self) -> Tensor:
        """A tensor with the dtype and device of the hidden states: models ask an embedding's weight for both."""
        assert self._cut.entering_BTH is not None, "hidden states must be given to a slice that does not begin a model"
        return self._cut.entering_BTH.detach()

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return zeros, B x T x E."""
        return self.weight.new_zeros(*ids_BT.shape, self.embedding_dim)


def cut_of(model: nn.Module) -> Cut:
    """The `Cut` of a slice that `read_slice` made."""
    return cast(Cut, cast(Any, model).cut)


def run_slice(model: nn.Module, states: Tensor, *, without_head: bool = False, **options: Any) -> Tensor:
    """A forward pass through a slice.

    Args:
        model: From `read_slice`, with an adapter on it or not.
        states: Token ids B x T where the slice begins the model, else hidden states B x T x H.
        without_head: Leave out the slice's head, for a pass that only fills the cache.
        options: Other arguments of the model, such as `position_ids` and `past_key_values`.

    Returns:
        Logits B x K x V from a slice with the head, else hidden states B x T x H for the next slice. Without the head,
        the output of the model's decoder.
    """
    cut = cut_of(model)
    if cut.layers.start == 0:
        ids_BT = states
    else:
        cut.entering_BTH = states
        ids_BT = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
    try:
        if without_head:
            decoder = cast(Any, model).get_decoder()
            return cast(Tensor, decoder(input_ids=ids_BT, **options).last_hidden_state)
        output = model(input_ids=ids_BT, **options)
    except _SliceEnd as left:
        return left.hidden_BTH
    finally:
        cut.entering_BTH = None
    return cast(Tensor, output.logits)


def read_slice(
    config: PreTrainedConfig,
    tensors: Mapping[str, Any],
    structure: Structure,
    layers: range,
    *,
    embedding: bool,
    head: bool,
    **placement: Any,
) -> PreTrainedModel:
    """A slice with its tensors.

    Args:
        config: The whole model's.
        tensors: The whole checkpoint by its stored names, or at least what the slice needs of it; those of other
            layers are not touched, so that lazy ones (safetensors' slices) cost nothing.
        structure: The architecture's.
        layers: Which layers.
        embedding, head: Whether the slice has them. It has all other modules outside of the layers, which are small.
        placement: `dtype`, `device_map`, `quantization_config`: as `from_pretrained` takes them.

    Raises:
        UserError: the checkpoint lacks a tensor of the slice, or has another shape for it.
    """
    cut = Cut(layers, structure, embedding=embedding, head=head)
    own = copy.deepcopy(config)
    ties = [part for part in (own, own.get_text_config(decoder=True)) if getattr(part, "tie_word_embeddings", False)]
    if not (embedding or head):
        for part in ties:
            part.tie_word_embeddings = False
    if "quantization_config" in placement or getattr(own, "quantization_config", None) is not None:
        placement = _keeping_what_the_whole_keeps(own, placement)
    model, found = _sliced_class(config, cut, keeps_both=bool(ties) and (embedding or head)).from_pretrained(
        None,
        config=own,
        state_dict=dict(tensors),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused here, by name
        local_files_only=True,
        trust_remote_code=False,
        **placement,
    )
    missing, mismatched = sorted(found["missing_keys"]), sorted(found["mismatched_keys"])
    if missing:
        raise UserError(f"model.path must hold the tensors of its architecture, got none named {missing[0]!r}")
    if mismatched:
        raise UserError(f"model.path must hold tensors of its config's shapes, got another for {mismatched[0][0]!r}")
    table, top = model.get_submodule(structure.embedding), model.get_submodule(structure.head)
    cut.is_tied = bool(ties) and (embedding or head) and cast(Any, table).weight is cast(Any, top).weight
    _take_out_ends(model, cut)
    model.cut = cut
    return cast(PreTrainedModel, model.requires_grad_(False).eval())


def _keeping_what_the_whole_keeps(config: Any, placement: dict[str, Any]) -> dict[str, Any]:
    """The placement with which a slice leaves the same modules unquantised as the whole model.

    transformers derives them from a model's last weight and its head, which differ in a slice. `config` is changed.
    """
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    kept = get_keys_to_not_convert(whole)
    stored, wanted = getattr(config, "quantization_config", None), placement.get("quantization_config")
    if isinstance(stored, dict):
        name = "llm_int8_skip_modules" if "load_in_4bit" in stored else "modules_to_not_convert"
        config.quantization_config = stored | {name: stored.get(name) or kept}
    if isinstance(wanted, BitsAndBytesConfig) and wanted.llm_int8_skip_modules is None:
        wanted = copy.deepcopy(wanted)
        wanted.llm_int8_skip_modules = kept
        return placement | {"quantization_config": wanted}
    return placement


def _sliced_class(config: PreTrainedConfig, cut: Cut, *, keeps_both: bool) -> Any:
    """The architecture's class, but its models lose all modules outside of the slice before any tensor is read.

    `keeps_both`: keep embedding and head while tensors are read: transformers compares them to see whether they are
    tied.
    """
    whole: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]

    class Sliced(whole):  # type: ignore[misc]  # a class that is known when it runs
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            structure, blocks = cut.structure, self.get_submodule(cut.structure.blocks)
            for number, layer in enumerate(blocks):
                if number not in cut.layers:
                    blocks[number] = _stand_in(number, layer, cut)
            left_out = structure.unused if cut.head else [*structure.unused, *structure.closing]
            for name in left_out:
                if name != structure.head:
                    self.set_submodule(name, nn.Identity())
            if not keeps_both:
                _take_out_ends(self, cut)

    Sliced.__name__, Sliced.__qualname__, Sliced.__module__ = whole.__name__, whole.__qualname__, whole.__module__
    return Sliced


def _stand_in(number: int, layer: nn.Module, cut: Cut) -> nn.Module:
    if number == cut.layers.start - 1:
        return _EntryLayer(layer, cut)
    return _ExitLayer(layer, cut) if number == cut.layers.stop and not cut.head else _AbsentLayer(layer, cut)


def _take_out_ends(model: nn.Module, cut: Cut) -> None:
    structure = cut.structure
    if not cut.embedding:
        model.set_submodule(structure.embedding, _NoEmbedding(cut))
    if not cut.head:
        model.set_submodule(structure.head, nn.Identity())
