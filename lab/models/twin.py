"""A twin of a model: a small model of the same architecture with random weights, for trials.

A twin keeps all settings that decide how the architecture computes (kinds of layers, rotary embeddings, head sizes,
multipliers) and shrinks those that only decide its size (layers of the same kind, heads, experts, widths, the
vocabulary). Windows and the lengths at which rotary frequencies change are shrunk too, so that a text of a few dozen
tokens exceeds them.
"""

import copy
import re
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

VOCABULARY = 96
CONTEXT = 128
"""`max_position_embeddings` of a twin."""
WINDOW = 8
TRAINED = 40
"""Length of a text at which rotary frequencies change, if they depend on it."""
MOST_LAYERS = 8
MOST_LAYERS_OF_A_MODEL = 10_000
MOST_PARAMETERS = 60_000_000
"""Limit of a twin's size: the trial of a larger one would take too long."""
_HEADS = 4
_WIDTH = 64
"""Sizes of a twin are this or a small multiple of it: bitsandbytes wants multiples of 64 on a CPU."""

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "depth")
_FEED_FORWARD = re.compile(r"intermediate|ffn|inner|dff|mlp_dim|feed_forward.*(size|dim)")
_EXPERTS = re.compile(r"experts?(?!.*(tok|group|shared|top|per))")
_SIZES = re.compile(r"size|dim|embd|d_model|width")
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length")
_WINDOWS = ("sliding_window", "window_size", "attention_chunk_size", "index_topk", "keep_window_size")
_DENSE = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")


class NoTwin(ValueError):
    """No small model can be made from a config; the message says why."""


def twin_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of a small model of the same architecture."""
    twin = copy.deepcopy(config)
    text: Any = twin.get_text_config(decoder=True)
    for part in {id(part): part for part in (*_parts(twin), text)}.values():
        _shrink(part, layers=_layers_of_twin(part) if part is text else 1)
        if hasattr(part, "quantization_config"):
            del part.quantization_config  # how a checkpoint is stored is not the architecture's
    return twin


def twin_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model of `twin_config(config)` in float32 in which every weight has an effect: none is zero or one, or
    negligible compared with others.

    Raises:
        NoTwin: transformers makes no model, or a large one, from the small config.
    """
    try:
        small = twin_config(config)
        with torch.device("meta"):
            numbers = sum(weight.numel() for weight in _from_config(small).parameters())
        if numbers > MOST_PARAMETERS:
            raise NoTwin(f"its smallest twin has {numbers} parameters, at most {MOST_PARAMETERS} are tried")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _from_config(small)
            _randomise(model)
    except NoTwin:
        raise
    except Exception as error:  # every architecture has checks of its own
        reason = " ".join(str(error).split())[:200]
        raise NoTwin(f"transformers makes no small model of its config ({type(error).__name__}: {reason})") from None
    return cast(PreTrainedModel, model.eval())


def _from_config(config: PreTrainedConfig) -> PreTrainedModel:
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    return cast(PreTrainedModel, made)


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.normal_(std=weight.shape[-1] ** -0.5)
        elif weight.is_floating_point():
            weight.add_(torch.randn_like(weight) * (0.2 if "norm" in name.lower() else 0.1))


def _parts(config: Any) -> list[Any]:
    """A config and those within it, of towers for images and the like."""
    found = [config]
    for name in getattr(type(config), "sub_configs", None) or {}:
        part = _value(config, name)
        if isinstance(part, PreTrainedConfig):
            found += _parts(part)
    return found


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # a value that differs by layer raises an error of its own
        return None


def _number(config: Any, *names: str) -> int | None:
    """The first of these values that is a whole number."""
    values = (_value(config, name) for name in names)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)


def _layers_of_twin(config: Any) -> int:
    """Number of layers that has every kind of layer, and one behind the last new kind."""
    count = _number(config, *_LAYERS)
    if count is None:
        return 4
    if count > MOST_LAYERS_OF_A_MODEL:
        raise NoTwin(f"its config has {count} layers, at most {MOST_LAYERS_OF_A_MODEL} are looked at")
    lists = [value for value in config.to_dict().values() if isinstance(value, list) and len(value) == count]
    kinds = [tuple(str(value[index]) for value in lists) for index in range(count)]
    newest = max(kinds.index(kind) for kind in set(kinds)) if kinds else 0
    dense = max((_number(config, name) or 0 for name in _DENSE), default=0)
    return min(count, MOST_LAYERS, max(4, newest + 2, dense + 2))


def _shrink(config: Any, layers: int) -> None:
    count = _number(config, *_LAYERS)
    sizes = _Sizes(config)
    differing = config.to_dict().get("per_layer_config") or {}
    if differing:  # values that single layers have: of a layer that the twin has, too
        config.per_layer_config = None
    for name, value in list(vars(config).items()):
        if name.startswith("_") or value is None or isinstance(value, bool):
            continue
        small = sizes.smaller(name, value)
        if isinstance(value, list) and count and len(value) == count:
            small = value[:layers]
        elif name in _LAYERS and isinstance(value, int):
            small = min(value, layers)
        if small != value:
            setattr(config, name, small)
    if differing:
        config.per_layer_config = {
            number: {name: sizes.smaller(name, value) for name, value in values.items()}
            for number, values in differing.items()
            if int(number) < layers
        }


class _Sizes:
    """The sizes of one config, and what they become. Heads become fewer, not smaller: a head's size is part of how
    rotary embeddings work; the hidden size follows."""

    def __init__(self, config: Any) -> None:
        self.heads = _number(config, "num_attention_heads") or 0
        self.hidden = _number(config, "hidden_size") or 0
        head_size = _number(config, "head_dim") or (self.hidden // self.heads if self.heads else 0)
        self.few_heads = min(self.heads, _HEADS if head_size <= 2 * _WIDTH else 2)
        is_whole = self.heads and self.hidden % self.heads == 0
        self.small_hidden = self.hidden // self.heads * self.few_heads if is_whole else min(self.hidden, 2 * _WIDTH)
        if _number(config, "head_dim"):  # then the hidden size is free, and packed layers take groups of 32 inputs
            self.small_hidden = min(self.hidden, -(-self.small_hidden // 32) * 32)
        self.experts = max(8, 2 * (_number(config, "n_group") or 1), 2 * (_number(config, "num_experts_per_tok") or 1))

    def smaller(self, name: str, value: Any) -> Any:
        """The value of a config's key in a twin."""
        if isinstance(value, dict) and "rope" in name:
            return {key: self.smaller("rope" if isinstance(part, dict) else key, part) for key, part in value.items()}
        if isinstance(value, list) and name.endswith("token_id"):
            return [token % VOCABULARY for token in value]
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        if name.endswith(("token_id", "token_index")):
            return value % VOCABULARY
        if "vocab" in name and value > VOCABULARY:
            return VOCABULARY
        if name == "original_max_position_embeddings":
            return TRAINED
        for names, limit in ((_POSITIONS, CONTEXT), (_WINDOWS, WINDOW)):
            if name in names:
                return min(value, limit)
        return self._narrower(name, value)

    def _narrower(self, name: str, value: int) -> int:
        if _FEED_FORWARD.search(name):
            return min(value, _WIDTH)
        if _EXPERTS.search(name):
            return min(value, self.experts)
        if "heads" in name or name in ("n_head", "n_head_kv"):
            return self._fewer(value)
        return self.small_hidden if value == self.hidden and _SIZES.search(name) else value

    def _fewer(self, value: int) -> int:
        """Heads in proportion, but never a single one where there were several."""
        if not self.heads or self.heads <= self.few_heads:
            return value
        return max(min(value, 2), value * self.few_heads // self.heads)
