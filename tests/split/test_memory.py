"""A shard's process holds its own tensors and little more, however large the model on disk is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SIZES = (
    "model=random model.architecture.hidden_size=1024 model.architecture.intermediate_size=4096 "
    "model.architecture.heads=16 model.architecture.kv_heads=16 model.architecture.head_dim=64 "
    "model.architecture.layers=8 model.cache_dir={folder} project.context=64"
)
PROBE = """
import json, sys, torch
from lab.device import peak_rss_bytes
from lab.entry import compose_settings
from lab.models import prepare_checkpoint
from split.opening import load_stage
from split.settings import SplitSettings
from split.shard import Entering
from split.messages import Piece
from lab.sampling import Sampling
torch.set_num_threads(1)
settings = compose_settings("split_inf", sys.argv[1], SplitSettings)
before = peak_rss_bytes()
shard = load_stage(settings, torch.device("cpu"), range(*json.loads(sys.argv[2]))).shard
shard.open(0, Sampling.greedy())
piece = Piece(session=0, position=0, count=2, is_first=True, is_last=True)
shard.run([0], Entering([piece], "last", [1, 2], torch.zeros(2, shard.hidden_size)))
print(json.dumps([before, peak_rss_bytes(), shard.weights_bytes]))
"""


def _probe(words: str, layers: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, words, layers],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    numbers: list[int] = json.loads(done.stdout)
    return numbers


@pytest.mark.real
def test_a_shard_takes_the_memory_of_its_own_tensors(tmp_path: Path) -> None:
    """Half a GiB on disk; the control: all of it does not fit the budget of a quarter."""
    words = SIZES.format(folder=tmp_path)
    _probe(words, "[0, 1]")  # writes the model
    before, peak, own = _probe(words, "[2, 4]")
    assert own < 0.3 * 2**29 * 1.2
    assert peak - before <= 1.25 * own + 64 * 2**20
    before, peak, _ = _probe(words, "[0, 8]")
    assert peak - before > 1.25 * own + 64 * 2**20
