"""Wrong values for every key of every command: what comes of each is settings, or one line for people.

`change_settings` composes and checks, thousands a minute. `reach_work` runs commands themselves, in this process with a
small model, so that a value meets what is checked only where it is used.
"""

from __future__ import annotations

import copy
import itertools
import logging
import random
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from io import StringIO
from pathlib import Path
from typing import Any, get_args, get_type_hints
from unittest import mock

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from lab.command.entry import COMPOSING_FAULTS, compose_config, does_not_compose, settle
from lab.command.explain import explain
from lab.command.overrides import with_texts_as_typed
from lab.settings import LabSettings, UserError
from tests.test_conf import COMMANDS

LONG = "x" * 20_000
VALUES = (
    *("", "null", "???", "nan", "inf", "-inf", "1e999", "-1", "0", "-0.0", "1", "2", "0.5", "1.5", "1e-320", "0x10"),
    *(str(sign * 2**bits + more) for bits in (31, 32, 53, 63, 64) for sign in (1, -1) for more in (-1, 0, 1)),
    *("1" + "0" * 40, "-1" + "0" * 40, "9" * 5000, "1e400", "true", "false", "yes", "none", "auto", "x", LONG),
    *(
        "[]",
        "[0]",
        "[-1]",
        "[1,2]",
        "[2,1]",
        "[1.5]",
        "[nan]",
        "[x]",
        "['']",
        "[[1]]",
        "[null]",
        "{}",
        "[{a:1}]",
        "{x:1}",
        "[{}]",
    ),
    *(
        "José",
        "日本語",
        "\U0001f600",
        "a b",
        "a,b",
        "a=b",
        "(",
        ")",
        "[",
        "]",
        "{",
        "'",
        '"',
        "\\",
        "%s",
        "$x",
        "~",
        "-x",
        "--",
    ),
    *(
        "${x}",
        "${seed}",
        "${oc.env:NOT_SET}",
        "${oc.nothing:}",
        "${",
        "a\nb",
        "\t",
        "\x7f",
        "\u202e",
        "/dev/null/x",
        "/",
        ".",
    ),
    *("127.0.0.1:1", "[::1]:1", "::1", "0:1", "1:0", "0:99", ":", "0:" + "9" * 30),
)
FORMS = ("{key}={value}",) * 12 + (
    "++{key}={value}",
    "+{key}={value}",
    "{key}.deeper={value}",
    "{key}x={value}",
    "~{key}",
)


@dataclass
class Came:
    """What came of changed words."""

    tried: int = 0
    taken: int = 0
    """Became settings (or a run to its end)."""
    refused: int = 0
    """In one line."""
    faults: list[str] = field(default_factory=list)

    def add(self, words: str, line: str | None, fault: str | None) -> None:
        """One outcome: taken, refused with `line`, or a fault."""
        self.tried += 1
        if fault is None and line is not None and ("\n" in line or not line):
            fault = f"not one line: {line!r}"
        if fault is not None:
            self.faults.append(f"{words[:200]}: {fault[:500]}")
        elif line is None:
            self.taken += 1
        else:
            self.refused += 1


def keys_of(schema: type, path: str = "") -> Iterator[str]:
    """Every dotted key, groups too."""
    hints = get_type_hints(schema)
    for each in fields(schema):
        yield f"{path}{each.name}"
        if is_dataclass(hints[each.name]):
            yield from keys_of(hints[each.name], f"{path}{each.name}.")


def hint_of(schema: type, key: str) -> Any:
    """The annotation of a dotted key."""
    hint: Any = schema
    for name in key.split("."):
        hint = get_type_hints(hint)[name]
    return hint


def members_of(schema: type, key: str) -> list[str]:
    """The names that a key of a closed choice takes; none for another key."""
    hint = hint_of(schema, key)
    kinds = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and issubclass(kind, Enum)]
    return [name for kind in kinds for name in kind.__members__]


def words_of(schema: type, seed: int) -> Iterator[str]:
    """Words without end: every key in turn, values and forms drawn."""
    draw = random.Random(seed)
    values = {key: (*VALUES, *members_of(schema, key)) for key in keys_of(schema)}
    keys = list(values)
    draw.shuffle(keys)
    for key in itertools.cycle(keys):
        yield draw.choice(FORMS).format(key=key, value=draw.choice(values[key]))


def change_settings(commands: dict[str, type[LabSettings]], count: int, seed: int) -> Came:
    """`count` changed words, spread over the primary configs with their settings."""
    came = Came()
    for number, (config_name, schema) in enumerate(commands.items()):
        share = count // len(commands) + (number < count % len(commands))
        config = compose_config(config_name, ["model=random"])  # nothing to fetch
        for word in itertools.islice(words_of(schema, seed + number), share):
            came.add(f"{config_name} {word}", *outcome_of(config, word, schema))
    return came


def outcome_of(config: DictConfig, word: str, schema: type[LabSettings]) -> tuple[str | None, str | None]:
    """The line that refuses a word, or the fault; neither where it becomes settings."""
    try:
        changed = _composed_with(config, with_texts_as_typed([word], schema))
    except HydraException as error:
        return explain(error), None
    except COMPOSING_FAULTS as error:
        return str(does_not_compose(error)), None
    try:
        settle(changed, schema)
    except UserError as error:
        return str(error), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    return None, None


def _composed_with(config: DictConfig, words: Sequence[str]) -> DictConfig:
    """What Hydra does with a word, without the tenth of a second that it takes for all of conf/."""
    changed = copy.deepcopy(config)
    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(list(words)), changed)
    return changed


@dataclass(frozen=True)
class Command:
    """One that ends by itself soon, whatever it is told."""

    config: str
    main: Callable[[], None]
    words: tuple[str, ...]
    but: tuple[str, ...] = ()
    """How keys begin that would make it large or slow, or that it needs to end."""

    @property
    def name(self) -> str:
        """Its module's."""
        return self.main.__module__

    @property
    def schema(self) -> type[LabSettings]:
        """Its settings."""
        return COMMANDS[self.config]


def reach_work(commands: Sequence[Command], count: int, seed: int, folder: Path) -> Came:
    """`count` runs of commands with one changed word each."""
    came = Came()
    with ExitStack() as stack:
        stack.enter_context(chdir(folder))  # some values are names of folders that commands make
        busy = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        common = ("tracking=none", f"network.port={busy.getsockname()[1]}")
        for number, command in enumerate(commands):
            words = itertools.islice(_that_settle(command, seed + number), count // len(commands))
            for word in words:
                place = f"hydra.run.dir={folder}/run-{came.tried}"
                came.add(f"{command.name} {word}", *run_of(command, [*common, place, *command.words, word]))
    return came


def _that_settle(command: Command, seed: int) -> Iterator[str]:
    """Changed words that become settings, so that the work meets them."""
    config = compose_config(command.config, list(command.words))
    for word in words_of(command.schema, seed):
        if _is_for(command, word) and outcome_of(config, word, command.schema) == (None, None):
            yield word


def _is_for(command: Command, word: str) -> bool:
    key, _, value = word.lstrip("+~").partition("=")
    if key.startswith("model.architecture") and value.isdecimal() and len(value) > 3:
        return False  # a model as large as that
    return not key.startswith(("tracking", "network.port", "network.host", "project.follow_stdin", *command.but))


def run_of(command: Command, words: Sequence[str]) -> tuple[str | None, str | None]:
    """The line of a command that ended with exit code 2, or the fault; neither for exit code 0."""
    output, errors = StringIO(), StringIO()
    try:
        argv = mock.patch.object(sys, "argv", [command.name, *words])
        with _undone(), argv, redirect_stdout(output), redirect_stderr(errors):
            command.main()
    except SystemExit as left:
        said = errors.getvalue().splitlines()
        if left.code == 2:
            return said[-1] if said and said[-1].startswith("error: ") else "\n".join(said), None
        return None, None if left.code == 0 else f"exit code {left.code}: {said[-1:]}"
    except BaseException as error:
        return None, f"{type(error).__name__}: {error}"
    return None, "did not end"


@contextmanager
def _undone() -> Iterator[None]:
    """A command sets loggers of its whole process."""
    root, level = logging.getLogger(), logging.getLogger().level
    handlers = root.handlers[:]
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        GlobalHydra.instance().clear()


def commands_that_end(folder: Path) -> list[Command]:
    """Every command that one can have end soon: those that listen find their port taken, the drafter reaches nobody."""
    import fl.sizes
    import lab.decode
    import lab.doctor
    import simulations.fed_sim
    import simulations.link
    import speculative.drafter.__main__
    import speculative.verifier.__main__
    import split.infer
    import split.learn
    import split.merge
    import split.plan
    import split.serve
    import split.train

    data = folder / "texts.jsonl"
    lines = [f'{{"text": "The cat number {number} sat on the mat."}}\n' for number in range(12)]
    data.write_text("".join(lines), encoding="utf-8")
    tiny = ("model=random", "model.quantization=none", "device.threads=1", f"model.cache_dir={folder}/models")
    short = (*tiny, "prompt=The cat", "project.max_new_tokens=2")
    learnt = ("project.data.source=jsonl", f"project.data.path={data}", "project.data.sequence_length=16")
    local = ("project.transport=inproc", "project.local_shards=2")
    nobody = ("network.port=1", "network.connect_timeout_seconds=0.2", "project.draft.source=ngram")
    layers = (*tiny, "project.layers=0:2")
    merged = (f"project.checkpoint={folder}", f"project.output={folder}/x")
    site = ("project.baseline=central", "project.rounds=1", "project.num_clients=1", "project.local_steps=1")
    kept = "project.transport"
    many = ("project.steps", "project.rounds", "project.optimization", "project.local_steps", "project.num_clients")
    return [
        Command("doctor", lab.doctor.main, (*tiny, "project.matrix_size=64", "project.ports=[]"), ("project",)),
        Command("split_plan", split.plan.main, tiny),
        Command("split_inf", split.infer.main, (*short, *local), (kept,)),
        Command("split_inf", split.serve.main, layers, (kept,)),
        Command("split_train", split.train.main, (*tiny, *learnt, *local, "project.steps=1"), (*many, kept)),
        Command("split_train", split.learn.main, layers, (kept,)),
        Command("split_merge", split.merge.main, (*tiny, *merged)),
        Command("decode", lab.decode.main, (*tiny, "project.context=32", "project.max_new_tokens=2")),
        Command("spec_decoding", speculative.drafter.__main__.main, (*short, *nobody)),
        Command("spec_decoding", speculative.verifier.__main__.main, tiny),
        Command("link", simulations.link.main, (*tiny, "project.target_port=1")),
        Command("fed_learn", fl.sizes.main, tiny),
        Command(
            "fed_learn",
            simulations.fed_sim.main,
            (*tiny, *learnt, *site, "project.data.held_out_fraction=0.5"),
            (*many, "project.baseline", "project.data"),
        ),
    ]
