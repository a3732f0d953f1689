"""A federation over real sites, watched to its end: `python -m fl.run project.num_clients=2 project.rounds=3 ...`

The same command line as the simulation's. Submits the run with `flwr run`, shows its log, and submits it again, from
its last finished round, when it fails (`project.attempts`). The exit code is 0 only when the run was completed. All
results are in this command's run folder, as those of a simulation are.

The SuperLink must run on this machine: it writes the results.
"""

import json
import logging
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from fl.certificates import CONNECTION_HOME
from fl.run.commands import CHECKOUT, FlowerCommands, RunState, Unreachable
from fl.run.folders import ATTEMPT, PROCESS, attempts_of, claim, claimed_by, latest_rounds, process_is_gone
from fl.settings import Baseline, FederatedSettings
from lab.command import entry
from lab.command.ending import allow_grace, calling_on_signal
from lab.command.overrides import override
from lab.command.processes import own_overrides
from lab.faults import EndedBy, Fault, Lost
from lab.files import require_writable, write_whole
from lab.settings import UserError

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

STOP_SECONDS = 20.0
"""Seconds more than other commands have to end after a signal: `flwr` is asked to stop the run, which takes it some."""
PAUSE_PER_LOOK = 9.0
"""Pause after a look at the state of a run, relative to the time that it took: each starts a `flwr`, whose imports take
more than a second of a core that the sites may need. The files of the run say at once that it may have ended."""


def run(settings: FederatedSettings, place: entry.Run) -> dict[str, Any]:
    """Run the federation and return the figures of its last line.

    Raises UserError for what the server refuses, and Fault when every attempt has failed.
    """
    project = settings.project
    if project.baseline is not Baseline.none:
        raise UserError(f"project.baseline must be none for a federation over sites, got {project.baseline.name!r}")
    if not (CHECKOUT / "pyproject.toml").exists():
        raise UserError(f"python -m fl.run must run from a checkout, which `flwr run` sends, got {str(CHECKOUT)!r}")
    if any(word.startswith("--config-dir") for word in own_overrides()):
        raise UserError("settings must be key=value for a federation over sites, which have no --config-dir")
    require_writable(place.folder, "hydra.run.dir")
    if (there := latest_rounds(place.folder)) is not None or attempts_of(place.folder):
        remedy = f"project.resume={there} goes on with it" if there else "remove its attempts"
        raise UserError(f"hydra.run.dir must be a folder without another run, got {str(place.folder)!r}: {remedy}")
    if "FLWR_HOME" not in os.environ and CONNECTION_HOME.exists():
        os.environ["FLWR_HOME"] = str(CONNECTION_HOME)
    allow_grace(STOP_SECONDS)
    commands = FlowerCommands(project.superlink, project.command_timeout_seconds)
    reasons: list[str] = []
    place.so_far = lambda: {"attempts": len(reasons), "failures": reasons}
    try:
        while True:
            attempt = _Attempt(settings, place.folder, len(reasons) + 1, commands)
            try:
                figures = attempt.run()
            except Fault as fault:
                # What it wrote is moved up in the end: a folder that is named must be there afterwards.
                reasons.append(str(fault).replace(str(attempt.folder), str(place.folder)))
                log.warning("attempt %d of %d failed: %s", len(reasons), project.attempts, reasons[-1])
            else:
                return _moved(figures, attempt.folder, place.folder) | {
                    "attempts": len(reasons) + 1,
                    "failures": reasons,
                }
            if len(reasons) == project.attempts:
                raise Fault(f"the run failed {len(reasons)} times, the last time because {reasons[-1]}")
            time.sleep(project.retry_seconds)
    finally:
        keep_the_last(place.folder)


class _Attempt:
    """One submission of the run, in a folder of its own below the command's."""

    def __init__(self, settings: FederatedSettings, root: Path, number: int, commands: FlowerCommands) -> None:
        self._settings, self._root, self._commands = settings, root, commands
        self.folder = root / ATTEMPT.format(number)
        self._result_file = self.folder / "result.json"
        self._patience = settings.project.node_timeout_seconds

    def run(self) -> dict[str, Any]:
        """The result of the run. UserError if the server refuses it, Fault if it fails."""
        config = self._run_config()
        try:
            # Without an answer it may be there nevertheless, and be submitted twice: the first to begin has the folder.
            run_id = self._patiently(lambda: claimed_by(self.folder) or self._submitted(config))
            log.info("run %s is submitted; its results go to %s", run_id, self._root)
            state = self._followed(run_id)
            if (first := claimed_by(self.folder) or run_id) != run_id:
                log.info("run %s, an earlier submission, goes on instead", first)
                run_id, state = first, self._followed(first)
            return self._result(run_id, state)
        except BaseException:  # we are stopped, or give the run up: it must not go on beside a later attempt
            with suppress(FileExistsError):
                claim(self.folder, "")  # nor begin
            raise

    def _followed(self, run_id: str) -> RunState:
        """The state in which a run ends; meanwhile its log goes to our stderr."""
        follower = self._commands.follow(run_id)
        try:
            return self._end_of(run_id, follower)
        except BaseException:
            self._stop(run_id)
            raise
        finally:
            _end(follower, self._settings.project.poll_seconds)

    def _submitted(self, run_config: Path) -> str:
        """Submit the run; its id. After a signal meanwhile the run is stopped as soon as its id is known; a second one
        ends us at once, whatever the SuperLink makes of the run."""
        run_ids: list[str] = []
        try:
            with calling_on_signal(lambda: None):
                run_ids.append(self._commands.submit(run_config))
        except BaseException:
            for run_id in run_ids:
                self._stop(run_id)
            raise
        return run_ids[0]

    def _stop(self, run_id: str) -> None:
        """Stop the run, if it is there and runs: what ended it is what the caller must hear."""
        with suppress(UserError, Fault):
            self._commands.stop(run_id)

    def _run_config(self) -> Path:
        words = own_overrides(but=("project.resume=", "project.warm_start=", "hydra."))
        if (first := self._settings.project.warm_start) is not None:  # Flower starts the server in another folder
            words.append(override("project.warm_start", Path(first).expanduser().absolute()))
        if (left := latest_rounds(self._root)) is not None:
            words.append(override("project.resume", left))
        elif (asked := self._settings.project.resume) is not None:
            words.append(override("project.resume", Path(asked).expanduser().absolute()))
        values: dict[str, str | bool] = {
            "config-name": "fed_learn",
            "overrides": shlex.join(words),
            "folder": str(self.folder),
        }
        values["warm"] = self._settings.project.warm
        path = self._root / f"{self.folder.name}.toml"
        write_whole(path, "".join(f"{key} = {_as_toml(value)}\n" for key, value in values.items()))
        return path

    def _end_of(self, run_id: str, follower: "subprocess.Popen[bytes]") -> RunState:
        gone, began = False, time.monotonic()
        while not (state := self._patiently(lambda: self._commands.state(run_id))).is_finished:
            if gone and process_is_gone(self.folder):  # twice: it ends a moment before the SuperLink knows
                raise Lost(f"the server's process of run {run_id} is gone")
            gone = process_is_gone(self.folder)
            next_look = time.monotonic() + PAUSE_PER_LOOK * (time.monotonic() - began)
            while True:
                time.sleep(self._settings.project.watch_seconds)
                if time.monotonic() >= next_look or self._may_have_ended(follower):
                    break
            began = time.monotonic()
        return state

    def _may_have_ended(self, follower: "subprocess.Popen[bytes]") -> bool:
        return follower.poll() is not None or self._result_file.exists() or process_is_gone(self.folder)

    def _result(self, run_id: str, state: RunState) -> dict[str, Any]:
        try:
            result: dict[str, Any] = json.loads(self._result_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            result = {}
        if state.status == "finished:completed":
            if result.get("status") == "ok":
                return result
            rule = f"project.superlink must be a SuperLink on this machine, got {self._commands.connection!r}"
            raise UserError(f"{rule}: run {run_id} was completed, but its results are not in {self.folder}")
        if result.get("ended_by") == EndedBy.refused.name:
            raise UserError(str(result["error"]))
        said = result.get("error") or state.details
        raise Fault(f"run {run_id} is {state.status}: {said}")

    def _patiently(self, ask: Callable[[], Answer]) -> Answer:
        """The answer of the SuperLink, asked again while it is away for a moment. Lost after `node_timeout_seconds`."""
        deadline = time.monotonic() + self._patience
        while True:
            try:
                return ask()
            except Unreachable as error:
                if time.monotonic() > deadline:
                    limit = f"project.node_timeout_seconds={self._patience:g}"
                    raise Lost(f"{error}; gave up ({limit})") from None
                log.info("%s", error)
                time.sleep(1.0)


def keep_the_last(root: Path) -> None:
    """Move what the attempt with the most rounds has written up into the run folder; the others have less of it."""
    if (best := latest_rounds(root)) is None:
        return
    for path in best.iterdir() if best != root.absolute() else ():
        if path.name not in ("result.json", PROCESS):
            path.rename(root / path.name)
    for folder in attempts_of(root):
        shutil.rmtree(folder, ignore_errors=True)


def _as_toml(value: str | bool) -> str:
    """A text or a flag in TOML, which is as in JSON, but that TOML knows no halves of surrogate pairs."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _moved(figures: dict[str, Any], attempt: Path, root: Path) -> dict[str, Any]:
    """The figures of a result, with its paths where `keep_the_last` puts them."""
    text = json.dumps(figures).replace(json.dumps(str(attempt))[1:-1], json.dumps(str(root))[1:-1])
    moved: dict[str, Any] = json.loads(text)
    about = ("run_folder", "settings_digest", "commit", "versions", "machine")  # our own last line has them
    return {key: value for key, value in moved.items() if key not in about}


def _end(follower: "subprocess.Popen[bytes]", seconds: float) -> None:
    try:
        follower.wait(max(2.0, seconds))  # the last lines are still on their way
    except subprocess.TimeoutExpired:
        follower.kill()
        follower.wait()


main = entry.command("fed_learn", FederatedSettings, run)

if __name__ == "__main__":
    main()
