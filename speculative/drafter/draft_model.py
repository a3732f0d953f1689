"""The model that `project.draft.model` names: a YAML of `conf/model` or of the user's own, a folder, a file, a hub id.

Settings are built directly, not as overrides for Hydra to parse: a folder may have any name.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import conf
from lab.command.explain import describe
from lab.device import best_dtype
from lab.models.architecture import as_described, own_name
from lab.settings import Dtype, ModelSettings, ModelSource, Quantization, UserError
from speculative.settings import TargetRoleSettings

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def draft_model(settings: TargetRoleSettings, device: torch.device) -> ModelSettings:
    """The model that `project.draft.model` names, in `project.draft.dtype` and `.quantization` or those of its YAML.

    Raises:
        UserError: nothing of that name, or a YAML that describes no model.
    """
    draft = settings.project.draft
    name = str(draft.model)
    files = [file for folder in _folders() if (file := folder / "model" / f"{name}.yaml").is_file()]
    model = _of_yaml(files[0], name) if files else _of_place(name, settings.model)
    model = replace(
        model,
        cache_dir=settings.model.cache_dir,
        dtype=draft.dtype or model.dtype,
        quantization=draft.quantization or model.quantization,
    )
    if model.dtype is Dtype.auto:
        model = replace(model, dtype=best_dtype(device))
    return as_described(model)


def _folders() -> list[Path]:
    """Folders of our own YAML files and of `--config-dir`, in the order in which Hydra searches them."""
    own = [Path(conf.__file__).parent]
    if not HydraConfig.initialized():
        return own
    sources = HydraConfig.get().runtime.config_sources
    return [*own, *(Path(source.path) for source in sources if source.schema == "file")]


def _of_yaml(file: Path, name: str) -> ModelSettings:
    """A YAML file, completed by what `conf/main.yaml` gives to every model."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(ModelSettings), _shared(), OmegaConf.load(file))
        return cast(ModelSettings, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise UserError(f"project.draft.model {name}: {describe(error)}") from None
    except ValueError as error:
        raise UserError(f"project.draft.model {name}: model.{error}") from None
    except Exception as error:  # an error of the YAML parser
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"project.draft.model {name} must be a YAML file that can be read, got: {reason}") from None


def _of_place(name: str, target: ModelSettings) -> ModelSettings:
    path = Path(name).expanduser()
    here = replace(
        target,
        repo=None,
        revision=None,
        path=None,
        package=None,
        wheel=None,
        adapter=None,
        source=ModelSource.random,
        quantization=Quantization.none,
        dtype=Dtype[str(_shared().dtype)],
    )
    if path.is_dir():
        found = replace(here, source=ModelSource.path, path=str(path.absolute()))
    elif path.is_file():
        found = replace(here, source=ModelSource.gguf, path=str(path.absolute()))
    elif _HUB_ID.fullmatch(name):
        found = replace(here, source=ModelSource.hub, repo=name)
    else:
        known = sorted({file.stem for folder in _folders() for file in (folder / "model").glob("*.yaml")})
        raise UserError(
            f"project.draft.model must be one of {', '.join(known)}, a folder, a GGUF file or a hub repository, "
            f"got {name!r}"
        )
    return replace(found, name=own_name(found))


def _shared() -> DictConfig:
    """The values that all models share."""
    return cast(DictConfig, OmegaConf.load(Path(conf.__file__).parent / "main.yaml").model)
