"""What every command does around its work: compose settings, run, print one JSON line, say what went wrong.

Exit codes: 0 done, 1 a fault (with its traceback), 2 what the user got wrong (one line), 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import hydra
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from rich.console import Console
from rich.logging import RichHandler

from lab.architecture import as_described
from lab.environment import describe_environment, version
from lab.explain import explain
from lab.files import whose_place, write_whole
from lab.not_finite import NotFinite
from lab.overrides import override, with_texts_as_typed
from lab.settings import Dtype, LabSettings, UserError, digest, texts_by_key, to_plain, to_settings
from lab.tracking import finite


class Unfinished(Exception):
    """A run ended before its end; what it has so far is kept. The last line then says `status: failed`."""

    def __init__(self, why: str, code: int, figures: dict[str, Any]) -> None:
        super().__init__(why)
        self.code, self.figures = code, figures


Settings = TypeVar("Settings", bound=LabSettings)

# Nothing of ours phones home, and nothing is compiled: bitsandbytes asks torch for that as it is imported, which loads
# the whole compiler, in every process (2 s of CPU).
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",
}


LONGEST_LINE = 2000


@dataclass(frozen=True)
class Run:
    """Where one run of a command keeps its files."""

    folder: Path
    """Hydra's run folder, absolute."""


def main(config_name: str, settings_type: type[Settings], run: Callable[[Settings, Run], dict[str, Any]]) -> NoReturn:
    """Runs a whole command: `run` gets typed settings and returns the figures of the last line."""
    if "--version" in sys.argv[1:]:
        print(version())
        raise SystemExit(0)
    with for_owner_alone():
        _main(config_name, settings_type, run)


def _main(config_name: str, settings_type: type[Settings], run: Callable[[Settings, Run], dict[str, Any]]) -> NoReturn:
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors to us instead of printing its own page
    log_to_stderr()

    began = False

    def task(config: DictConfig) -> None:
        nonlocal began
        began = True
        place = Run(Path(HydraConfig.get().runtime.output_dir).absolute())
        try:
            settings = settle(config, settings_type)
            finish(run(settings, place), settings, place)
        except Unfinished as error:
            finish({"status": "failed", "error": str(error), **error.figures}, settings, place)
            leave(error.code, str(error))
        except UserError as error:  # here and not outside, where Hydra has put a line of its own before ours
            leave(2, str(error))
        except NotFinite as error:
            leave(1, str(error))
        except OSError as error:
            if mistake := whose_place(error, texts_by_key(config) | {"hydra.run.dir": str(place.folder)}):
                leave(2, str(mistake))
            raise

    try:
        sys.argv[1:] = with_texts_as_typed(literal_prompt(sys.argv[1:]), settings_type)
        hydra.main(version_base="1.3", config_path="../conf", config_name=config_name)(task)()
    except UserError as error:
        leave(2, str(error))
    except HydraException as error:
        leave(2, explain(error))
    except COMPOSING_FAULTS as error:
        if began:
            raise
        leave(2, str(does_not_compose(error)))
    except OSError as error:  # Hydra makes the run folder before it calls us
        if began:
            raise
        where = error.filename or "the run folder"
        leave(2, f"hydra.run.dir must be a folder that can be written, got {str(where)!r} ({error.strerror})")
    except KeyboardInterrupt:
        leave(130, "interrupted")
    raise SystemExit(0)


def compose_settings(config_name: str, overrides: str | Sequence[str], settings_type: type[Settings]) -> Settings:
    """Settings for a process that has no command line of its own: a config name and Hydra overrides, as words or in
    one string from which a shell would make them."""
    words = shlex.split(overrides) if isinstance(overrides, str) else overrides
    words = with_texts_as_typed(words, settings_type)
    return settle(compose_config(config_name, words), settings_type)


def settle(config: DictConfig, settings_type: type[Settings]) -> Settings:
    """Typed settings of this machine: `model.dtype=auto` has become what its device computes best in, a preset's name
    and numbers those of the model that is meant."""
    settings = to_settings(config, settings_type)
    settings.model = as_described(settings.model)
    if settings.model.dtype is Dtype.auto:
        from lab.device import best_dtype, choose_device  # torch, which other settings can do without

        settings.model = replace(settings.model, dtype=best_dtype(choose_device(settings.device)))
    return settings


def compose_config(config_name: str, words: Sequence[str]) -> DictConfig:
    """What a command with this primary config and these words would use. UserError where they do not compose."""
    try:
        GlobalHydra.instance().clear()
        with initialize_config_module("conf", version_base="1.3"):
            return compose(config_name, overrides=list(words))
    except HydraException as error:
        raise UserError(explain(error)) from None
    except COMPOSING_FAULTS as error:
        raise does_not_compose(error) from None


COMPOSING_FAULTS = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)
"""What Hydra raises for some words that it cannot use, where it has no words of its own for them."""


def does_not_compose(error: Exception) -> UserError:
    """What to say of such words."""
    return UserError(f"the words of the command line must make settings: {error or type(error).__name__}")


@contextmanager
def for_owner_alone() -> Iterator[None]:
    """Files that are made meanwhile, here and by processes that are started, are for their owner alone: settings,
    results and logs hold prompts and texts, and libraries that we use write some of them."""
    before = os.umask(0o077)
    os.umask(before | 0o077)
    try:
        yield
    finally:
        os.umask(before)


def leave(code: int, line: str) -> NoReturn:
    """Ends the process with this exit code and one line on stderr, shortened where a value in it is very long."""
    line = " ".join(line.split())
    if len(line) > LONGEST_LINE:
        line = f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"
    print(f"error: {line}" if code == 2 else line, file=sys.stderr, flush=True)
    raise SystemExit(code)


def finish(figures: dict[str, Any], settings: LabSettings, place: Run) -> None:
    """Writes result.json and prints the same document as the last line on stdout; a NaN becomes the text "nan"."""
    from lab.device import open_device  # imports torch, which `--help` can do without

    document = {
        "status": "ok",
        "device": open_device(settings.device).type,
        **figures,
        "settings_digest": digest(settings),
        "run_folder": place.folder,
        **describe_environment(),
    }
    text = json.dumps(finite(to_plain(document)), allow_nan=False)
    write_whole(place.folder / "result.json", text + "\n")
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
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its CPU path works; that a faster one exists is no news
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
    if key == "prompt_file" or value == "-":
        value = _read_prompt(key, value)
    return override("prompt", value)


def _read_prompt(key: str, path: str) -> str:
    try:
        return sys.stdin.read() if key == "prompt" else Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key} must be readable UTF-8 text, got {path!r} ({error})") from None
