"""Where the layers of a model should go. `python -m split.plan model=llama3_70b`: nothing is downloaded."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table

from lab.command import entry
from lab.models.architecture import architecture_of as numbers_of
from lab.models.architecture import is_of_preset, layer_weights_of
from lab.settings import Dtype, ModelSettings, Quantization, UserError
from split.plan_settings import NodeSettings, PlanSettings
from split.planner import NF4_BYTES, Architecture, FitsNowhere, Node, Plan, Work, make_plan

_VALUE_BYTES = {Dtype.float64: 8, Dtype.float32: 4, Dtype.bfloat16: 2, Dtype.float16: 2}


def run(settings: PlanSettings, place: entry.Run) -> dict[str, Any]:
    """The plan; the figures of the last line. UserError, with the missing GB, when it fits nowhere."""
    project, model = settings.project, settings.model
    architecture = own_architecture(model)
    work = Work(
        context=project.context,
        sessions=project.sessions,
        prefill_chunk=project.prefill_chunk,
        boundary_row_bytes=project.boundary.row_bytes(architecture.hidden_size),
        overhead_bytes=round(project.overhead_gb * 1e9),
        hop_seconds=project.hop_ms / 1000,
    )
    try:
        plan = make_plan(architecture, [node_of(node) for node in project.nodes], work)
    except FitsNowhere as error:
        raise UserError(f"project.nodes must have room for {model.name}: {error}") from None
    print_plan(plan, model.name)
    return figures_of(plan)


def own_architecture(model: ModelSettings) -> Architecture:
    """The model's numbers in its precision: a preset's, or its own config's where no preset describes it.

    UserError for a config that cannot be read. Of a hub model without a preset the config is downloaded.
    """
    if is_of_preset(model):
        return architecture_of(model)
    from lab.models.sources import load_config  # loads transformers

    config = load_config(model)
    own = architecture_of(replace(model, architecture=numbers_of(config)))
    layers = [
        replace(own, layer_weights=layer.packable + layer.others, unpacked_weights=layer.others)
        for layer in layer_weights_of(config)
    ]
    return max(layers, key=lambda layer: layer.layer_bytes)


def architecture_of(model: ModelSettings) -> Architecture:
    """`model.architecture` in the model's precision."""
    numbers, value_bytes = model.architecture, _VALUE_BYTES[model.dtype]
    return Architecture(
        layers=numbers.layers,
        hidden_size=numbers.hidden_size,
        intermediate_size=numbers.intermediate_size,
        heads=numbers.heads,
        kv_heads=numbers.kv_heads,
        head_dim=numbers.head_dim,
        vocabulary=numbers.vocabulary,
        value_bytes=value_bytes,
        weight_bytes=NF4_BYTES if model.quantization is Quantization.nf4 else value_bytes,
    )


def node_of(node: NodeSettings) -> Node:
    """The same in bytes and seconds."""
    return Node(
        name=node.name,
        memory_bytes=round(node.memory_gb * 1e9),
        weights_bytes_per_second=node.gb_per_second * 1e9,
        layer_seconds=node.layer_ms / 1000,
        head_seconds=node.head_ms / 1000,
        delay_seconds=node.delay_ms / 1000,
        link_bytes_per_second=node.megabit_per_second * 1e6 / 8,
    )


def figures_of(plan: Plan) -> dict[str, Any]:
    """The figures of the last line."""
    return {
        "token_seconds": plan.token_seconds,
        "tokens_per_second": 1 / plan.token_seconds,
        "cuts": [stay.layers.start for stay in plan.stays][1:],
        "shards": [
            {
                "node": stay.node.name,
                "layers": f"{stay.layers.start}:{stay.layers.stop}",
                "weights_bytes": stay.weights_bytes,
                "kv_bytes": stay.kv_bytes,
                "workspace_bytes": stay.workspace_bytes,
                "memory_bytes": stay.node.memory_bytes,
                "compute_seconds": stay.compute_seconds,
                "hop_seconds": stay.hop_seconds,
            }
            for stay in plan.stays
        ],
        "left_out": {node.name: why for node, why in plan.left_out},
    }


def print_plan(plan: Plan, title: str) -> None:
    """The table, on stderr."""
    table = Table("node", "layers", "weights GB", "KV GB", "work GB", "of GB", "compute ms", "hop ms", title=title)
    for stay in plan.stays:
        sizes = (stay.weights_bytes, stay.kv_bytes, stay.workspace_bytes, stay.node.memory_bytes)
        times = (stay.compute_seconds, stay.hop_seconds)
        cells = [f"{size / 1e9:.2f}" for size in sizes] + [f"{1000 * seconds:.2f}" for seconds in times]
        table.add_row(stay.node.name, f"{stay.layers.start}:{stay.layers.stop}", *cells)
    for node, why in plan.left_out:
        table.add_row(node.name, "-", "left out:", why)
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 120)
    console.print(table)
    console.print(f"{1000 * plan.token_seconds:.1f} ms a token, {1 / plan.token_seconds:.1f} tokens a second")


def main() -> None:
    """Composes `conf/split_plan.yaml` and runs."""
    entry.main("split_plan", PlanSettings, run)


if __name__ == "__main__":
    main()
