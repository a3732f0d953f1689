"""`python -m split.infer` as people run it: real processes, kills, Ctrl+C, and what is refused."""

from __future__ import annotations

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

SECONDS = 120.0
WORDS = ["model=random", "tracking=none", "project.max_new_tokens=300", "project.temperature=0.9", "prompt=Hello"]


def _start(module: str, folder: Path, words: Sequence[str]) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", f"split.{module}", f"model.cache_dir={folder.parent}/models", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finished(process: subprocess.Popen[str]) -> tuple[int, dict[str, Any], str]:
    out, err = process.communicate(timeout=SECONDS)
    lines = out.strip().splitlines()
    return process.returncode, json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}, err


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


@pytest.mark.real
def test_shards_that_are_killed_change_nothing(tmp_path: Path) -> None:
    """The text of all layers in one process, and the same of two shard processes, each killed once."""
    whole = _start("infer", tmp_path / "whole", [*WORDS, "project.transport=inproc", "project.local_shards=1"])
    code, expected, err = _finished(whole)
    assert code == 0, err
    process = _start("infer", tmp_path / "split", [*WORDS, "project.local_shards=2", "project.cuts=[1]"])
    shards = _shards_of(process, 2)
    assert process.stdout is not None
    process.stdout.read(1)  # it speaks: the text is under way
    victim = random.Random(0).choice(shards)
    victim.send_signal(signal.SIGKILL)
    code, result, err = _finished(process)
    assert code == 0, err
    assert result["token_ids"] == expected["token_ids"]
    assert result["recoveries"] >= 1
    assert [shard["layers"] for shard in result["shards"]] == ["0:1", "1:4"]
    assert result["return_bytes_per_token"] <= 48
    assert result["boundary_bytes_per_token"] <= 4 * 128 + 64
    assert not any(shard.is_running() and shard.status() != psutil.STATUS_ZOMBIE for shard in shards)


@pytest.mark.real
def test_rpc_says_the_same_text_and_notices_a_loss(tmp_path: Path) -> None:
    words = [*WORDS, "project.local_shards=2", "project.max_new_tokens=60"]
    runs = [_start("infer", tmp_path / name, [*words, f"project.transport={name}"]) for name in ("inproc", "rpc")]
    (code, expected, err), (rpc_code, result, rpc_err) = (_finished(run) for run in runs)
    assert (code, rpc_code) == (0, 0), err + rpc_err
    assert result["token_ids"] == expected["token_ids"]
    assert result["transport"] == "rpc"
    longer = [*WORDS, "project.local_shards=2", "project.max_new_tokens=1000", "project.transport=rpc"]
    process = _start("infer", tmp_path / "lost", longer)
    shards = _shards_of(process, 2)
    assert process.stdout is not None
    process.stdout.read(1)
    shards[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    code, _, err = _finished(process)
    assert code == 1
    assert "transport=rpc cannot replace it" in err
    assert time.monotonic() - killed < 20
    _, alive = psutil.wait_procs(shards, timeout=10)
    assert not alive


@pytest.mark.real
def test_ctrl_c_leaves_no_shard_behind(tmp_path: Path) -> None:
    words = [*WORDS, "project.local_shards=2", "project.max_new_tokens=1000"]
    process = _start("infer", tmp_path / "split", words)
    shards = _shards_of(process, 2)
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(SECONDS) == 130
    _, alive = psutil.wait_procs(shards, timeout=10)
    assert not alive


@pytest.mark.real
@pytest.mark.parametrize(
    ("module", "words", "line"),
    [
        ("serve", ["project.layers=2:9"], "layers must be a range within the model's 4 layers, got 2 to 9"),
        ("serve", ["project.layers=0:2", "project.cache_limit_bytes=70000"], "1024 tokens of layers 0:2 need 1048576"),
        ("infer", ["project.local_shards=2", "project.cuts=[4]"], "project.cuts must be 1 numbers below"),
        (
            "infer",
            ["project.local_shards=2", "project.transport=rpc", "network.host=192.0.2.1"],
            "network.host must be loopback for transport=rpc (it is pickle",
        ),
        ("infer", ["project.shards=[127.0.0.1:1]", "project.start_seconds=0.2"], "could not be reached"),
    ],
)
def test_what_the_user_got_wrong_is_one_line(module: str, words: list[str], line: str, tmp_path: Path) -> None:
    process = _start(module, tmp_path / "run", ["model=random", "tracking=none", "prompt=Hello", *words])
    code, _, err = _finished(process)
    assert code == 2, err
    assert line in err.strip().splitlines()[-1]
    assert "Traceback" not in err
