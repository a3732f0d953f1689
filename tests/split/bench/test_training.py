"""A toy-size run of the benchmark, so that it does not rot. No time is asserted: the machine is shared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from split.bench.training_rows import pipeline_row
from split.training.schedule import Operation, Phase, Schedule, Span, Timeline, operations, replay
from split.training.trainer import StepFigures
from tests.split.bench.benchmark import rows_of


def figures(timeline: Timeline) -> StepFigures:
    return StepFigures(
        step=0, loss=0.0, tokens=1, learning_rate=0.0, gradient_norm=0.0, seconds=timeline.seconds,
        bubble_fraction=timeline.bubble_fraction, timeline=timeline, held=[2, 1], boundary_bytes=0, rss_bytes=[],
        squares=[], is_finite=[],
    )  # fmt: skip


@pytest.mark.parametrize("schedule", Schedule)
def test_a_row_compares_a_step_with_its_replay(schedule: Schedule) -> None:
    """A step that runs as its replay says is predicted exactly; one with a pause in it is not."""
    orders = [operations(schedule, shards=2, shard=shard, micro_batches=4) for shard in range(2)]
    timeline = replay(orders, [1.0, 2.0], [3.0, 4.0])
    row = pipeline_row([figures(timeline)], schedule, 4)
    assert row["predicted_over_measured"] == pytest.approx(1.0)
    assert row["bubble_fraction"] == pytest.approx(row["replayed_bubble_fraction"])
    late = Timeline([timeline.shards[0], [span.shifted(20.0) for span in timeline.shards[1]]])
    assert pipeline_row([figures(late)], schedule, 4)["predicted_over_measured"] < 0.8
    assert Span(Operation(0, Phase.forward), 1.0, 2.0).shifted(1.0).end == 3.0


@pytest.mark.real
def test_every_part_runs(tmp_path: Path) -> None:
    large = ["model=random", f"model.cache_dir={tmp_path}/models", "model.architecture.layers=2"]
    words = [
        "model=random", f"model.cache_dir={tmp_path}/models", "project.cut=2", "project.micro_batches=[3]",
        "project.throughput_micro_batches=2", "project.sequence_length=16", "project.steps=1", "project.repeats=1",
        "project.adapter_steps=3", f"project.memory_overrides={json.dumps(large)}", "tracking=none",
    ]  # fmt: skip
    rows = rows_of("split.bench.training", words, tmp_path, seconds=280)
    assert set(rows) == {"pipeline", "throughput", "boundary", "memory", "adapter"}
    assert rows["adapter"]["holds"], rows["adapter"]
    assert rows["boundary"]["sent_over_payload"] > 1
    assert {case["schedule"]: case["held"] for case in rows["pipeline"]["cases"]} == {
        "gpipe": [3, 3], "one_f_one_b": [2, 1],
    }  # fmt: skip
