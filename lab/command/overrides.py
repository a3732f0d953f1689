"""Overrides of a command line, `key=value`, quoted for Hydra by code, so that users need no quotes."""

import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException

from lab.settings import UserError

_WORD = re.compile(r"\+{0,2}(?P<key>[\w.]+)=(?P<value>.*)", re.DOTALL)
_MODE = re.compile(r"\+{0,2}hydra\.mode=(?!RUN$|null$)")
_TEXTS_OF_HYDRA = ("hydra.run.dir", "hydra.sweep.dir")


def parse_options(arguments: Sequence[str]) -> Namespace:
    """A command line as Hydra parses it: its own options, and `overrides`. UserError for an option that Hydra does not
    have, or that would run the command several times."""

    def refuse(message: str) -> NoReturn:
        raise UserError(f"arguments must be key=value or options that --hydra-help lists: {message}")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]  # argparse's own prints a page
    parser.allow_abbrev = False  # `--vers` is Hydra's version
    options = parser.parse_intermixed_args(arguments)
    modes = [word for word in options.overrides if _MODE.match(word)]
    if options.multirun or modes:  # each run needs its own process and last line
        got = modes[0] if modes else "-m"
        raise UserError(f"a command must run once (run_matrix.py runs one for each value of key=a,b), got {got}")
    if options.experimental_rerun is not None:
        raise UserError("settings must be words or YAML, got --experimental-rerun, which is pickle: it runs code")
    return options


def override(key: str, value: object) -> str:
    """The override that gives `key` exactly this value, whatever characters it contains."""
    return f"{key}={_written(value)}"


def _written(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_written(item)}' for key, item in value.items())}}}"
    if isinstance(value, Enum):
        return quoted(value.name)
    assert isinstance(value, str | Path), f"a setting of kind {type(value).__name__} has no word"
    return quoted(str(value))


def quoted(text: str, *, interpolate: bool = False) -> str:
    """A text in quotes that Hydra and OmegaConf read as the same text; `interpolate`: except for `${...}`.

    To Hydra, backslashes are plain text unless a quote follows them; OmegaConf unescapes those before `${`.
    """
    if not interpolate:
        text = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)
    text = re.sub(r'(\\*)("|$(?!\n))', lambda found: found[1] * 2 + (r"\"" if found[2] else ""), text)
    return f'"{text}"'


def with_texts_as_typed(overrides: Sequence[str], settings: type) -> list[str]:
    """The same overrides, with the value of every text setting taken as it was typed.

    Hydra reads a comma as a sweep, brackets as a list, and fails on spaces, accents, `(` and `=`, all of which occur in
    names of folders. Values in quotes, `null`, and `${...}` keep Hydra's meaning.
    """
    sweeps = not {"-m", "--multirun"}.isdisjoint(overrides)
    return [_text_as_typed(word, settings, sweeps=sweeps) for word in overrides]


def _text_as_typed(word: str, settings: type, *, sweeps: bool) -> str:
    found = _WORD.fullmatch(word)
    if not found or not (found["key"] in _TEXTS_OF_HYDRA or _is_text(settings, found["key"].split("."))):
        return word
    value = found["value"]
    if value == "" or value.lower() == "null" or _hydra_reads_it(word, value, sweeps=sweeps):
        return word
    return word[: found.start("value")] + quoted(value, interpolate=True)


def _is_text(annotation: Any, path: Sequence[str]) -> bool:
    """Whether the field at the end of `path`, in settings of type `annotation`, is a text, or a text or null."""
    if not path:
        return annotation is str or (get_origin(annotation) in (Union, UnionType) and str in get_args(annotation))
    hints = get_type_hints(annotation) if is_dataclass(annotation) else {}
    return path[0] in hints and _is_text(hints[path[0]], path[1:])


def _hydra_reads_it(word: str, value: str, *, sweeps: bool) -> bool:
    """Whether Hydra reads the override as the text that was typed, or the user wrote it in Hydra's own syntax."""
    try:
        (parsed,) = OverridesParser.create().parse_overrides([word])
    except (HydraException, ValueError):  # ValueError: a number of more than 4,300 digits
        return False
    if parsed.is_sweep_override():
        return sweeps
    read = parsed.value()
    # A backslash: the user escaped the characters after it for Hydra.
    return isinstance(parsed._value, QuotedString) or read == value or (isinstance(read, str) and "\\" in value)
