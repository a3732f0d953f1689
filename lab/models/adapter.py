"""A PEFT adapter on a model or on a slice of its layers, as PEFT itself reads it.

PEFT first builds the adapter on a twin of the whole model without weights. The twin shows which modules are wrapped,
with which rank and scale, and which tensors the folder must have; every shard alike refuses a folder of another model.
Then the slice gets PEFT's own modules, as far as it has the modules that they wrap, and their tensors are read.

A slice names its modules as the whole model does; a module that it lacks has no parameters.
"""

import copy
import json
import logging
import math
import typing
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import cast_adapter_dtype
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from lab.models.peft_folder import (
    IDENTITY_KEY,
    RECORD_FILE,
    RECORDS,
    TENSORS_FILE,
    check_base,
    find_folder,
    read_fields,
)
from lab.models.slices import cut_of
from lab.models.sources import load_config, model_identity
from lab.settings import ModelSettings, UserError

log = logging.getLogger(__name__)

PREFIX = "base_model.model."
"""Before the name of every tensor in a PEFT file."""
NAME = "default"
"""Name of the adapter within the names of its modules; PEFT's files leave it out."""

_FOLLOWED = frozenset(
    {
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"),
        *("modules_to_save", "trainable_token_indices", "fan_in_fan_out", "init_lora_weights", "lora_dropout"),
    }
)
"""Keys of a config that are followed, whatever they say. Those that are neither here nor in RECORDS must be unset."""
_NEED_FLOAT = ("modules_to_save", "use_dora", "target_parameters")
"""Keys of a config that replace weights of the base, or need them in float."""
_INITIALISATIONS = (True, False, "gaussian", "orthogonal")
"""Others change the weights of the base, which no adapter folder holds."""


@dataclass(frozen=True, kw_only=True)
class AdapterFolder:
    """A PEFT folder: its config and the shapes of its tensors."""

    place: Path
    setting: str
    """Setting that names the folder, for messages."""
    fields: Mapping[str, Any]
    """Values of PEFT's config."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shapes of the tensors, by their names in the file."""

    def config(self) -> LoraConfig:
        """PEFT's config, a new one each time: PEFT writes into it."""
        known = {name: copy.deepcopy(value) for name, value in self.fields.items() if name in _types()}
        try:
            with _logging_each_warning_once(self.setting):
                return LoraConfig(**known | {"inference_mode": True})
        except Exception as error:  # PEFT's checks raise a dozen kinds
            raise self.misfit(_one_line(error)) from None

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of the file, by name."""
        with safe_open(self.place / TENSORS_FILE, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}

    def misfit(self, reason: str) -> UserError:
        """The UserError for an adapter that does not fit the base model."""
        return UserError(f"{self.setting} must fit the base model, got {str(self.place)!r} ({reason})")


def read_adapter(folder: str | Path, setting: str = "model.adapter") -> AdapterFolder:
    """The adapter in a PEFT folder; its tensors are not read yet.

    Raises:
        UserError: missing or broken files, or an unsupported kind of adapter, by name.
    """
    place = find_folder(folder, setting)
    found = read_fields(place, setting)
    _check_fields(found, place, setting)
    try:
        with safe_open(place / TENSORS_FILE, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except Exception as error:  # of safetensors, or of the system
        raise UserError(
            f"{setting} must hold a whole {TENSORS_FILE}, got {str(place)!r} ({_one_line(error)})"
        ) from None
    if strange := [name for name in shapes if not name.startswith(PREFIX)]:
        raise UserError(f"{setting} must name its tensors {PREFIX}..., got {strange[0]!r} in {str(place)!r}")
    return AdapterFolder(place=place, setting=setting, fields=found, shapes=shapes)


def _check_fields(found: Mapping[str, Any], place: Path, setting: str) -> None:
    """UserError for unsupported keys, and for values that PEFT's own types do not allow."""
    if found.get("peft_type") != "LORA":
        raise UserError(f"{setting} must have peft_type=LORA, got {found.get('peft_type')!r} in {str(place)!r}")
    if found.get("task_type") not in (None, "CAUSAL_LM"):
        raise UserError(f"{setting} must have task_type=CAUSAL_LM, got {found['task_type']!r} in {str(place)!r}")
    kinds, unset = _types(), _unset()
    for name, value in found.items():
        if name in _FOLLOWED or name in RECORDS:
            try:
                msgspec.convert(value, kinds[name])
            except msgspec.ValidationError as error:
                raise UserError(f"{setting} must have a {name} of PEFT's type, got {value!r} ({error})") from None
        elif value is not None and value is not False and value != unset.get(name):
            raise UserError(
                f"{setting} must not set {name}, which is not supported here, got {value!r} in {str(place)!r}"
            )
    if found.get("init_lora_weights", True) not in _INITIALISATIONS:
        raise UserError(
            f"{setting} must have init_lora_weights of {', '.join(map(str, _INITIALISATIONS))} (others need a base "
            f"with changed weights, which is not in the folder), got {found['init_lora_weights']!r} in {str(place)!r}"
        )


@cache
def _types() -> dict[str, Any]:
    """Types of the keys of a config, as PEFT declares them."""
    looser = {"lora_alpha": float, "init_lora_weights": bool | str, "peft_type": str, "task_type": str | None}
    return typing.get_type_hints(LoraConfig) | looser


@cache
def _unset() -> dict[str, Any]:
    """Default values of the keys of a config."""
    plain = LoraConfig()
    return {field.name: getattr(plain, field.name) for field in fields(LoraConfig)}


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Modules and tensors of an adapter in a model, by the names of the whole model."""

    config: LoraConfig
    modules: list[str]
    """Linear modules with a LoRA."""
    parameters: list[str]
    """Parameters with a LoRA that belong to no linear module, such as fused experts."""
    saved: list[str]
    """Modules that the adapter replaces."""
    tokens: list[str]
    """Embeddings of which the adapter replaces rows."""
    scales: dict[str, float]
    """Factor of each product B A."""
    shapes: dict[str, tuple[int, ...]]
    """Shapes of the trained tensors, by their names in a PEFT file."""
    shared: dict[str, str]
    """Base weights that the file holds under another name only, with that name: a tied head is the embedding."""


def fit_adapter(adapter: AdapterFolder, whole: PreTrainedConfig) -> Fit:
    """The fit of an adapter to a model of config `whole`.

    Raises:
        UserError: modules or tensors that are unknown, missing or of another shape.
    """
    try:
        with _logging_each_warning_once(adapter.setting):
            twin, fit = _on_twin(adapter.config(), whole)
            metas = {name: torch.empty(shape, device="meta") for name, shape in adapter.shapes.items()}
            loaded = _load(twin, metas)
    except UserError:
        raise
    except KeyError as error:  # a saved module without its tensors
        raise adapter.misfit(f"{error.args[0]} is missing") from None
    except Exception as error:  # PEFT's and torch's answers to modules that are none, to other shapes
        raise adapter.misfit(_one_line(error)) from None
    ours = {name for name, weight in twin.named_parameters() if weight.requires_grad or ".lora_" in name}
    if odd := sorted({*loaded.unexpected_keys, *(ours & set(loaded.missing_keys))}):
        # PEFT drops unknown tensors and leaves missing ones as they were, both without an error
        raise adapter.misfit(f"{len(odd)} tensors are unknown or missing, {_in_file(odd[0])} first")
    for name, scale in fit.scales.items():
        if not math.isfinite(scale):
            raise adapter.misfit(f"the scale of {name} is {scale}")
    fit.shared.update(_shared(twin, set(loaded.missing_keys)))
    return fit


def fit_config(config: LoraConfig, whole: PreTrainedConfig) -> Fit:
    """The fit of an adapter without tensors yet. Raises what PEFT raises."""
    with quiet_peft():
        return _on_twin(config, whole)[1]


def _on_twin(config: LoraConfig, whole: PreTrainedConfig) -> tuple[PreTrainedModel, Fit]:
    config = copy.deepcopy(config)
    config.inference_mode = False  # so that what the adapter trains is marked
    config.init_lora_weights = True
    if config.ensure_weight_tying:
        raise ValueError("ensure_weight_tying is not supported here")
    with torch.device("meta"):
        twin: Any = AutoModelForCausalLM.from_config(whole, trust_remote_code=False)
    tuner = LoraModel(twin, config, NAME)
    wrappers = {
        name: type(module) for name, module in twin.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)
    }
    fit = Fit(
        config=config,
        modules=list(tuner.targeted_module_names),
        parameters=list(tuner.targeted_parameter_names),
        saved=[name for name, kind in wrappers.items() if kind is ModulesToSaveWrapper],
        tokens=[name for name, kind in wrappers.items() if kind is not ModulesToSaveWrapper],
        scales={name: module.scaling[NAME] for name, module in twin.named_modules() if isinstance(module, LoraLayer)},
        shapes={name: tuple(weight.shape) for name, weight in trained_weights(twin).items()},
        shared={},
    )
    return twin, fit


def _shared(twin: torch.nn.Module, missing: set[str]) -> dict[str, str]:
    """Parameters that share memory with another one, if the file holds only the other one."""
    same: dict[int, list[str]] = {}
    for name, weight in twin.named_parameters(remove_duplicate=False):
        same.setdefault(id(weight), []).append(name)
    found: dict[str, str] = {}
    for names in same.values():
        stored = [name for name in names if name not in missing]
        found |= {name: stored[0] for name in names if stored and name in missing}
    return found


def inject_adapter(model: PreTrainedModel, fit: Fit, *, trainable: bool, dropout: float = 0.0) -> None:
    """Add PEFT's modules of an adapter, still without tensors, to a model or a slice of it.

    Raises:
        UserError: rows of a tied embedding on a slice that has one of the two copies.
    """
    is_whole = all(_is_here(model, name) for name in (*fit.modules, *fit.saved, *fit.tokens))
    if fit.tokens and getattr(model.config, "tie_word_embeddings", False) and not is_whole:
        raise UserError("model.adapter must not have trainable_token_indices where a tied model is split")
    config = copy.deepcopy(fit.config)
    config.inference_mode = not trainable
    config.lora_dropout = dropout
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.target_modules = [name for name in fit.modules if _is_here(model, name)] or DUMMY_TARGET_MODULES
    config.target_parameters = [name for name in fit.parameters if _is_here(model, name)] or None
    config.modules_to_save = [name for name in fit.saved if _is_here(model, name)] or None
    if not any(_is_here(model, name) for name in fit.tokens):
        config.trainable_token_indices = None
    elif isinstance(config.trainable_token_indices, dict):
        here = [name for name in fit.tokens if _is_here(model, name)]
        config.trainable_token_indices = {
            key: rows
            for key, rows in config.trainable_token_indices.items()
            if any(f".{n}".endswith(f".{key}") for n in here)
        }
    with quiet_peft(), torch.random.fork_rng(devices=[]):
        LoraModel(model, config, NAME)
    cast_adapter_dtype(model, NAME)


def put_adapter(model: PreTrainedModel, adapter: AdapterFolder, fit: Fit) -> None:
    """Read a slice's part of an adapter into the modules that `inject_adapter` gave it."""
    names = [name for name in adapter.shapes if _is_here(model, name.removeprefix(PREFIX))]
    with quiet_peft():
        loaded = _load(model, adapter.tensors(names))
    assert not loaded.unexpected_keys, f"{loaded.unexpected_keys[0]} is in the slice"
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, stored in fit.shared.items():
            if name in weights and stored not in weights:
                weights[name].copy_(adapter.tensors([PREFIX + stored])[PREFIX + stored])


def add_adapter(model: PreTrainedModel, settings: ModelSettings) -> None:
    """Put `model.adapter`, where it is set, on a model or on a slice of it, frozen.

    PEFT's modules stay separate from the weights: merging in 16 bits would round the adapter away.

    Raises:
        UserError: what `read_adapter` and `fit_adapter` refuse, and an adapter that was trained on another base model.
    """
    if settings.adapter is None:
        return
    adapter = read_adapter(settings.adapter)
    check_base(adapter.place, model_identity(settings))
    _check_packed(adapter, settings)
    fit = fit_adapter(adapter, load_config(settings))
    inject_adapter(model, fit, trainable=False)
    put_adapter(model, adapter, fit)
    _unwrap_saved(model)
    model.requires_grad_(False).eval()


def _check_packed(adapter: AdapterFolder, settings: ModelSettings) -> None:
    """UserError for an adapter that PEFT would merge into the numbers of packed layers, or compute from them."""
    found = [key for key in _NEED_FLOAT if adapter.fields.get(key)]
    if settings.quantization.bits is not None and found:
        raise UserError(
            f"model.quantization must be none or nf4 for an adapter with {found[0]}={adapter.fields[found[0]]}, "
            f"got {settings.quantization.name}"
        )


def _load(model: torch.nn.Module, tensors: Mapping[str, Tensor]) -> Any:
    """Copy tensors into PEFT's modules. Returns PEFT's report."""
    bare = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    return set_peft_model_state_dict(model, bare, adapter_name=NAME)


def _unwrap_saved(model: torch.nn.Module) -> None:
    """Put modules that the adapter replaces in the place of the base's own."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, module.modules_to_save[NAME])


def write_adapter(
    folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor], base: str, identity: str, **record: Any
) -> None:
    """Write a PEFT folder on the base model `base` of this identity, with more fields of its `RECORD_FILE`."""
    config.base_model_name_or_path, config.inference_mode = base, True
    for name in ("target_modules", "exclude_modules"):
        if isinstance(found := getattr(config, name), set):  # the order of a set differs between processes
            setattr(config, name, sorted(found))
    config.save_pretrained(str(folder))
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / TENSORS_FILE, metadata={"format": "pt"})
    text = json.dumps({IDENTITY_KEY: identity, **record}, indent=2) + "\n"
    (folder / RECORD_FILE).write_text(text, encoding="utf-8")


def trained_weights(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The trainable weights of a model with an adapter, by their names in a PEFT file."""
    stored = get_peft_model_state_dict(model, state_dict=model.state_dict(keep_vars=True), save_embedding_layers=False)
    found = {f"{PREFIX}{name}": weight for name, weight in stored.items() if weight.requires_grad}
    count = sum(weight.requires_grad for weight in model.parameters())
    assert len(found) == count, f"PEFT's file has {len(found)} of {count} trainable weights"
    return found


def _is_here(model: torch.nn.Module, name: str) -> bool:
    """Whether a slice holds a module or tensor of the whole model."""
    if hasattr(model, "cut") and not cut_of(model).owns(f"{name}."):  # the dot: it may be a module's name
        return False
    module = model
    for part in name.split("."):
        child = module._modules.get(part)
        if child is None:
            return True
        if next(child.parameters(), None) is None:
            return False
        module = child
    return True


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence PEFT's warnings; those about an adapter were logged when it was fitted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _logging_each_warning_once(setting: str) -> Iterator[None]:
    """PEFT's warnings, each once, in the log."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for text in dict.fromkeys(_one_line(warning.message) for warning in caught):
        if "is_gradient_checkpointing" not in text:  # PEFT 0.21 asks transformers 5.23 a question under its old name
            log.warning("%s: %s", setting, text)


def _in_file(name: str) -> str:
    """The name in a PEFT file of a model's weight."""
    return PREFIX + name.removeprefix(PREFIX).replace(f".{NAME}.", ".").removesuffix(f".{NAME}")


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]
