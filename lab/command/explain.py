"""One line for a mistake of the user: dotted key, rule, value. From the exceptions of Hydra and OmegaConf."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)

REWORDED = (
    (r"Could not override '.*?'\. .*\+(\S+?)=(.*)$", "{0} must be a group of conf/ or a setting, got {1!r}"),
    (
        r"Could not append to config\. .* at '(.*?)'.*'\+\+.*?=(.*)'",
        "{0} exists already, write it without +, got {1!r}",
    ),
    (r"Multiple values for (\S+?)\. .*: (.*)'", "{0} exists already, write it without +, got {1!r}"),
    (r"Ambiguous value for argument '(.*?)=(.*?)'", "{0} must be one value (a list is written [a,b]), got {1!r}"),
)
"""Hydra's text with its line ends as spaces, and ours."""

KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


def explain(error: HydraException) -> str:
    """One line for a Hydra error."""
    text = " ".join(str(error).split())
    if isinstance(error, MissingConfigException):
        return _missing_choice(error, text)
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override!r} must be key=value ({text.removeprefix(f'Error parsing override {error.override!r} ')})"
        )
    if cause := _from_omegaconf(error):
        file = re.match(r"In '.*?': (?=\w+ raised while composing)", text)  # the value is in a YAML file
        return (file[0] if file else "") + _describe_override(cause, text)
    if found := re.match(r"You must specify '(.*?)'.*Available options: (.*)", text):
        return f"{found[1]} must be one of {', '.join(found[2].split())}, got nothing"
    for pattern, ours in REWORDED:
        if found := re.match(pattern, text):
            return ours.format(*found.groups())
    return text


def _from_omegaconf(error: BaseException) -> OmegaConfBaseException | None:
    cause = error.__cause__ or error.__context__
    return cause if cause is None or isinstance(cause, OmegaConfBaseException) else _from_omegaconf(cause)


def _describe_override(cause: OmegaConfBaseException, text: str) -> str:
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and isinstance(cause.parent_node, DictConfig):
        value = re.search(r"\+\S+?=(.*)$", text)
        return unknown_key(str(cause.full_key), map(str, cause.parent_node), value[1] if value else str(cause.key))
    return describe(cause)


def describe(error: OmegaConfBaseException) -> str:
    """One line for an OmegaConf error: the rule is read from the annotation of the field that refused the value."""
    first = str(error.msg or error).strip().splitlines()[0]
    key = str(error.full_key or "")
    hints = get_type_hints(error.object_type) if is_dataclass(error.object_type) else {}
    if isinstance(error, InterpolationResolutionError):
        return f"{key} must not refer to what cannot be read, got: {first}"
    if isinstance(error, ValidationError) and error.key in hints:
        value = getattr(error, "value", None)
        return f"{key} must be {kind(hints[error.key])}, got {'null' if value is None else repr(value)}"
    if "does not support deletion" in first:
        return f"{key} must be set, got ~{key}"
    return first if key in first else f"{key}: {first}"


def unknown_key(key: str, known: Iterable[str], value: object) -> str:
    """The error for an unknown dotted key, with the most similar known one, or with all if none is similar."""
    parent, _, name = key.rpartition(".")
    siblings = [sibling for sibling in known if sibling not in (name, "hydra")]
    near = difflib.get_close_matches(name, siblings, n=1)
    hint = f"did you mean {f'{parent}.' if parent else ''}{near[0]}?" if near else f"there are {', '.join(siblings)}"
    return f"{key} must be a setting ({hint}), got {value!r}"


def kind(annotation: Any) -> str:
    """The values that a field accepts, in words: `an integer or null`, `one of none, nf4`."""
    arguments = get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        named = [kind(argument) for argument in arguments if argument is not NoneType]
        return " or ".join([*named, *(["null"] if NoneType in arguments else [])])
    if get_origin(annotation) is list:
        return f"a list, each {kind(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return f"one of {', '.join(annotation.__members__)}"
    if is_dataclass(annotation):
        return f"a group of settings ({', '.join(get_type_hints(annotation))})"
    return KINDS.get(annotation, str(annotation))


def _missing_choice(error: MissingConfigException, text: str) -> str:
    """`model=nope`, `--config-name nope`, or the name of a file whose settings this command does not have."""
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    if choice.startswith("base_"):  # the YAML exists, but what it extends is registered by another command
        return f"--config-name must name this command's file, got {choice.removeprefix('base_')!r}"
    if group and error.options:
        return f"{group} must be one of {', '.join(error.options)}, got {choice!r}"
    return text.partition(" Config search path:")[0]
