"""A real deployment on this machine: a SuperLink with TLS and keys, SuperNodes with files of their own, and runs."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from fl import certificates
from tests.federated import leaks
from tests.fl.run.kills import adapters
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

    def wait(self, seconds: float = DEADLINE_SECONDS) -> int:
        """Its exit code."""
        return self.process.wait(seconds)

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


def wait_for(what: str, there: Callable[[], Any], *programs: Program, seconds: float = DEADLINE_SECONDS) -> Any:
    """The first true value of `there`; fails when a program has ended or the time is over."""
    deadline = time.monotonic() + seconds
    while not (found := there()):
        for program in programs:
            assert program.process.poll() is None, f"waiting for {what}, but {program.text}"
        assert time.monotonic() < deadline, f"no {what} after {seconds:.0f} s"
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
    watching: list[Program] = field(default_factory=list)
    """Every `python -m fl.run`."""

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
        self.watching.append(Program.start(words, self.folder / f"{folder.name}.log", self.checkout, there))
        return self.watching[-1]

    def workers(self) -> list[psutil.Process]:
        """The warm workers of all sites."""
        folder = str(self.server.flower_home / "warm")
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if "fl.warm" in (words := process.info["cmdline"] or [])
            and words[-1].startswith(folder)
            and running(process)
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

    def leaking(self) -> list[str]:
        """Files of server and sites that hold a part of the sites' text, but for the sites' data. The checkout has this
        text in its tests, which do not travel."""
        own = {self.folder / "shared.jsonl", *(self.folder / f"{site}.jsonl" for site in SITES)}
        there = [path for path in self.folder.rglob("*") if path.is_file() and self.checkout not in path.parents]
        return [str(path.relative_to(self.folder)) for path in {*there} - own if leaks([path.read_bytes()])]

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


def copy_checkout(folder: Path) -> Path:
    """A copy without its environment, in which Flower looks at each of 50,000 files (7 s) before it drops them all."""
    ignored = shutil.ignore_patterns(".venv", ".git", "*cache__", ".*_cache", "results")
    return shutil.copytree(ROOT, folder, ignore=ignored)


@contextmanager
def deployed(folder: Path, checkout: Path) -> Iterator[Deployment]:
    """A SuperLink and a SuperNode for each site, until the end of the block."""
    port = free_port()
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
        yield here
    finally:
        for program in (*here.nodes.values(), superlink, *here.watching):
            program.kill()
