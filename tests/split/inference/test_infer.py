"""`python -m split.infer` as people run it: real processes, kills, Ctrl+C, every figure, and what is refused."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from lab.command.entry import compose_settings
from split import infer, plan, serve
from split.chain.boundary import Boundary
from split.chain.open import free_port
from split.inference.open import INFERENCE, fingerprints, load_stage
from split.settings import SplitSettings
from tests.split.processes import Process
from tests.wandb_files import held, wandb_text

SECONDS = 120.0
NEEDED = {
    "status", "text", "token_ids", "tokens_per_second", "token_seconds_p50", "time_to_first_token_seconds", "transport",
    "boundary_bytes_per_token", "return_bytes_per_token", "shards", "recoveries",
}  # fmt: skip
NEEDED_OF_A_SHARD = {
    "name", "layers", "weights_bytes", "peak_rss_bytes", "kv_bytes", "device", "device_memory_used_bytes",
    "device_memory_total_bytes", "compute_seconds_p50",
}  # fmt: skip
AROUND = {"status", "device", "settings_digest", "run_folder", "commit", "versions", "python", "platform", "machine"}
"""What the last line says around the run's own figures."""
WORDS = [
    "model=random", "model.architecture.layers=16", "project.max_new_tokens=300", "project.temperature=0.9",
    "prompt=Hello", "device.threads=1",
]  # fmt: skip
"""Layers enough for a text that is still under way when something happens to its shards."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"model.cache_dir={tmp_path_factory.mktemp('models')}"


def _start(folder: Path, words: Sequence[str], module: str = "split.infer") -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", module, f"hydra.run.dir={folder}", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _here(
    command: Any, folder: Path, words: Sequence[str], capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    """A command in this process: exit code, stdout, stderr."""
    patch.setattr(sys, "argv", ["split", f"hydra.run.dir={folder}", *words])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        command.main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


@pytest.fixture(scope="module")
def whole(cache: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The text of all layers in one place, by a process that has no wandb."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)  # its import fails
        words = [*WORDS, cache, "tracking=offline", "project.transport=inproc", "project.local_shards=1"]
        patch.setattr(sys, "argv", ["split", f"hydra.run.dir={folder}", *words])
        with pytest.raises(SystemExit) as ended:
            infer.main()
    assert not ended.value.code
    assert not list(folder.rglob("*.wandb"))
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def _shards_of(process: subprocess.Popen[str], count: int) -> list[psutil.Process]:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        children = [
            child for child in psutil.Process(process.pid).children(recursive=True) if "split.serve" in child.cmdline()
        ]
        if len(children) == count:
            return children
        time.sleep(0.05)
    raise AssertionError("the shards did not start")


def _is_over(processes: Sequence[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=10)
    return not alive


@pytest.mark.real
def test_a_shard_that_is_killed_changes_nothing_and_every_figure_is_kept(
    cache: str, whole: dict[str, Any], tmp_path: Path
) -> None:
    """Two shard processes, one of them killed: the text of one place, without wandb. Metrics and W&B hold all of it."""
    words = [*WORDS, cache, "tracking=offline", "project.local_shards=2", "project.cuts=[1]"]
    process = _start(tmp_path, words)
    shards = _shards_of(process, 2)
    assert process.stdout is not None
    process.stdout.read(1)  # it speaks: the text is under way
    random.Random(0).choice(shards).send_signal(signal.SIGKILL)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["token_ids"] == whole["token_ids"]
    assert result["recoveries"] == len(result["recovery_start_seconds"]) == len(result["recovery_prefill_seconds"]) >= 1
    assert [shard["layers"] for shard in result["shards"]] == ["0:1", "1:16"]
    assert result["return_bytes_per_token"] <= 48
    assert result["boundary_bytes_per_token"] <= 4 * 128 + 64
    assert result.keys() == whole.keys() >= NEEDED
    assert all(shard.keys() >= NEEDED_OF_A_SHARD for shard in result["shards"])
    assert _is_over(shards)
    _check_tracking(tmp_path, result)


def _check_tracking(folder: Path, result: dict[str, Any]) -> None:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["result"]
    figures = {key: rows[-1][key] for key in result if key in rows[-1]}
    assert figures == {key: result[key] for key in figures}
    assert figures.keys() >= NEEDED - {"status"}
    parts = ("compute", "serialise", "wire", "queue", "wait")
    assert [row["token_seconds"] > 0 for row in rows if "token_seconds" in row] == [True] * (
        len(result["token_ids"]) - 1
    )
    assert rows[-2].keys() >= {f"shard{place}_{part}_seconds" for place in (1, 2) for part in parts}
    [file] = folder.rglob("run-*.wandb")
    kept = wandb_text(file)
    plain = {key: value for key, value in figures.items() if isinstance(value, int | float)}
    assert len(plain) >= 6
    assert not [key for key, value in plain.items() if not held(kept, key, value)]
    assert all(key.encode() in kept for key in figures)
    assert not held(kept, "tokens_per_second", result["tokens_per_second"] + 1e-9), "another figure is not found"


@pytest.mark.real
def test_rpc_says_the_same_text_until_a_shard_is_lost(cache: str, whole: dict[str, Any], tmp_path: Path) -> None:
    words = [*WORDS, cache, "tracking=none", "project.local_shards=2", "project.transport=rpc"]
    process = _start(tmp_path, [*words, "project.max_new_tokens=1000"])
    shards = _shards_of(process, 2)
    assert process.stdout is not None
    said = process.stdout.read(20)
    shards[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert "transport=rpc cannot replace it" in err
    assert time.monotonic() - killed < 20
    assert _is_over(shards)
    assert whole["text"].replace("\r\n", "\n").replace("\r", "\n").startswith(said)  # a pipe in text mode
    last = json.loads(out.split("\n")[-2])
    assert (last["status"], last["ended_by"]) == ("failed", "lost")
    assert whole["text"].startswith(last["text"])
    assert last["token_ids"]


@pytest.mark.real
@pytest.mark.parametrize("transport", ["tcp", "rpc"])
def test_a_signal_leaves_no_shard_behind_and_the_text_so_far(transport: str, cache: str, tmp_path: Path) -> None:
    words = ["tracking=none", "project.local_shards=2", "project.max_new_tokens=1000", f"project.transport={transport}"]
    process = _start(tmp_path, [*WORDS, cache, *words])
    shards = _shards_of(process, 2)
    assert process.stdout is not None
    process.stdout.read(1)
    number, word = (signal.SIGINT, "interrupted") if transport == "tcp" else (signal.SIGTERM, "terminated")
    process.send_signal(number)
    out, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + number
    assert _is_over(shards)
    last = json.loads(out.split("\n")[-2])
    assert (last["ended_by"], len(last["token_ids"]) > 0) == (word, True)


@pytest.mark.real
def test_a_shard_that_waits_for_its_group_hears_signals(cache: str, tmp_path: Path) -> None:
    """torch's own wait, of half an hour, hears none."""
    words = ["project.transport=rpc", "project.rank=1", "project.world_size=2", "project.layers=0:2"]
    process = _start(
        tmp_path, ["model=random", cache, "tracking=none", f"network.port={free_port()}", *words], "split.serve"
    )
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["status"] == "joining"
        time.sleep(1.0)  # it waits
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, json.loads(out)["ended_by"]) == (0, "terminated"), err


NO_ROOM = (
    "[{name: a, memory_gb: 24, gb_per_second: 500, delay_ms: 0, megabit_per_second: 1000, layer_ms: 0, head_ms: 0}]"
)


@pytest.mark.parametrize(
    ("command", "words", "line"),
    [
        (serve, ["project.layers=2:9"], "layers must be a range within the model's 4 layers, got 2 to 9"),
        (serve, ["project.layers=2"], "project.layers must be first:last with first < last, got '2'"),
        (serve, [], "project.layers must be set for a shard, as first:last, got null"),
        (serve, ["project.layers=0:2", "project.cache_limit_bytes=70000"], "1024 tokens of layers 0:2 need 1048576"),
        (infer, ["project.local_shards=2", "project.cuts=[4]"], "project.cuts must be 1 numbers below"),
        (infer, [], "project.shards must name at least one shard (or set project.local_shards), got []"),
        (
            infer,
            ["project.local_shards=2", "project.transport=rpc", "network.host=192.0.2.1"],
            "network.host must be loopback for transport=rpc (it is pickle",
        ),
        (infer, ["project.shards=[127.0.0.1:1]", "project.start_seconds=0.2"], "could not be reached"),
        (
            infer,
            ["project.local_shards=2", "project.transport=rpc", "project.cache_limit_bytes=70000"],
            "shard 1 did not start: error: project.context must fit project.cache_limit_bytes=70000",
        ),
        (
            infer,
            ["project.transport=inproc", "project.local_shards=2", "project.max_new_tokens=1024"],
            "project.max_new_tokens must leave room in the context of 1024 tokens for a prompt of 5, got 1024",
        ),
        (plan, ["model=llama3_70b", f"project.nodes={NO_ROOM}"], "GB are missing"),
        (plan, ["project.nodes=[{name: a, memory_gb: 24, gb_per_second: 500}]"], "delay_ms must be set"),
    ],
)
def test_what_the_user_got_wrong_is_one_line(
    command: Any,
    words: list[str],
    line: str,
    cache: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [*(["model=random"] if command is not plan else []), cache, "tracking=none", "prompt=Hello", *words]
    code, _, err = _here(command, tmp_path, words, capsys, monkeypatch)
    assert code == 2, err
    (said,) = [one for one in err.splitlines() if one.startswith("error: ")]  # the shards' own log is there, too
    assert line in said
    assert "Traceback" not in err


@pytest.mark.real
@pytest.mark.parametrize(
    ("module", "words", "line"),
    [
        ("split.serve", ["project.layers=2"], "error: project.layers must be first:last with first < last, got '2'"),
        ("split.infer", ["project.shards=[nowhere]"], "error: project.shards must hold host:port, got 'nowhere'"),
        ("split.plan", [f"project.nodes={NO_ROOM}", "model=llama3_70b"], "GB are missing"),
        (
            "split.infer",
            ["project.transport=rpc", "project.world_size=2", f"network.port={free_port()}", "project.start_seconds=1"],
            "error: project.start_seconds must be long enough for the shards, rank 1 to 1, to come to 127.0.0.1:",
        ),
    ],
)
def test_as_a_process_it_ends_with_code_2(module: str, words: list[str], line: str, cache: str, tmp_path: Path) -> None:
    """By words that are found wrong before anything is loaded: what is found later is above."""
    model = [] if module == "split.plan" else ["model=random"]
    done = subprocess.run(
        [sys.executable, "-m", module, cache, "tracking=none", "prompt=Hello", *model, *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert line in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_transport_that_the_system_lacks_is_one_line(
    cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed.rpc, "is_available", lambda: False)
    words = ["model=random", cache, "tracking=none", "prompt=Hello", "project.transport=rpc", "project.local_shards=2"]
    code, _, err = _here(infer, tmp_path, words, capsys, monkeypatch)
    assert code == 2
    assert "project.transport must be tcp on" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("layers", "words", "line"),
    [
        ([(0, 2), (1, 4)], [], "project.shards: layers must go on at 2, got 1:4"),
        ([(0, 1), (2, 4)], [], "they leave a gap"),
        ([(0, 1), (1, 3)], [], "layers must end at the model's 4, got 3"),
        ([(0, 2), (2, 4)], ["model.seed=7"], "project.shards must be reachable and hold this model"),
        ([(0, 2), (2, 4)], ["model.dtype=bfloat16"], "dtype"),
        ([(0, 2), (2, 4)], ["model.quantization=nf4"], "quantization"),
        ([(0, 2), (2, 4)], ["project.boundary=int8"], "boundary"),
    ],
)
def test_shards_that_are_not_the_clients_model_are_one_line(
    layers: list[tuple[int, int]],
    words: list[str],
    line: str,
    cache: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = compose_settings("split_inf", f"model=random {cache}", SplitSettings)
    side = INFERENCE.endpoint(settings.network, fingerprints(settings.model, Boundary.float32), "shard")
    with contextlib.ExitStack() as stack:
        shards = [load_stage(settings, torch.device("cpu"), range(*ends)).shard for ends in layers]
        addresses = [str(stack.enter_context(Process(shard, ours=side)).address) for shard in shards]
        where = f"project.shards=[{','.join(addresses)}]"
        words = ["model=random", cache, "tracking=none", "prompt=Hello", "project.start_seconds=1", where, *words]
        code, _, err = _here(infer, tmp_path, words, capsys, monkeypatch)
    assert code == 2, err
    (said,) = [one for one in err.splitlines() if one.startswith("error: ")]  # the shards' own log is there, too
    assert line in said
    assert "Traceback" not in err
