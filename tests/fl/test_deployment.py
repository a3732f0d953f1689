"""A real SuperLink with TLS and keys and real SuperNodes, each with a file of its own: what it gives, whom it refuses.

The commands are those that `python -m fl.certificates` prints. One deployment serves all tests: every message costs a
new client process, most of whose time are its imports. The last test ends it.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import Context, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.clientapp import ClientApp

from fl import certificates
from fl.client import Site, read_split
from fl.client_app import site_of
from fl.server_app import deployed
from fl.settings import FederatedSettings
from lab.command.entry import compose_settings
from lab.models.conversion import byte_tokenizer
from lab.settings import UserError
from tests.federated import InProcessGrid
from tests.fl.two_sites import OVERRIDES, ROOT, SITES, write_data

PROGRAMS = Path(sys.executable).parent
DEADLINE_SECONDS = 240.0  # for what takes seconds on an idle machine


@dataclass
class Program:
    """One process in a group of its own, its output in a file."""

    process: subprocess.Popen[bytes]
    output: Path

    @classmethod
    def start(cls, command: list[str], output: Path, cwd: Path, environment: dict[str, str]) -> Program:
        """Starts one of the programs installed beside this Python."""
        with output.open("wb") as stream:
            process = subprocess.Popen(
                [str(PROGRAMS / command[0]), *command[1:]],
                cwd=cwd,
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        return cls(process, output)

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    def wait(self) -> int:
        """Its exit code."""
        return self.process.wait(DEADLINE_SECONDS)

    def family(self) -> list[psutil.Process]:
        """The process and all that it started, as far as they run."""
        try:
            head = psutil.Process(self.process.pid)
            return [member for member in [head, *head.children(recursive=True)] if running(member)]
        except psutil.NoSuchProcess:
            return []

    def end(self, number: int) -> list[psutil.Process]:
        """Sends a signal to the process alone, waits for it, and returns what is left of its family."""
        family = self.family()
        os.kill(self.process.pid, number)
        self.wait()
        deadline = time.monotonic() + 30
        while (left := [member for member in family if running(member)]) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def kill(self) -> None:
        """Ends whatever is left of the group."""
        for member in self.family():
            member.kill()
        self.process.wait(10)


def running(process: psutil.Process) -> bool:
    """Whether it is there and no zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(what: str, there: Callable[[], Any], *programs: Program) -> Any:
    """The first true value of `there`; fails when a program has ended or the time is over."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (found := there()):
        for program in programs:
            assert program.process.poll() is None, f"waiting for {what}, but {program.text}"
        assert time.monotonic() < deadline, f"no {what} after {DEADLINE_SECONDS:.0f} s"
        time.sleep(0.05)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@dataclass
class Deployment:
    """A SuperLink that knows two sites' keys, their SuperNodes, and a run."""

    folder: Path
    checkout: Path
    port: int
    server: certificates.ServerFiles
    steps: str
    """What `certificates server` printed."""
    superlink: Program
    nodes: dict[str, Program] = field(default_factory=dict)
    watched: Program | None = None
    """`python -m fl.run` with the settings of the simulation."""

    @property
    def environment(self) -> dict[str, str]:
        """Everything that Flower keeps goes below the test's folder, and nothing leaves this machine."""
        return environment(self.server)

    def flwr(self, *arguments: str, server: certificates.ServerFiles | None = None) -> subprocess.CompletedProcess[str]:
        """One call of Flower's command line, in a checkout."""
        return subprocess.run(
            [PROGRAMS / "flwr", *arguments],
            cwd=self.checkout,
            env=environment(server or self.server),
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
            stdin=subprocess.DEVNULL,
        )

    def run(self, *overrides: str) -> str:
        """Submits the printed run with other settings, which come after its own, and returns its id."""
        command = line_of("flwr run", self.steps)
        command[command.index("--stream")] = "--format=json"
        answer = self.flwr(*command[1:-1], command[-1][:-1] + " " + shlex.join([*OVERRIDES, *overrides]) + "'")
        assert answer.returncode == 0, answer.stdout + answer.stderr
        document = json.loads(answer.stdout)
        assert document["success"], document
        return str(document["run-id"])

    def watch(self, folder: Path, *overrides: str) -> Program:
        """`python -m fl.run` in the checkout, with `folder` as its run folder."""
        words = ["python", "-m", "fl.run", *OVERRIDES, *overrides, f"hydra.run.dir={folder}"]
        there = self.environment | {"PYTHONPATH": str(self.checkout)}
        return Program.start(words, self.folder / f"{folder.name}.log", self.checkout, there)

    def workers(self) -> list[psutil.Process]:
        """The warm workers of all sites."""
        folder = str(self.server.flower_home / "warm")
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if folder in (process.info["cmdline"] or []) and "fl.warm" in process.info["cmdline"] and running(process)
        ]

    def finished(self, run_id: str) -> tuple[str, str, str]:
        """Waits for the end of a run: its log, its status and the status's details."""
        log = self.flwr("log", run_id, "lab", "--stream").stdout
        answer = self.flwr("list", "lab", "--run-id", run_id, "--format", "json")
        (run,) = json.loads(answer.stdout)["runs"]
        return log, run["status"], run["status-details"]

    def adapters(self, run_id: str) -> dict[str, bytes]:
        """The adapters that a run has written so far, by round."""
        return adapters(next(iter(self.folder.glob(f"results/fed_learn/*_{run_id}")), self.folder / "absent"))

    def node(self, site: str, *arguments: str, authority: Path | None = None, key: bool = True) -> Program:
        """A SuperNode of a site, by the command that `certificates site` prints."""
        files = certificates.SiteFiles(self.folder / site, self.folder / f"{site}.pub")
        command = line_of("flower-supernode", certificates.site_steps(files))
        command = [
            {"HOST:PORT": f"127.0.0.1:{self.port}", "ca.crt": str(authority or self.server.authority)}.get(word, word)
            for word in command
        ]
        if not key:
            place = command.index("--auth-supernode-private-key")
            del command[place : place + 2]
        command = [word.replace("/path/to/this/site.jsonl", str(self.folder / f"{site}.jsonl")) for word in command]
        command = [word.replace("partition-id=0", f"partition-id={(*SITES, site).index(site)}") for word in command]
        command += ["--port", str(free_port()), *arguments]
        return Program.start(command, self.folder / f"{site}-{time.monotonic_ns()}.log", self.folder, self.environment)


def environment(server: certificates.ServerFiles) -> dict[str, str]:
    """As in a shell where `.venv` is active: Flower's programs start each other by name."""
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "PYTHONUNBUFFERED": "1"}
    path = os.pathsep.join([str(PROGRAMS), os.environ.get("PATH", "")])
    return {**os.environ, **quiet, "PATH": path, "FLWR_HOME": str(server.flower_home)}


def line_of(program: str, steps: str) -> list[str]:
    """The words of the one printed command that starts `program`."""
    (line,) = [line for line in steps.splitlines() if line.strip().startswith(program)]
    return shlex.split(line)


def adapters(run_folder: Path) -> dict[str, bytes]:
    files = sorted(run_folder.glob("adapters/round-*/adapter_model.safetensors"))
    return {file.parent.name: file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy without its environment, in which Flower looks at each of 50,000 files (7 s) before it drops them all."""
    folder = tmp_path_factory.mktemp("app") / "checkout"
    return shutil.copytree(
        ROOT, folder, ignore=shutil.ignore_patterns(".venv", ".git", "*cache__", ".*_cache", "results")
    )


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> Iterator[Deployment]:
    folder, port = tmp_path_factory.mktemp("deployment"), free_port()
    write_data(folder)
    server = certificates.make_server(folder, ["localhost"], port)
    steps = certificates.server_steps(server, "localhost", port)
    command = line_of("flower-superlink", steps)
    command[command.index("0.0.0.0")] = "127.0.0.1"  # a test is nobody's server
    superlink = Program.start(command, folder / "superlink.log", folder, environment(server))
    here = Deployment(folder, checkout, port, server, steps, superlink)
    try:
        wait_for("SuperLink", lambda: listening(port), superlink)
        for site in SITES:
            files = certificates.make_site(folder, site)
            command = line_of("flwr supernode register", here.steps)
            command[command.index("NAME.pub")] = str(files.public_key)
            registered = here.flwr(*command[1:])
            assert registered.returncode == 0, registered.stdout + registered.stderr
            here.nodes[site] = here.node(site)
        here.watched = here.watch(folder / "watched", f"project.num_clients={len(SITES)}")
        yield here
    finally:
        for program in (*here.nodes.values(), superlink, *([here.watched] if here.watched else [])):
            program.kill()


@pytest.mark.real
@pytest.mark.timeout(600)
def test_strangers_are_refused(deployment: Deployment, tmp_path: Path) -> None:
    """The nodes of the run below are started in the same way, but for a key or a certificate, and take part."""
    certificates.make_site(deployment.folder, "mallory")
    other = certificates.make_server(tmp_path, ["localhost"], deployment.port)
    refused = [
        (deployment.node("mallory"), "Failed to activate SuperNode"),
        (deployment.node("mallory", key=False), "must be registered"),
        (deployment.node("mallory", "--max-retries", "1", authority=other.authority), "CERTIFICATE_VERIFY_FAILED"),
    ]
    try:
        for node, reason in refused:
            assert node.wait() == 1, node.text
            assert reason in node.text
    finally:
        for node, _ in refused:
            node.kill()
    assert deployment.flwr("list", "lab", server=other).returncode == 1
    assert deployment.flwr("list", "lab").returncode == 0


@pytest.mark.real
@pytest.mark.timeout(600)
def test_deployed_is_simulated(deployment: Deployment, simulated: Path) -> None:
    """Same settings and seed, every site taking part: the same bytes in every round, although the server is killed
    after the first one. What watches the run submits it again, and says so with its last line and exit code."""
    watched, folder = deployment.watched, deployment.folder / "watched"
    assert watched is not None
    first = folder / "attempt-1/adapters/round-0001"
    wait_for("round 1", first.exists, watched, deployment.superlink)
    (server,) = [member for member in deployment.superlink.family() if "flwr-serverapp" in "".join(member.cmdline())]
    server.kill()
    assert watched.wait() == 0, watched.text
    expected, got = adapters(simulated), adapters(folder)
    assert list(got) == ["round-0000", "round-0001", "round-0002"]
    assert len(set(got.values())) == 3, "training changes the adapter in every round"
    assert got == expected
    last = json.loads(watched.text.splitlines()[-1])
    assert last == json.loads((folder / "result.json").read_text())
    assert (last["status"], last["rounds_completed"], last["num_clients"], last["attempts"]) == ("ok", 2, 2, 2)
    assert re.fullmatch(r"the server's process of run \d+ is gone", last["failures"][0])
    assert Path(last["adapter_path"], "adapter_model.safetensors").read_bytes() == got["round-0002"]
    assert not list(folder.glob("attempt-*/")), "all is where the user asked for it"
    assert "round 1 of 2" in watched.text, "the log was streamed"
    assert len(deployment.workers()) == len(SITES), "each site has kept its model and data"
    theirs = json.loads((simulated / "result.json").read_text())
    assert last["eval_loss_by_round"] == theirs["eval_loss_by_round"]


@pytest.mark.real
@pytest.mark.timeout(600)
def test_a_failed_run_keeps_its_rounds_and_nobody_leaves_a_process_behind(deployment: Deployment) -> None:
    alice, bob = (deployment.nodes[site] for site in SITES)
    assert len(bob.family()) >= 2, "a SuperNode starts others"
    assert bob.end(signal.SIGTERM) == []
    run_id = deployment.run("project.num_clients=1")
    wait_for("round 1", lambda: "round-0001" in deployment.adapters(run_id), alice, deployment.superlink)
    wait_for("client of round 2", lambda: clients(alice), alice, deployment.superlink)
    assert alice.end(signal.SIGTERM) == []

    log, status, details = deployment.finished(run_id)
    assert status == "finished:failed", log
    assert "train round 2 ended without one good reply" in details
    assert [line for line in log.splitlines() if "the run failed: train round 2 ended without" in line]
    kept, whole = deployment.adapters(run_id), adapters(deployment.folder / "watched")
    assert list(kept) == ["round-0000", "round-0001"]
    assert kept["round-0000"] == whole["round-0000"], "same seed, same start"
    assert kept["round-0001"] != whole["round-0001"], "one site is not two"

    assert len(deployment.superlink.family()) >= 2
    assert deployment.superlink.end(signal.SIGINT) == []
    wait_for("end of the workers", lambda: not deployment.workers())
    assert list((deployment.server.flower_home / "warm").iterdir()) == [], "their keys are gone"


def clients(node: Program) -> list[psutil.Process]:
    """The client processes of a SuperNode that are at work."""
    return [member for member in node.family() if any("flwr-clientapp" in word for word in member.cmdline())]


def run_context(overrides: str, **node: Any) -> Context:
    return Context(
        run_id=7,
        node_id=1,
        node_config={key.replace("_", "-"): value for key, value in node.items()},
        state=RecordDict(),
        run_config={"config-name": "fed_learn", "overrides": overrides},
    )


@pytest.fixture
def _logging_as_before() -> Iterator[None]:
    """The app sets up the logging of a process that is its own."""
    root, flower = logging.getLogger(), logging.getLogger("flwr")
    before = root.handlers[:], root.level, flower.propagate
    yield
    root.handlers[:], root.level, flower.propagate = before


@pytest.mark.usefixtures("_logging_as_before")
@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ("project.rounds=0", "project.rounds must be at least 1, got 0"),
        ("project.round=1", "project.round must be "),
        ("project.data.source=hub", "project.data.repo must be set for source=hub"),
    ],
)
def test_a_bad_override_ends_the_run_with_one_line(
    overrides: str, line: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower puts what is raised here into `flwr list`, as the failed run above shows."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(line)):
        deployed(InProcessGrid(ClientApp(), 1), run_context(overrides))
    printed = capfd.readouterr().err
    assert f"the run failed: {line}" in printed
    assert printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["zero", -1, 0.5, None])
def test_a_node_says_which_site_it_is(value: object) -> None:
    with pytest.raises(UserError, match="partition-id of --node-config must be a whole number from 0 on, got"):
        site_of(run_context("", partition_id=value))


def test_a_file_of_its_own_is_not_passed_over(tmp_path: Path) -> None:
    """The default source is the Python library: a node that names a file must not train on that instead."""
    settings = compose_settings("fed_learn", "model=random", FederatedSettings)
    with pytest.raises(UserError, match="must be jsonl or text for sites' own files, got 'python_stdlib'"):
        read_split(settings, Site(0, str(tmp_path / "own.jsonl")), byte_tokenizer())


def test_the_app_bundle_is_small_and_whole(checkout: Path) -> None:
    assert (checkout / "tests").is_dir(), "there is more than travels"
    bundle = build_fab_from_disk(checkout)
    assert len(bundle) < 1_000_000
    names = set(zipfile.ZipFile(io.BytesIO(bundle)).namelist())
    sources = {
        file.relative_to(ROOT).as_posix() for package in ("fl", "lab") for file in ROOT.glob(f"{package}/**/*.py")
    }
    configs = {file.relative_to(ROOT).as_posix() for file in ROOT.glob("conf/**/*.yaml")}
    assert len(sources) > 20
    assert len(configs) > 8
    assert names == sources | configs | {"conf/__init__.py", "pyproject.toml", ".info/CONTENT"}
