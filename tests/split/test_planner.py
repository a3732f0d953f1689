"""The planner against brute force over every cut, against the bytes of real shards, and its words when it fails."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lab.command.entry import Run, compose_settings
from lab.settings import Quantization, UserError
from split.plan import PlanSettings, figures_of, node_of, run, sized_architecture
from split.planner import (
    Architecture,
    FitsNowhere,
    Node,
    Plan,
    Work,
    kv_bytes_of_layer,
    make_plan,
    make_plan_with_cuts,
)
from tests.split.chains import VOCABULARY, saved_model, shards

OTHERS: dict[str, Any] = {"family": "llama", "tied_embeddings": False, "context": 128}
SMALL = Architecture(
    layers=6, hidden_size=64, intermediate_size=256, heads=4, kv_heads=2, head_dim=16, vocabulary=1000,
    value_bytes=4, weight_bytes=4, head_weight_bytes=4, **OTHERS,
)  # fmt: skip
WORK = Work(context=128, sessions=1, prefill_chunk=16, boundary_row_bytes=256, overhead_bytes=0, hop_seconds=0.001)


def _node(name: str, memory_bytes: int, speed: float = 1e9, delay: float = 0.0) -> Node:
    return Node(
        name=name, memory_bytes=memory_bytes, weights_bytes_per_second=speed, layer_seconds=0.0, head_seconds=0.0,
        delay_seconds=delay, link_bytes_per_second=1e8,
    )  # fmt: skip


def _fits(plan: Plan) -> bool:
    return all(
        placed.weights_bytes + placed.kv_bytes + placed.workspace_bytes <= placed.node.memory_bytes
        for placed in plan.placements
    )


def _brute_force(nodes: list[Node]) -> float | None:
    """Every subset, order and cut."""
    times = []
    for size in range(1, len(nodes) + 1):
        for order in itertools.permutations(nodes, size):
            for inner in itertools.combinations(range(1, SMALL.layers), size - 1):
                plan = make_plan_with_cuts(SMALL, order, [0, *inner, SMALL.layers], WORK)
                if _fits(plan):
                    times.append(plan.token_seconds)
    return min(times, default=None)


def test_the_plan_is_the_best_of_all_cuts() -> None:
    generator = random.Random(1)
    planned = refused = 0
    for _ in range(60):
        nodes = [
            _node(f"n{index}", generator.randrange(300_000, 2_500_000), generator.uniform(1e8, 1e10),
                  generator.uniform(0, 0.01))
            for index in range(3)
        ]  # fmt: skip
        expected = _brute_force(nodes)
        if expected is None:
            refused += 1
            with pytest.raises(FitsNowhere):
                make_plan(SMALL, nodes, WORK)
            continue
        planned += 1
        plan = make_plan(SMALL, nodes, WORK)
        assert _fits(plan)
        assert plan.token_seconds == pytest.approx(expected)
        assert {placed.node.name for placed in plan.placements} | {node.name for node, _ in plan.left_out} == {
            "n0",
            "n1",
            "n2",
        }
    assert planned > 10
    assert refused > 3


def test_a_slow_far_node_is_left_out_and_the_plan_says_why() -> None:
    plan = make_plan(SMALL, [_node("near", 10**8), _node("far", 10**8, delay=0.05)], WORK)
    assert [placed.node.name for placed in plan.placements] == ["near"]
    assert plan.left_out[0][1].startswith("with it a token would take 10")


def test_a_refusal_names_the_missing_gigabytes() -> None:
    big = replace(SMALL, hidden_size=8192, intermediate_size=28672, layers=80)
    with pytest.raises(FitsNowhere, match=r"GB are missing"):
        make_plan(big, [_node("one", 24 * 10**9)], WORK)


def test_weights_are_counted_as_the_checkpoint_has_them(tmp_path: Path) -> None:
    model = saved_model("llama", tmp_path)
    sizes = Architecture(
        layers=4, hidden_size=32, intermediate_size=64, heads=4, kv_heads=2, head_dim=8, vocabulary=VOCABULARY,
        value_bytes=4, weight_bytes=4, head_weight_bytes=4, **OTHERS,
    )  # fmt: skip
    plan = make_plan_with_cuts(sizes, [_node("a", 1), _node("b", 1)], [0, 1, 4], WORK)
    rotary_bytes = 8 // 2 * 4 * 2  # inverse frequencies, twice, in every shard
    made = shards(model, (0, 1, 4))
    assert [shard.weights_bytes - rotary_bytes for shard in made] == [
        placed.weights_bytes for placed in plan.placements
    ]
    assert kv_bytes_of_layer(sizes, WORK) * 3 == made[1].cache.bytes_per_position * WORK.context
    assert torch.float32.itemsize == sizes.value_bytes


@pytest.mark.parametrize("quantization", [Quantization.int8, Quantization.int4])
def test_packed_weights_are_counted_as_shards_hold_them(quantization: Quantization, tmp_path: Path) -> None:
    """Within one percent, never less; and a token takes the time to read them, but for the embedding."""
    widths: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 768, "head_dim": 64}
    model = saved_model("llama", tmp_path, vocab_size=320, **widths)
    model = replace(model, architecture=replace(model.architecture, vocabulary=320, **widths))
    packed = replace(model, quantization=quantization)
    rotary_bytes = 64 // 2 * 4 * 2
    made = [shard.weights_bytes - rotary_bytes for shard in shards(packed, (0, 1, 4))]
    plan, control = (
        make_plan_with_cuts(sized_architecture(one), [_node("a", 1), _node("b", 1)], [0, 1, 4], WORK)
        for one in (packed, model)
    )
    for placed, unpacked, real in zip(plan.placements, control.placements, made, strict=True):
        assert real <= placed.weights_bytes < 1.01 * real
        assert unpacked.weights_bytes > 2 * real
    compute_seconds = sum(placed.compute_seconds for placed in plan.placements)
    assert compute_seconds * 1e9 == pytest.approx(sum(made) - 320 * 256 * 4, rel=0.01)


def test_messages_name_the_precision(tmp_path: Path) -> None:
    for more, name in (("model.quantization=int4", "int4"), ("model.dtype=bfloat16", "bfloat16")):
        settings = compose_settings("split_plan", f"model=llama3_70b {more} project.context=131072", PlanSettings)
        with pytest.raises(UserError, match=rf"^project\.nodes must have room for Llama-3.*-70B.* in {name}: "):
            run(settings, Run(tmp_path))


@pytest.mark.parametrize(("quantization", "nodes"), [("nf4", 2), ("none", 0)])
def test_llama_70b_on_two_machines_with_24_gb(quantization: str, nodes: int) -> None:
    """In 4 bits it takes two; in bfloat16 (141 GB) more than there are."""
    settings = compose_settings("split_plan", f"model=llama3_70b model.quantization={quantization}", PlanSettings)
    machines = [node_of(node) for node in settings.project.nodes]
    work = replace(WORK, context=settings.project.context, boundary_row_bytes=2 * 8192, overhead_bytes=800_000_000)
    architecture = sized_architecture(settings.model)
    if not nodes:
        assert architecture.weights_bytes == pytest.approx(141.1e9, rel=0.01)
        with pytest.raises(FitsNowhere, match="GB are missing"):
            make_plan(architecture, machines, work)
        return
    plan = make_plan(architecture, machines, work)
    assert len(plan.placements) == nodes
    with pytest.raises(FitsNowhere):
        make_plan(architecture, machines[:1], work)
    assert figures_of(plan)["cuts"] == [plan.placements[0].layers.stop]
