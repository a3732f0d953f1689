"""The grid: overrides of the command line and axes become cells, each with the complete settings of its command."""

import importlib
import itertools
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lab.command.entry import compose_config, literal_prompt
from lab.command.explain import describe, explain
from lab.command.overrides import override, parse_options, quoted
from lab.command.streams import read_stdin
from lab.command.typed import check_rules
from lab.settings import UserError, digest
from matrix.settings import SweepSettings

log = logging.getLogger(__name__)

SWEEPS_OWN = ("matrix", "hydra", "tracking")
CELLS_OWN = ("project", "prompt", "prompt_file")
QUIET = ("tracking=none", "tracking.progress=false")
"""A sweep tracks its cells itself: nothing else may run while they are measured."""


@dataclass(frozen=True)
class CommandLine:
    """The overrides of a command line, by reader."""

    asked: list[str]
    """All of them, as typed."""
    sweep: list[str]
    """Hydra's options, `matrix.*` and `tracking.*`; and those that cells read too: model, seed, network, device."""
    cells: list[str]
    axes: dict[str, list[str]]
    """`key=a,b,c` by key (without `+`), as one override per value."""


@dataclass(frozen=True)
class Cell:
    """One point of the grid."""

    point: dict[str, Any]
    """Its value on each axis."""
    words: list[str]
    """Overrides of its command, as typed on a command line."""
    settings: dict[str, Any]
    """The complete settings that these overrides give."""

    def signature(
        self, settings: SweepSettings, repeat: int, sources: str, device: str, contents: Mapping[str, str]
    ) -> str:
        """Sixteen hex digits over all that figures depend on; `contents`: digests of files that the settings name."""
        signed = {"command": settings.command, "settings": without(self.settings, settings.unsigned)}
        return digest(signed | {"repeat": repeat, "sources": sources, "device": device, "contents": dict(contents)})


def sort_overrides(arguments: Sequence[str]) -> CommandLine:
    """Sort overrides by reader. UserError for one that Hydra cannot parse, and for an axis that is given twice."""
    parser, command_line = OverridesParser.create(), CommandLine(list(arguments), [], [], {})
    options = parse_options(arguments)
    if options.config_dir is not None:  # the only one of Hydra's options that changes a cell
        command_line.cells.append(override("hydra.searchpath", [f"file://{Path(options.config_dir).absolute()}"]))
    for argument in arguments:
        root = re.split(r"[=.@]", argument.lstrip("+~"), maxsplit=1)[0]
        if argument not in options.overrides or root in SWEEPS_OWN:
            command_line.sweep.append(argument)
            continue
        if root not in ("prompt", "prompt_file"):
            argument = _as_hydra_reads_it(parser, argument)
            if values := _sweep_values(parser, argument):
                _check_given_once(argument, command_line)
                command_line.axes[_key(argument)] = values
                continue
        _check_given_once(argument, command_line, among=command_line.axes)
        command_line.cells.append(f"prompt={read_stdin()}" if argument == "prompt=-" else argument)
        if root not in CELLS_OWN:
            command_line.sweep.append(argument)
    return command_line


def _key(word: str) -> str:
    return word.lstrip("+").partition("=")[0]


def _check_given_once(word: str, command_line: CommandLine, among: Mapping[str, Any] | None = None) -> None:
    """UserError for an axis and another override of the same key: one of them would have no effect."""
    known = {_key(cell) for cell in command_line.cells} | set(command_line.axes) if among is None else among
    if _key(word) in known:
        raise UserError(f"{_key(word)} must be given once where it is an axis, got {word!r}, too")


def _as_hydra_reads_it(parser: OverridesParser, word: str) -> str:
    """The override, with its value in quotes if Hydra would misread it: an accent, a space, a bracket.

    A value with a comma stays as it is: it may be one text or several values.
    """
    key, equals, value = word.partition("=")
    try:
        parser.parse_overrides([word])
    except OverrideParseException:
        if equals and "," not in value:
            return f"{key}={quoted(value, interpolate=True)}"
    return word


def _sweep_values(parser: OverridesParser, word: str) -> list[str] | None:
    """The values of `key=a,b,c`, each as an override; None for an override with one value."""
    try:
        (parsed,) = parser.parse_overrides([word])
    except OverrideParseException as error:
        raise UserError(explain(error)) from None
    if not parsed.is_sweep_override():
        return None
    key = word.partition("=")[0]
    return [f"{key}={value}" for value in parsed.sweep_string_iterator()]


def axes_of(settings: SweepSettings, command_line: CommandLine) -> dict[str, list[str]]:
    """The overrides of every axis by key: the preset's, except those that the command line replaces or fixes.

    UserError for an axis without a value, and for more cells than are allowed.
    """
    fixed = {_key(word) for word in command_line.cells}
    axes = {key: [as_word(key, value) for value in values] for key, values in settings.axes.items()}
    axes = {key: values for key, values in axes.items() if key not in fixed} | command_line.axes
    for key, values in axes.items():
        if not values:
            raise UserError(f"matrix.axes.{key} must have at least one value, got []")
    count = math.prod(map(len, axes.values()))
    if count > settings.max_cells:
        raise UserError(f"matrix.max_cells must be at least the {count} cells of this grid, got {settings.max_cells}")
    return axes


def as_word(key: str, value: Any) -> str:
    """`key=value` as typed for Hydra."""
    plain = isinstance(value, str) and re.fullmatch(r"[a-zA-Z_/][\w./:-]*", value) and value.lower() not in _NO_TEXT
    return f"{key}={value}" if plain or key == "prompt" else override(key, value)


_NO_TEXT = ("null", "true", "false", "nan", "inf")
"""Texts that Hydra reads as another type unless they are in quotes."""


def make_cells(settings: SweepSettings, command_line: CommandLine) -> list[Cell]:
    """Every point of the grid, the last axis fastest; equal values (1 and 1.0, 32 and "32") give one cell.

    UserError for a key or value that the command does not accept.
    """
    try:
        if hasattr(importlib.import_module(settings.command), "__path__"):  # one of the two registers its settings
            importlib.import_module(f"{settings.command}.__main__")
    except (ImportError, ValueError, TypeError) as error:  # the last two of names such as `` and `.x`
        raise UserError(f"matrix.command must be a module, got {settings.command!r} ({error})") from None
    axes, cells, refused = axes_of(settings, command_line), dict[str, Cell](), dict[str, UserError | None]()
    for values in itertools.product(*axes.values()):
        config = compose_config(
            settings.config, literal_prompt([*settings.overrides, *command_line.cells, *values, *QUIET])
        )
        refusal = _refusal(config)
        for word in (*values, ""):  # "": the whole grid
            refused[word] = refused.get(word, refusal) if refusal else None
        try:
            plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True, enum_to_str=True)  # type: ignore[assignment]  # its top-level keys are names
        except OmegaConfBaseException as error:  # an interpolation refers to no key
            raise refusal or UserError(describe(error)) from None
        point = {key: _value_at(plain, key, word) for key, word in zip(axes, values)}
        cells.setdefault(identity(point), Cell(point, [*settings.overrides, *command_line.cells, *values], plain))
    for refusal in refused.values():
        if refusal is not None:  # no cell with this value could run
            raise refusal
    if len(cells) < (asked := math.prod(map(len, axes.values()))):
        log.warning("%d cells of this grid equal other cells, and run once", asked - len(cells))
    return list(cells.values())


def _refusal(config: DictConfig) -> UserError | None:
    """The error with which the command would refuse these settings; None if it accepts them. A refused combination is a
    failed cell, if each of its values occurs in an accepted combination as well."""
    try:
        check_rules(config)
    except UserError as error:
        return error
    return None


def identity(value: Any) -> str:
    """A text that is the same for equal values or points only: 1, true and [1] differ."""
    return json.dumps(value, sort_keys=True)


def _value_at(settings: dict[str, Any], key: str, word: str) -> Any:
    """The value in the composed settings; for a group (`model=random`) its name."""
    parent, _, name = key.rpartition(".")
    above = look_up(settings, parent) if parent else settings
    typed = word.partition("=")[2]
    if isinstance(above, dict) and name in above and not (isinstance(above[name], dict) and typed[:1] != "{"):
        return above[name]
    return typed


def look_up(document: Any, key: str) -> Any:
    """The value at a dotted key, None if there is none; `losses.-1` is the last item of a list."""
    for name in key.split("."):
        if isinstance(document, list) and re.fullmatch(r"-?\d+", name):
            document = document[int(name)] if -len(document) <= int(name) < len(document) else None
        else:
            document = document.get(name) if isinstance(document, dict) else None
    return document


def without(settings: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """A copy without some dotted keys."""
    below = {key: [rest for name, _, rest in (k.partition(".") for k in keys) if name == key] for key in settings}
    return {
        key: without(value, below[key]) if isinstance(value, dict) else value
        for key, value in settings.items()
        if "" not in below[key]
    }
