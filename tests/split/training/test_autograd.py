"""Torch's distributed autograd and our own boundary backward over its RPC: the gradients of the whole model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab.command.entry import compose_settings
from lab.settings import UserError
from split.training.settings import SplitTrainSettings

ROOT = Path(__file__).parents[3]
RELATIVE = {"float32": 1e-6, "float64": 1e-12}

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(sys.platform == "win32", reason="torch is built without rpc on Windows"),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.split.training.rpc_gradients", str(tmp_path_factory.mktemp("rpc"))],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 11, done.stderr[-3000:]
    return found


def whole(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["backward"] != "detached"]


def test_gradients_are_those_of_the_whole_model(rows: list[dict[str, Any]]) -> None:
    """One micro-batch, 2 and 3 shards: to the bit, by torch's autograd and by ours."""
    single = [row for row in whole(rows) if row["held"][0] == 1 and not row["tied"]]
    assert {(row["backward"], row["shards"], row["dtype"]) for row in single} == {
        ("autograd", 2, "float32"), ("autograd", 3, "float32"), ("autograd", 2, "float64"), ("autograd", 3, "float64"),
        ("explicit", 3, "float32"),
    }  # fmt: skip
    for row in single:
        assert row["worst"] == 0.0, row
        assert row["loss_difference"] == 0.0, row
        assert row["missing"] == []


def test_micro_batches_add_up_to_the_same_gradients(rows: list[dict[str, Any]]) -> None:
    many = [row for row in whole(rows) if row["held"][0] > 1 and not row["steps_before"]]
    assert {row["dtype"] for row in many} == RELATIVE.keys()
    for row in many:
        assert row["worst"] <= RELATIVE[row["dtype"]], row
        assert row["missing"] == []


def test_micro_batches_clipping_adapters_and_tied_embeddings(rows: list[dict[str, Any]]) -> None:
    """Several steps of `DistributedOptimizer` before the compared one; float64."""
    others = [row for row in whole(rows) if (row["held"][0] > 1 or row["tied"]) and row["steps_before"]]
    assert len(others) == 3
    for row in others:
        assert row["worst"] <= 1e-10, row  # rounding of the steps before is in it
        assert row["loss_difference"] <= 1e-12, row
        assert row["norm_difference"] <= 1e-6, row
        assert row["missing"] == [], row
        assert all(delta > 0 for delta in row["delta"]), "every shard's weights moved"


def test_a_detached_boundary_is_noticed(rows: list[dict[str, Any]]) -> None:
    """The last shard alone would lower the loss; a shard that no gradient reaches says so."""
    (row,) = [row for row in rows if row["backward"] == "detached"]
    assert "no gradient of model.embed_tokens.weight came within" in row["error"]


def test_what_is_lost_over_rpc_is_said(rows: list[dict[str, Any]]) -> None:
    assert all("transport=rpc cannot replace it, transport=tcp can" in row["lost"] for row in whole(rows))


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (
            "project.transport=rpc project.backward=autograd",
            "project.schedule must be gpipe for backward=autograd .*hangs",
        ),
        ("project.backward=autograd project.schedule=gpipe", "project.transport must be rpc for backward=autograd"),
        ("project.micro_batches=3", "project.optimization.batch_size must be divisible into micro_batches=3, got 4"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(words: str, rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        compose_settings("split_train", words, SplitTrainSettings)
