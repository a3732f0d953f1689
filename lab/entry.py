"""What every command does around its work: compose settings, run, print one JSON line, say what went wrong.

Exit codes: 0 done, 1 a fault (with its traceback), 2 what the user got wrong (one line), 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.logging import RichHandler

from lab.environment import describe_environment
from lab.settings import LabSettings, UserError, describe, digest, to_plain, to_settings

Settings = TypeVar("Settings", bound=LabSettings)

# Nothing of ours phones home.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Run:
    """Where one run of a command keeps its files."""

    folder: Path
    """Hydra's run folder, absolute."""


def main(config_name: str, settings_type: type[Settings], run: Callable[[Settings, Run], dict[str, Any]]) -> NoReturn:
    """Runs a whole command: `run` gets typed settings and returns the figures of the last line."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors to us instead of printing its own page
    log_to_stderr()

    def task(config: DictConfig) -> None:
        settings = to_settings(config, settings_type)
        place = Run(Path(HydraConfig.get().runtime.output_dir).absolute())
        finish(run(settings, place), settings, place)

    try:
        sys.argv[1:] = literal_prompt(sys.argv[1:])
        hydra.main(version_base="1.3", config_path="../conf", config_name=config_name)(task)()
    except UserError as error:
        _leave(2, str(error))
    except HydraException as error:
        _leave(2, explain(error))
    except KeyboardInterrupt:
        _leave(130, "interrupted")
    raise SystemExit(0)


def _leave(code: int, line: str) -> NoReturn:
    print(f"error: {line}" if code == 2 else line, file=sys.stderr, flush=True)
    raise SystemExit(code)


def finish(figures: dict[str, Any], settings: LabSettings, place: Run) -> None:
    """Writes result.json and prints the same document as the last line on stdout."""
    document = to_plain(
        {
            "status": "ok",
            **figures,
            "settings_digest": digest(settings),
            "run_folder": place.folder,
            **describe_environment(),
        }
    )
    text = json.dumps(document, allow_nan=False)
    place.folder.mkdir(parents=True, exist_ok=True)
    temporary = place.folder / ".result.json"
    temporary.write_text(text + "\n")
    temporary.replace(place.folder / "result.json")
    print(text, flush=True)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Logs of all of ours to stderr; rich on a terminal, plain lines elsewhere."""
    terminal = sys.stderr.isatty()
    handler: logging.Handler = (
        RichHandler(console=Console(stderr=True), show_path=False, log_time_format="%H:%M:%S")
        if terminal
        else logging.StreamHandler(sys.stderr)
    )
    handler.setFormatter(
        logging.Formatter("%(message)s" if terminal else "%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for package in ("lab", "fl", "speculative", "split", "simulations", "__main__"):
        logging.getLogger(package).setLevel(level)


def literal_prompt(arguments: list[str]) -> list[str]:
    """`prompt=` as Hydra must see it to take it literally; `prompt=-` reads stdin, `prompt_file=` a file.

    Hydra reads a comma as a sweep, `${` as an interpolation, and stumbles over brackets and quotes.
    """
    return [_quoted(argument) for argument in arguments]


def _quoted(argument: str) -> str:
    key, equals, value = argument.partition("=")
    if not equals or key not in ("prompt", "prompt_file"):
        return argument
    if key == "prompt_file":
        value = _read_prompt(value)
    elif value == "-":
        value = sys.stdin.read()
    # Backslashes are plain text to Hydra except in a run before a quote; OmegaConf unescapes those before `${`.
    value = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    value = re.sub(r'(\\*)("|$(?!\n))', lambda found: found[1] * 2 + (r"\"" if found[2] else ""), value)
    return f'prompt="{value}"'


def _read_prompt(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt_file must be a readable UTF-8 file, got {path!r} ({error})") from None


def explain(error: HydraException) -> str:
    """One line for a Hydra error: dotted key, rule, value."""
    cause = error.__cause__
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    line = " ".join(part.strip() for part in str(error).strip().splitlines() if part.strip())
    if isinstance(cause, OmegaConfBaseException):
        detail = describe(cause)
        return detail if detail in line and len(line) > 400 else f"{line} ({detail})" if detail not in line else line
    return line
