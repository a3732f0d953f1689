"""Flower's command line, as far as a run needs it: submit a run, follow it, ask for its state, stop it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.faults import Fault, Lost
from lab.settings import UserError

CHECKOUT = Path(__file__).resolve().parents[2]
"""The folder whose code Flower sends to the sites."""
LOST_WORDS = ("Connection", "connect", "unavailable", "UNAVAILABLE", "timed out", "refused")
"""In what `flwr` says when it does not reach the SuperLink."""


class Unreachable(Lost):
    """The SuperLink does not answer."""


@dataclass(frozen=True)
class RunState:
    """The state of a run as the SuperLink reports it."""

    status: str
    """`pending`, `starting`, `running`, `finished:completed`, `finished:failed` or `finished:stopped`."""
    details: str

    @property
    def is_finished(self) -> bool:
        """Whether the run has ended, in whatever way."""
        return self.status.startswith("finished")


@dataclass(frozen=True)
class FlowerCommands:
    """`flwr`, with one connection of its config.toml (`FLWR_HOME`)."""

    connection: str
    timeout_seconds: float
    """Time limit of one command."""

    def submit(self, run_config: Path) -> str:
        """Submit this checkout as a run with the settings in a TOML file; its run id.

        UserError for what `flwr run` refuses; Unreachable when there is no answer.
        """
        return str(self._json("run", ".", self.connection, "--run-config", str(run_config))["run-id"])

    def state(self, run_id: str) -> RunState:
        """The state of a run. Fault if the SuperLink does not know it (any more), Unreachable without an answer."""
        runs = self._json("list", self.connection, "--run-id", run_id)["runs"]
        if not runs:
            raise Fault(f"the SuperLink does not know run {run_id}")
        return RunState(str(runs[0]["status"]), str(runs[0]["status-details"]))

    def stop(self, run_id: str) -> None:
        """Stop a run."""
        self._json("stop", run_id, self.connection)

    def follow(self, run_id: str) -> "subprocess.Popen[bytes]":
        """A process that copies the log of the run to our stderr until the run ends."""
        command = [program(), "log", run_id, self.connection, "--stream"]
        return subprocess.Popen(
            command, cwd=CHECKOUT, stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno(), stderr=subprocess.DEVNULL
        )

    def _json(self, *arguments: str) -> dict[str, Any]:
        command = [program(), *arguments, "--format", "json"]
        try:
            done = subprocess.run(
                command,
                cwd=CHECKOUT,
                capture_output=True,
                text=True,
                timeout=self.timeout_seconds,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl+C in our terminal is ours: it must not end what submits or stops a run
            )
        except subprocess.TimeoutExpired as error:
            raise Unreachable(f"flwr {arguments[0]} had no answer within {error.timeout:g} s") from None
        said = " ".join((done.stdout + " " + done.stderr).split())
        try:
            answer: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            answer = {"success": False, "error-message": said[-300:]}
        if done.returncode == 0 and answer.get("success"):
            return answer
        reason = " ".join(str(answer.get("error-message") or said[-300:]).split())
        is_unknown = "connection" in reason and "not found" in reason  # a name, not a network
        if not is_unknown and any(word in reason for word in LOST_WORDS):
            raise Unreachable(f"the SuperLink of connection {self.connection!r} does not answer: {reason}")
        if "not found" in reason and arguments[0] == "list":
            raise Fault(f"the SuperLink does not know the run: {reason}")
        raise UserError(f"project.superlink must be a connection that `flwr {arguments[0]}` can use, got {reason}")


def program() -> str:
    """The `flwr` of this environment."""
    beside = Path(sys.executable).with_name("flwr.exe" if os.name == "nt" else "flwr")
    return str(beside) if beside.exists() else "flwr"
