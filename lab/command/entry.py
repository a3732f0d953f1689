"""The frame around every command: compose settings, run, print one JSON line, report errors.

Exit codes: 0 done, 1 a fault (an unexpected one with its traceback), 2 a mistake of the user (one line), 130 after
Ctrl+C and 143 after SIGTERM (0 for roles that serve until then), 141 when the reader of standard output is gone.
"""

import atexit
import json
import logging
import os
import secrets
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

import hydra
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from rich.console import Console
from rich.logging import RichHandler
from yaml import YAMLError  # type: ignore[import-untyped]  # has no types

from lab.command import streams
from lab.command.ending import (
    End,
    Signals,
    Stopped,
    disk_full,
    end_children,
    end_of,
    is_ending,
    leave_at_once,
)
from lab.command.explain import explain
from lab.command.overrides import override, parse_options, with_texts_as_typed
from lab.command.starts import now
from lab.command.terminal import has_room, one_line
from lab.command.typed import texts_by_key, to_settings
from lab.environment import PACKAGES, describe_environment, version
from lab.faults import EndedBy
from lab.files import whose_place, write_whole
from lab.models.architecture import as_described
from lab.settings import Dtype, LabSettings, UserError, digest, to_plain
from lab.tracking import finite

log = logging.getLogger(__name__)

Settings = TypeVar("Settings", bound=LabSettings)

# Nothing of ours phones home, and nothing is compiled: when bitsandbytes is imported, it asks torch for compilation,
# which loads the whole compiler in every process (2 s of CPU).
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",
    "PYTHONUTF8": "1",  # for processes that we start: they write and read UTF-8, as we do
}


LONGEST_LINE = 2000


@dataclass
class Run:
    """One run of a command."""

    folder: Path
    """Folder of its files: Hydra's run folder, absolute."""
    so_far: Callable[[], dict[str, Any]] = field(default=dict, compare=False)
    """The figures of the last line if the run ends early. A run sets it as soon as it has figures; it is called once,
    from any thread, at the end of the run."""


Work = Callable[[Settings, Run], dict[str, Any]]


def main(
    config_name: str, settings_type: type[Settings], run: Work[Settings], sort: Callable[[list[str]], list[str]] = list
) -> NoReturn:
    """Run a whole command: `run` gets typed settings and returns the figures of the last line.

    `sort` takes the overrides that are not for these settings out of the command line; it may raise UserError.

    A command imports torch, and modules that load it, only within `run`: torch reads the environment that is set here,
    and `--help` need not wait for it.
    """
    streams.in_utf8_mode()
    if "--version" in sys.argv[1:]:
        print(version())
        raise SystemExit(0)
    with for_owner_alone():
        _main(config_name, settings_type, run, sort)


def command(config_name: str, settings_type: type[Settings], run: Work[Settings]) -> Callable[[], NoReturn]:
    """The `main` of a command's module: it composes `conf/<config_name>.yaml`, and runs."""

    def run_command() -> NoReturn:
        main(config_name, settings_type, run)

    run_command.__module__ = run.__module__
    return run_command


def _main(
    config_name: str, settings_type: type[Settings], run: Work[Settings], sort: Callable[[list[str]], list[str]]
) -> NoReturn:
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    # Set by a program that started us: with it, W&B's process would write our files, readable by others, after our end.
    os.environ.pop("WANDB_SERVICE", None)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing its own page
    command = _Command(streams.open_streams())
    with Signals(command.forced) as signals:
        log_to_stderr()
        try:
            command.work(config_name, settings_type, run, sort)
            end = None
        except BaseException as error:
            end = _end_of(error, command)
        signals.tell = lambda: None  # nothing is left to interrupt
        code = command.finish(end, signals.number)
        if signals.number is not None:
            end_children(command.began)
            leave_at_once(code)
    if end is not None:
        end_children(command.began)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # all is said: no traceback out of what exits
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)
    raise SystemExit(code)


class _Command:
    """One command, from its overrides to its last line."""

    def __init__(self, out: TextIO) -> None:
        self.began = now()
        self._out = out
        self._settings: LabSettings | None = None
        self.place: Run | None = None
        self._figures: dict[str, Any] | None = None
        """None: there is no last line, because nothing was run (`--help`)."""
        self._finishing = threading.Lock()

    def work(
        self,
        config_name: str,
        settings_type: type[Settings],
        run: Work[Settings],
        sort: Callable[[list[str]], list[str]],
    ) -> None:
        """Compose the settings and run. Raises the run's own exception."""
        raised: list[Exception] = []

        def task(config: DictConfig) -> None:
            self.place = Run(Path(HydraConfig.get().runtime.output_dir).absolute())
            try:
                self._settings = settings = settle(config, settings_type)
                self._figures = {**run(settings, self.place)}
                self._figures.setdefault("device", _device(settings))
            except Exception as error:  # raised after Hydra's end, which would print its own line before ours
                raised.append(_as_users(error, config, self.place))

        streams.check_arguments(sys.argv[1:])
        arguments = sort(sys.argv[1:])
        overrides = parse_options(arguments).overrides
        options = [argument for argument in arguments if argument not in overrides]
        # Overrides first: Hydra ignores those that follow an option.
        sys.argv[1:] = [*with_texts_as_typed(literal_prompt(overrides), settings_type), *options]
        hydra.main(version_base="1.3", config_path="../../conf", config_name=config_name)(task)()
        if raised:
            raise raised[0]

    def finish(self, end: End | None, number: int | None) -> int:
        """Write and print the last line, and on stderr the reason of an early end. Returns the exit code.
        `number`: the signal that was received; for a role that serves until then this is a good end."""
        if not self._finishing.acquire(blocking=False):
            threading.Event().wait()  # another thread does this, and ends the process
        figures = self._figures
        if end is None:
            if figures is not None:
                by = EndedBy.done if number is None else Stopped(number).ended_by
                self._write({"ended_by": by, **figures})
            return self._code_if_written(0)
        so_far = self._so_far()
        # A run that cannot begin has no figures, nor have options that Hydra handles itself (`--help`).
        if so_far or not (end.code == 2 or (end.code == 0 and self.place is None)):
            about = {"status": "failed", "error": one_line(end.line or end.by.value), "ended_by": end.by}
            if "lab.device" not in sys.modules:  # too late to load torch
                about["device"] = None
            self._write(so_far | about)
        if end.fault is not None:
            traceback.print_exception(end.fault)
        elif end.line:
            _say(end.code, end.line)
        return self._code_if_written(end.code)

    def _code_if_written(self, code: int) -> int:
        """The exit code; not 0 if the last line could not be written, unless its reader is gone."""
        error = streams.lost(self._out)
        if error is None or streams.is_left(self._out):
            return code
        kept = f"; {self.place.folder / 'result.json'} has the result" if self.place else ""
        _say(1, f"standard output could not be written ({error.strerror}){kept}")
        return code or 1

    def forced(self, number: int) -> None:
        """End a run that did not end in time after a signal."""
        code = self.finish(end_of(Stopped(number)), number)
        end_children(self.began)
        leave_at_once(code)

    def _so_far(self) -> dict[str, Any]:
        if self._figures is not None:
            return self._figures
        try:
            return self.place.so_far() if self.place else {}
        except Exception:  # interrupted at any point: a last line without figures is still one
            log.warning("the last line lacks the figures so far", exc_info=True)
            return {}

    def _write(self, figures: dict[str, Any]) -> None:
        if self._settings is None or self.place is None:
            streams.print_last_line(_as_json(figures), self._out)
        else:
            finish(figures, self._settings, self.place, self._out)


def _as_users(error: Exception, config: DictConfig, place: Run) -> Exception:
    """The same error, or a UserError if it is about a path that a setting names."""
    if not isinstance(error, OSError) or disk_full(error):
        return error
    return whose_place(error, texts_by_key(config) | {"hydra.run.dir": str(place.folder)}) or error


def _end_of(error: BaseException, command: _Command) -> End:
    if isinstance(error, HydraException):
        return End(2, EndedBy.refused, explain(error))
    is_composed = command.place is not None
    if isinstance(error, COMPOSING_FAULTS) and not isinstance(error, UserError) and not is_composed:
        return End(2, EndedBy.refused, str(does_not_compose(error)))
    if isinstance(error, OSError) and not is_composed:  # Hydra makes the run folder before it calls us
        where = error.filename or "the run folder"
        rule = "hydra.run.dir must be a folder that can be written"
        return End(2, EndedBy.refused, f"{rule}, got {str(where)!r} ({error.strerror})")
    if isinstance(error, SystemExit) and error.code == 1 and not is_composed:  # Hydra printed it: `--cfg job -p nope`
        return End(2, EndedBy.refused, "")
    return end_of(error)


def compose_settings(config_name: str, overrides: str | Sequence[str], settings_type: type[Settings]) -> Settings:
    """Settings for a process without its own command line: a config name and Hydra overrides, as a list or as one
    string that is split like a shell's."""
    given = shlex.split(overrides) if isinstance(overrides, str) else overrides
    given = with_texts_as_typed(given, settings_type)
    return settle(compose_config(config_name, given), settings_type)


def settle(config: DictConfig, settings_type: type[Settings]) -> Settings:
    """Typed settings of this machine: replaces `model.dtype=auto` by the precision its device computes fastest in,
    `seed=-1` by a random seed, a preset's name and sizes by those of the model itself."""
    settings = to_settings(config, settings_type)
    if settings.seed == -1:
        settings.seed = secrets.randbelow(2**31)
    if not streams.is_text(settings.prompt):
        raise UserError(f"prompt must be text, got {settings.prompt!r}")
    settings.model = as_described(settings.model)
    if settings.model.dtype is Dtype.auto:
        from lab.device import best_dtype, choose_device  # imports torch, which is not needed otherwise

        settings.model = replace(settings.model, dtype=best_dtype(choose_device(settings.device)))
    return settings


def compose_config(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """The config of a command with this primary config and these overrides. UserError if they do not compose."""
    try:
        GlobalHydra.instance().clear()
        with initialize_config_module("conf", version_base="1.3"):
            return compose(config_name, overrides=list(overrides))
    except HydraException as error:
        raise UserError(explain(error)) from None
    except COMPOSING_FAULTS as error:
        raise does_not_compose(error) from None


COMPOSING_FAULTS = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError, YAMLError)
"""Raised by Hydra, without a message, for some overrides and files that it cannot use."""


def does_not_compose(error: Exception) -> UserError:
    """The UserError for overrides that do not compose."""
    line = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"the overrides of the command line must make settings: {line}")


@contextmanager
def for_owner_alone() -> Iterator[None]:
    """Within the block, new files of this process and its children are readable by their owner only: settings,
    results and logs hold prompts and texts, and libraries that we use write some of them."""
    before = os.umask(0o077)
    os.umask(before | 0o077)
    try:
        yield
    finally:
        os.umask(before)


def _say(code: int, line: str) -> None:
    line = one_line(f"error: {line}" if code == 2 else line)
    if len(line) > LONGEST_LINE:  # contains a very long value
        line = f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"
    print(line, file=sys.stderr, flush=True)


def finish(figures: dict[str, Any], settings: LabSettings, place: Run, out: TextIO | None = None) -> None:
    """Write result.json and print the same document as the last line on stdout; a NaN becomes the text "nan".

    If result.json cannot be written, a line on stderr says so: the last line still holds everything.
    """
    document = {
        "status": "ok",
        "ended_by": EndedBy.done,
        **figures,
        "settings_digest": digest(settings),
        "run_folder": place.folder,
        **describe_environment(),
    }
    if "device" not in document:
        with suppress(UserError):  # the end of the run matters more than this
            document["device"] = _device(settings)
    text = _as_json(document)
    try:
        write_whole(place.folder / "result.json", text + "\n")
    except OSError as error:
        _say(1, f"result.json could not be written to {str(place.folder)!r} ({error.strerror}): the last line has all")
    streams.print_last_line(text, out or sys.stdout)


def _device(settings: LabSettings) -> str | None:
    if is_ending() and "lab.device" not in sys.modules:  # too late to load torch
        return None
    from lab.device import open_device  # imports torch, which `--help` does not need

    return open_device(settings.device).type


def _as_json(document: dict[str, Any]) -> str:
    return json.dumps(finite(to_plain(document)), allow_nan=False)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Log to stderr: with rich on a terminal that has room and shows colours, as plain lines elsewhere."""
    terminal = has_room(sys.stderr)
    handler: logging.Handler = (
        RichHandler(console=Console(stderr=True), show_path=False, log_time_format="%H:%M:%S")
        if terminal
        else logging.StreamHandler(sys.stderr)
    )
    handler.setFormatter(
        logging.Formatter("%(message)s" if terminal else "%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advertises a faster CPU path; the one in use works
    for package in (*PACKAGES, "__main__"):
        logging.getLogger(package).setLevel(level)


PROMPT_KEYS = ("prompt", "prompt_file")


def literal_prompt(arguments: list[str]) -> list[str]:
    """`prompt=` in a form that Hydra takes literally; `prompt=-` reads stdin, `prompt_file=` a file.

    Hydra reads a comma as a sweep, `${` as an interpolation, and fails on brackets and quotes. UserError for more than
    one prompt, and for one that is not text.
    """
    given = [argument for argument in arguments if argument.partition("=")[0].lstrip("+") in PROMPT_KEYS]
    if len([argument for argument in given if "=" in argument]) > 1:
        raise UserError(f"prompt must be given once, as prompt= or prompt_file=, got {len(given)} of them")
    return [_quoted(argument) for argument in arguments]


def _quoted(argument: str) -> str:
    key, equals, value = argument.partition("=")
    name = key.lstrip("+")
    if not equals or name not in PROMPT_KEYS:
        return argument
    if name == "prompt_file" or value == "-":
        value = streams.read_stdin() if value == "-" and name == "prompt" else _read_prompt_file(value)
    return f"{key.removesuffix(name)}{override('prompt', value)}"


def _read_prompt_file(path: str) -> str:
    try:
        return streams.as_text(Path(path).expanduser().read_bytes())
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in a path is a ValueError, `~nobody` a RuntimeError
        raise UserError(f"prompt_file must be readable UTF-8 text, got {path!r} ({error})") from None
