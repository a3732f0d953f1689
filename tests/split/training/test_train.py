"""`python -m split.train` as people use it: last line, metrics, pictures, kills, and what is refused."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from lab.command.entry import Run, compose_settings
from lab.settings import UserError
from split.merger import merge
from split.training.run import run_training
from split.training.schedule import even_bubble
from split.training.settings import SplitTrainSettings
from tests.split.training.kills import Killed, kill_while_training
from tests.wandb_files import held, wandb_text

ROOT = Path(__file__).parents[3]
FIGURES = {
    "status", "steps", "loss_by_step", "tokens_per_second", "transport", "backward", "schedule", "bubble_fraction",
    "boundary_bytes_per_step", "shards", "checkpoint_path",
}  # fmt: skip


def train(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "split.train", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    folder = tmp_path_factory.mktemp("killed")
    return kill_while_training(2, seed=4, folder=folder, words=[f"model.cache_dir={folder}/models"])


@pytest.mark.real
def test_two_kills_change_no_loss(killed: Killed) -> None:
    """SIGKILL of a shard's process; float32, one thread, one micro-batch: the whole model's losses to the bit."""
    assert killed.kills == 2
    assert killed.result["recoveries"] >= 1, "two kills within one recovery count once"
    assert killed.result["steps"] == len(killed.result["loss_by_step"]) == 18
    assert killed.same_losses


@pytest.mark.real
def test_the_last_line_metrics_and_pictures_hold_it_all(killed: Killed) -> None:
    result = killed.result
    assert result.keys() >= FIGURES
    assert (result["status"], result["transport"], result["backward"]) == ("ok", "tcp", "explicit")
    for shard in result["shards"]:
        assert shard["weights_delta_norm"] > 0
        assert shard["peak_rss_bytes"] >= shard["rss_bytes"] > shard["optimizer_bytes"]
        assert shard["optimizer_bytes"] >= 2 * shard["gradient_bytes"]
    rows = [json.loads(line) for line in (killed.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows[:-1]] == list(range(18)), "no step twice"
    assert [row["loss"] for row in rows[:-1]] == result["loss_by_step"]
    assert result.keys() - rows[-1].keys() <= {
        "status",
        "ended_by",
        "device",
        "settings_digest",
        "run_folder",
        "commit",
        "versions",
        "machine",
    }
    assert [Path(plot).stat().st_size > 10_000 for plot in result["plots"]] == [True, True]
    (run,) = (killed.folder / "run").glob("wandb/offline-run-*/*.wandb")
    kept = wandb_text(run)
    figures = {key: result[key] for key in rows[-1].keys() & result.keys()}
    assert all(key.encode() in kept for key in figures)
    plain = {key: value for key, value in figures.items() if isinstance(value, int | float) or key.endswith("by_step")}
    assert plain.keys() >= {"steps", "loss_by_step", "tokens_per_second", "bubble_fraction", "boundary_bytes_per_step"}
    for row in (plain, *result["shards"]):
        assert not [key for key, value in row.items() if not held(kept, key, value)]
    assert not held(kept, "tokens_per_second", result["tokens_per_second"] + 1e-9), "another figure is not found"
    assert (Path(result["checkpoint_path"]) / "manifest.json").exists()


def settings_of(folder: Path, words: str) -> SplitTrainSettings:
    told = f"model=random model.cache_dir={folder}/models project.transport=inproc tracking=none {words}"
    return compose_settings("split_train", told, SplitTrainSettings)


@pytest.mark.real
def test_merge_resume_and_what_does_not_fit(killed: Killed, tmp_path: Path) -> None:
    checkpoint = Path(killed.result["checkpoint_path"])
    same = (
        "project.steps=18 project.checkpoint_every=4 project.micro_batches=1 project.train=everything "
        "project.optimization.max_gradient_norm=0.0 project.data.sequence_length=64 project.data.max_examples=64 "
        f"project.checkpoints={checkpoint.parent.parent}"
    )
    settings = settings_of(killed.folder, f"{same} project.local_shards=2")
    assert merge(settings.model, checkpoint, tmp_path / "merged")["kind"] == "transformers"
    same += " project.resume="
    for step in ("step-00000016", "step-00000018"):
        settings = settings_of(killed.folder, f"{same}{checkpoint.parent / step} project.local_shards=2")
        result = run_training(settings, Run(tmp_path / step))
        assert result["loss_by_step"] == killed.result["loss_by_step"], "the steps that were taken, and those left"
    same += str(checkpoint)
    with pytest.raises(UserError, match=r"a checkpoint of the cut 0:1, 1:3, 3:4, .*python -m split\.merge"):
        run_training(settings_of(killed.folder, f"{same} project.local_shards=3"), Run(tmp_path))
    with pytest.raises(UserError, match=r"of a run with micro_batches 2, got 1"):
        run_training(
            settings_of(killed.folder, f"{same} project.local_shards=2 project.micro_batches=2"), Run(tmp_path)
        )


def test_without_wandb_everything_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises ImportError
    words = (
        "project.local_shards=2 project.steps=3 project.data.sequence_length=32 project.data.max_examples=16 "
        "project.data.max_held_out=2"
    )
    plain = run_training(settings_of(tmp_path, words), Run(tmp_path / "plain"))
    absent = run_training(settings_of(tmp_path, f"{words} tracking.wandb=offline"), Run(tmp_path / "absent"))
    assert absent["loss_by_step"] == plain["loss_by_step"]
    rows = [json.loads(line) for line in (tmp_path / "absent" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss_by_step"] == plain["loss_by_step"]
    assert not list((tmp_path / "absent").glob("wandb"))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    """The message names step and shard; the last valid step stays."""
    words = (
        "project.local_shards=2 project.steps=9 project.train=everything project.optimization.learning_rate=1e30 "
        "project.optimization.warmup_steps=0 project.optimization.max_gradient_norm=0.0 project.checkpoint_every=1 "
        "project.data.sequence_length=32 project.data.max_examples=16 project.data.max_held_out=2"
    )
    rule = r"got loss nan .* at step 1, first at shard 1 \(layers 0:2\); step 1 is kept in"
    with pytest.raises(UserError, match=rule):
        run_training(settings_of(tmp_path, words), Run(tmp_path / "run"))
    assert len(list((tmp_path / "run").glob("checkpoints/*/step-*/manifest.json"))) == 1


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ("model.lora_targets=[nothing]", r"model\.lora_targets must be linear modules of the model"),
        (
            "project.train=everything model.quantization=nf4",
            r"project\.train must be lora where the weights are quantised",
        ),
        (
            "project.shards=[a:1] project.spares=[a:1]",
            r"project\.shards and spares must be different from each other, got \['a:1', 'a:1'\]",
        ),
        ("project.micro_batches=4097", r"project\.micro_batches must be at most 4096, got 4097"),
        ("project.optimization.accumulation=1025", r"project\.optimization\.accumulation must be at most 1024 with"),
        ("project.optimization.batch_size=16388", r"project\.optimization\.batch_size must be at most 16384 with"),
        ("project.lora.rank=2000000", r"project\.lora\.rank must be at most \d+, the rank of the model's targets"),
        ("project.local_shards=9", r"project\.local_shards must be in \[1, 4\] for this model, got 9"),
        ("network.max_frame_bytes=4096", r"network\.max_frame_bytes must be at least \d+ for the hidden states"),
        ("project.local_shards=0", r"project\.shards must name at least one shard"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_starts(words: str, rule: str, tmp_path: Path) -> None:
    data = "project.data.sequence_length=32 project.data.max_examples=16 project.data.max_held_out=2"
    with pytest.raises(UserError, match=rule):
        run_training(settings_of(tmp_path, f"project.local_shards=2 {data} {words}"), Run(tmp_path / "run"))


def figures(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return found


@pytest.mark.real
def test_autograd_over_rpc_is_the_whole_model(tmp_path: Path) -> None:
    """Real processes, four micro-batches, an adapter, clipping; wandb is not asked for."""
    done = train(
        tmp_path, "model=random", f"model.cache_dir={tmp_path}/models", "model.dtype=float64", "project.local_shards=2",
        "project.transport=rpc", "project.backward=autograd", "project.schedule=gpipe", "project.steps=4",
        "project.baseline=unsplit", "project.data.sequence_length=32", "project.data.max_examples=32", "tracking=none",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = figures(done.stdout)
    assert (result["transport"], result["backward"]) == ("rpc", "autograd")
    assert result["largest_loss_difference"] <= 1e-12
    assert 0 <= result["bubble_fraction"] < 1
    assert all(shard["weights_delta_norm"] > 0 for shard in result["shards"])
    assert math.isclose(even_bubble(2, 4), result["even_bubble_fraction"])


@pytest.mark.real
def test_ctrl_c_ends_the_trainer_and_its_shards(tmp_path: Path) -> None:
    words = ["model=random", f"model.cache_dir={tmp_path}/models", "project.local_shards=2", "project.steps=90",
             "project.data.sequence_length=32", "project.data.max_examples=32", "tracking=none"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "split.train", *words], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 2/"):
                break
        learners = psutil.Process(process.pid).children()
        assert len([child for child in learners if "split.learn" in " ".join(child.cmdline())]) == 2
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 130
        last = json.loads(output)
        assert (last["status"], last["ended_by"], last["steps"] >= 2) == ("failed", "interrupted", True)
        assert last["steps"] == len(last["loss_by_step"])
        assert not psutil.wait_procs(learners, timeout=10)[1], "nobody is left"
    finally:
        process.kill()


@pytest.mark.real
def test_shards_on_their_own_learn_and_end_with_ctrl_c(tmp_path: Path) -> None:
    """As on several machines: two processes with a key, a trainer that is told where they listen, which is here. Each
    keeps its part of the checkpoint."""
    key = tmp_path / "lab.key"
    key.write_text("ab" * 32 + "\n")
    key.chmod(0o600)
    words = ["model=random", f"model.cache_dir={tmp_path}/models", f"network.key_file={key}", "device.threads=1",
             "tracking=none"]  # fmt: skip
    learners = [learner(tmp_path / f"shard-{place}", layers, words) for place, layers in ((1, "0:2"), (2, "2:4"))]
    try:
        lines = [json.loads(process.stdout.readline()) for process in learners if process.stdout is not None]
        addresses = ",".join(f"127.0.0.1:{line['port']}" for line in lines)
        told = [*words, f"project.shards=[{addresses}]", "project.steps=3", "project.micro_batches=1",
                "project.baseline=unsplit", "project.data.sequence_length=32", "project.data.max_examples=16",
                "project.data.max_held_out=2"]  # fmt: skip
        settings = compose_settings("split_train", " ".join(told), SplitTrainSettings)
        assert run_training(settings, Run(tmp_path / "run"))["largest_loss_difference"] == 0.0
        for place, process in enumerate(learners, 1):
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=30)
            result = figures(output)
            assert (process.returncode, result["role"]) == (0, "learner")
            parts = Path(result["checkpoints"]).glob("*/step-00000003/*")
            assert [part.name for part in parts] == [f"shard-{place}"]
    finally:
        for process in learners:
            process.kill()


def learner(folder: Path, layers: str, words: list[str]) -> subprocess.Popen[str]:
    folder.mkdir()
    own = [f"project.layers={layers}", "network.port=0", f"hydra.run.dir={folder}"]
    return subprocess.Popen(
        [sys.executable, "-m", "split.learn", *words, *own], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
