"""A composed config as typed settings: every mistake in it is a UserError with dotted key, rule and value.

Only this module and its callers in lab.command see a DictConfig.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from lab.command.explain import KINDS, describe, kind, unknown_key
from lab.settings import LabSettings, UserError

Settings = TypeVar("Settings", bound=LabSettings)

LONGEST_SECONDS = 2_000_000
"""Longest wait that a setting can ask for: sockets count in 31 bits of milliseconds."""


def to_settings(config: DictConfig, settings_type: type[Settings]) -> Settings:
    """Typed settings from a composed config; UserError with dotted key, rule and value when one is out of range."""
    with _in_one_line():
        values = _values(config)
        _check_roots(values, get_type_hints(settings_type))
        return settings_type(**values)


def check_rules(config: DictConfig) -> None:
    """UserError, as from `to_settings`, for a value out of range: for callers without the command's settings type."""
    with _in_one_line():
        values, schema = _values(config), OmegaConf.get_type(config)
        if isinstance(schema, type) and issubclass(schema, LabSettings):
            _check_roots(values, get_type_hints(schema))
            schema(**values)


def _values(config: DictConfig) -> dict[str, Any]:
    for node in _structured_nodes(config):
        _check_lists(node)
        _convert(node)
    return {str(key): _convert(value) if isinstance(value, DictConfig) else value for key, value in config.items()}


@contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key or _missing_key(error)} must be set, got ???") from None
    except OmegaConfBaseException as error:
        raise UserError(describe(error)) from None
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(str(error)) from None


def _check_roots(values: dict[str, Any], roots: dict[str, Any]) -> None:
    for key, value in values.items():
        if key not in roots:  # "+bogus=1"
            raise UserError(unknown_key(key, roots, value))
    for root, expected in roots.items():
        if root not in values:
            raise UserError(f"{root} must be set, got ~{root}")
        if root == "project" and not isinstance(values[root], expected):
            raise UserError(f"--config-name must name this command's file, got one with {type(values[root]).__name__}")


def _missing_key(error: MissingMandatoryValue) -> str:
    """The field's name in OmegaConf's `... missing mandatory value: name`."""
    return str(error).splitlines()[0].rsplit(": ", 1)[-1]


def _structured_nodes(node: DictConfig) -> Iterator[DictConfig]:
    """Nodes with a settings type, children before parents, so that the innermost dotted path is reported."""
    for key in node:
        group = node._get_node(key)
        if isinstance(group, DictConfig) and group._is_interpolation():  # whatever it refers to, it is not a group
            raise UserError(f"{group._get_full_key(None)} must be a group of settings, got {group._value()}")
        if not OmegaConf.is_missing(node, key) and isinstance(node[key], DictConfig):
            yield from _structured_nodes(node[key])
            yield node[key]


def _check_lists(node: DictConfig) -> None:
    """UserError for a list of texts or numbers that is none, or holds lists or groups: OmegaConf lets these in."""
    for name, hint in get_type_hints(OmegaConf.get_type(node)).items():
        if get_origin(hint) is not list or get_args(hint)[0] not in KINDS or OmegaConf.is_missing(node, name):
            continue
        if not isinstance(node[name], ListConfig) or any(map(OmegaConf.is_config, node[name])):
            raise UserError(f"{node._get_full_key(name)} must be {kind(hint)}, got {node[name]}")


def _convert(node: DictConfig) -> Any:
    path = str(node._get_full_key(None))
    try:
        converted = OmegaConf.to_object(node)
    except MissingMandatoryValue as error:
        raise UserError(f"{path}.{_missing_key(error)} must be set, got ???") from None
    except OmegaConfBaseException:
        raise
    except ValueError as error:
        raise UserError(f"{path}.{error}") from None
    if is_dataclass(converted):
        known = [field.name for field in fields(converted)]
        for name, value in vars(converted).items():
            if name not in known:  # "+project.bogus=1": Hydra accepts it, but no code would read it
                raise UserError(unknown_key(f"{path}.{name}", known, value))
            _check_numbers(f"{path}.{name}", value)
    return converted


def _check_numbers(key: str, value: Any) -> None:
    """UserError for numbers beyond 64 bits, which sockets, clocks and allocators do not accept."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_numbers(key, item)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key} must be finite, got {value}")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(f"{key} must be in [-2**63, 2**63), got {value}")
    elif isinstance(value, float) and not -1e30 <= value <= 1e30:
        raise UserError(f"{key} must be in [-1e30, 1e30], got {value:g}")
    elif isinstance(value, int | float) and key.endswith("_seconds") and value > LONGEST_SECONDS:
        raise UserError(f"{key} must be at most {LONGEST_SECONDS} (23 days), got {value:g}")


def texts_by_key(config: DictConfig, path: str = "") -> dict[str, str]:
    """Every text value of a config that may be a path, by its dotted key; not the prompt."""
    found: dict[str, str] = {}
    for key in map(str, config):
        try:
            value = config[key]
        except OmegaConfBaseException:  # missing, or a reference to nothing
            continue
        if isinstance(value, DictConfig):
            found |= texts_by_key(value, f"{path}{key}.")
        elif isinstance(value, str) and value and f"{path}{key}" != "prompt":
            found[f"{path}{key}"] = value
    return found
