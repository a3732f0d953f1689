"""The grid: words of the command line and axes become cells, each a whole composition of its command's settings."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf

from lab.entry import compose_config, literal_prompt
from lab.explain import explain
from lab.matrix.settings import SweepSettings
from lab.settings import UserError, digest

SWEEPS_OWN = ("matrix", "hydra", "tracking")
CELLS_OWN = ("project", "prompt", "prompt_file")
QUIET = ("tracking=none", "tracking.progress=false")
"""A sweep tracks its cells itself: nothing else is to run beside what is measured."""


@dataclass(frozen=True)
class Words:
    """The words of a command line, by who reads them."""

    asked: list[str]
    """All of them, as they were typed."""
    sweep: list[str]
    """Hydra's, `matrix.*` and `tracking.*`; with them what both read: model, seed, network, device."""
    cells: list[str]
    axes: dict[str, list[str]]
    """`key=a,b,c` by key, as one word a value."""


@dataclass(frozen=True)
class Cell:
    """One point of the grid."""

    point: dict[str, Any]
    """Its value on each axis."""
    words: list[str]
    """What its command is told, as one would type it."""
    settings: dict[str, Any]
    """Everything that comes of these."""

    def signature(
        self, settings: SweepSettings, repeat: int, sources: str, device: str, contents: Mapping[str, str]
    ) -> str:
        """Sixteen hex digits over all that its figures depend on; `contents`: of the files that its settings name."""
        signed = {"command": settings.command, "settings": without(self.settings, settings.unsigned)}
        return digest(signed | {"repeat": repeat, "sources": sources, "device": device, "contents": dict(contents)})


def sort_words(arguments: Sequence[str]) -> Words:
    """Whose is which word. UserError for one that Hydra cannot read."""
    parser, words = OverridesParser.create(), Words(list(arguments), [], [], {})
    for argument in arguments:
        root = re.split(r"[=.@]", argument.lstrip("+~"), maxsplit=1)[0]
        if argument.startswith("-") or root in SWEEPS_OWN:
            words.sweep.append(argument)
            continue
        if root not in ("prompt", "prompt_file") and (values := _sweep_values(parser, argument)):
            words.axes[argument.partition("=")[0]] = values
            continue
        words.cells.append(f"prompt={sys.stdin.read()}" if argument == "prompt=-" else argument)
        if root not in CELLS_OWN:
            words.sweep.append(argument)
    return words


def _sweep_values(parser: OverridesParser, word: str) -> list[str] | None:
    """The values of `key=a,b,c` as words, None for one that is no sweep."""
    try:
        (override,) = parser.parse_overrides([word])
    except OverrideParseException as error:
        raise UserError(explain(error)) from None
    if not override.is_sweep_override():
        return None
    key = word.partition("=")[0]
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def axes_of(settings: SweepSettings, words: Words) -> dict[str, list[str]]:
    """The words of every axis by key: the preset's, but for those that the command line replaces or fixes.

    UserError for an axis without a value, and for more cells than are allowed.
    """
    fixed = {word.lstrip("+").partition("=")[0] for word in words.cells}
    axes = {key: [as_word(key, value) for value in values] for key, values in settings.axes.items()}
    axes = {key: values for key, values in axes.items() if key not in fixed} | words.axes
    for key, values in axes.items():
        if not values:
            raise UserError(f"matrix.axes.{key} must have at least one value, got []")
    count = math.prod(map(len, axes.values()))
    if count > settings.max_cells:
        raise UserError(f"matrix.max_cells must be at least the {count} cells of this grid, got {settings.max_cells}")
    return axes


def as_word(key: str, value: Any) -> str:
    """`key=value` as one would type it for Hydra."""
    return f"{key}={value if key == 'prompt' else _typed(value)}"


def _typed(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value if re.fullmatch(r"[\w./:-]+", value) else json.dumps(value, ensure_ascii=False)
    return f"[{','.join(map(_typed, value))}]" if isinstance(value, list) else str(value)


def make_cells(settings: SweepSettings, words: Words) -> list[Cell]:
    """Every point of the grid, the last axis fastest. UserError for a key or value that the command does not take."""
    try:
        importlib.import_module(settings.command)  # registers its settings
    except ModuleNotFoundError as error:
        raise UserError(f"matrix.command must be a module, got {settings.command!r} ({error})") from None
    return list(_cells(settings, words, axes_of(settings, words)))


def _cells(settings: SweepSettings, words: Words, axes: dict[str, list[str]]) -> Iterator[Cell]:
    for values in itertools.product(*axes.values()):
        told = [*settings.overrides, *words.cells, *values]
        config = compose_config(settings.config, literal_prompt([*told, *QUIET]))
        plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True, enum_to_str=True)  # type: ignore[assignment]  # its roots are names
        point = {key: _value_at(plain, key, word) for key, word in zip(axes, values)}
        yield Cell(point, told, plain)


def _value_at(settings: dict[str, Any], key: str, word: str) -> Any:
    """The value as the command has it; of a group (`model=random`) its name."""
    found = look_up(settings, key.lstrip("+"))
    return word.partition("=")[2] if found is None or isinstance(found, dict) else found


def look_up(document: Any, key: str) -> Any:
    """The value at a dotted key, None where there is none; `losses.-1` is the last of a list."""
    for name in key.split("."):
        if isinstance(document, list) and re.fullmatch(r"-?\d+", name):
            document = document[int(name)] if -len(document) <= int(name) < len(document) else None
        else:
            document = document.get(name) if isinstance(document, dict) else None
    return document


def without(settings: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """A copy that lacks some dotted keys."""
    below = {key: [rest for name, _, rest in (k.partition(".") for k in keys) if name == key] for key in settings}
    return {
        key: without(value, below[key]) if isinstance(value, dict) else value
        for key, value in settings.items()
        if "" not in below[key]
    }
