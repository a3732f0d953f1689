"""`python -m split.train` as people use it: last line, metrics, pictures, kills, and what is refused."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from split.schedule import even_bubble
from tests.split.training_kills import Killed, kill_while_training

ROOT = Path(__file__).parents[2]
FIGURES = {
    "status", "steps", "loss_by_step", "tokens_per_second", "transport", "backward", "schedule", "bubble_fraction",
    "boundary_bytes_per_step", "shards", "checkpoint_path",
}  # fmt: skip


def train(folder: Path, *words: str, module: str = "split.train") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *words],
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
        "device",
        "settings_digest",
        "run_folder",
        "commit",
        "versions",
        "machine",
    }
    assert [Path(plot).stat().st_size > 10_000 for plot in result["plots"]] == [True, True]
    assert list((killed.folder / "run").glob("wandb/offline-run-*/*.wandb"))
    assert (Path(result["checkpoint_path"]) / "manifest.json").exists()


@pytest.mark.real
def test_resume_merge_and_what_does_not_fit(killed: Killed, tmp_path: Path) -> None:
    words = ["model=random", f"model.cache_dir={killed.folder}/models"]
    checkpoint = killed.result["checkpoint_path"]
    merged = train(tmp_path, *words, f"project.checkpoint={checkpoint}", "project.output=merged", module="split.merge")
    assert merged.returncode == 0, merged.stderr
    assert json.loads(merged.stdout.splitlines()[-1])["kind"] == "transformers"
    other = train(
        tmp_path, *words, "project.local_shards=3", "project.transport=inproc", "project.train=everything",
        f"project.resume={checkpoint}",
    )  # fmt: skip
    assert other.returncode == 2
    last = other.stderr.strip().splitlines()[-1]
    assert last.startswith("error: project.resume must be a checkpoint of the cut")
    assert "python -m split.merge" in last


@pytest.mark.real
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    """One line that names step and shard; the last valid step stays."""
    done = train(
        tmp_path, "model=random", f"model.cache_dir={tmp_path}/models", "project.local_shards=2", "project.steps=9",
        "project.transport=inproc", "project.train=everything", "project.optimization.learning_rate=1e30",
        "project.optimization.warmup_steps=0", "project.optimization.max_gradient_norm=0.0",
        "project.checkpoint_every=1", "project.data.sequence_length=32", "tracking=none", "hydra.run.dir=run",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: loss and gradients must be finite, got loss nan")
    assert "at step 1, first at shard 1 (layers 0:2); step 1 is kept in" in last
    assert not done.stdout
    assert len(list((tmp_path / "run").glob("checkpoints/*/step-*/manifest.json"))) == 1


@pytest.mark.real
def test_unknown_targets_are_refused_before_anything_starts(tmp_path: Path) -> None:
    done = train(
        tmp_path, "model=random", f"model.cache_dir={tmp_path}/models", "project.local_shards=2",
        "model.lora_targets=[nothing]",
    )  # fmt: skip
    assert done.returncode == 2
    assert "model.lora_targets must be linear modules of the model" in done.stderr.strip().splitlines()[-1]


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
