"""Plans which machine holds which layers. `python -m split.plan model=llama3_70b`: nothing is downloaded."""

import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from lab.command import entry
from lab.models.architecture import architecture_of, is_of_preset, layer_weights_of
from lab.settings import (
    Dtype,
    LabSettings,
    ModelSettings,
    Quantization,
    UserError,
    register,
    require,
    require_above,
    require_at_least,
)
from split.chain.boundary import Boundary
from split.planner import Architecture, FitsNowhere, Node, Plan, Work, bytes_of_weight, make_plan

MAX_NODES = 7
"""Most nodes; all their orders are tried."""

_VALUE_BYTES = {Dtype.float64: 8, Dtype.float32: 4, Dtype.bfloat16: 2, Dtype.float16: 2}


@dataclass(kw_only=True)
class NodeSettings:
    """A machine that could take layers."""

    name: str
    memory_gb: float
    """Memory that the model may take, in units of 10^9 bytes."""
    gb_per_second: float
    """Speed of reading weights: about the bandwidth of its memory, or what `lab.doctor` measures in this precision."""
    delay_ms: float
    """One-way delay to the middle of the network."""
    megabit_per_second: float
    """Speed of its link."""
    layer_ms: float
    """Measured time of a layer for one token (`split.bench`); 0: from `gb_per_second`."""
    head_ms: float
    """Measured time of the head for one token; 0: from `gb_per_second`."""

    def __post_init__(self) -> None:
        require_above(0, self, "memory_gb", "gb_per_second", "megabit_per_second")
        require_at_least(0, self, "delay_ms", "layer_ms", "head_ms")


@dataclass(kw_only=True)
class PlanProjectSettings:
    """The machines, and the load that they must carry."""

    nodes: list[NodeSettings]
    boundary: Boundary
    context: int
    """Tokens of each text that must fit."""
    sessions: int
    prefill_chunk: int
    overhead_gb: float
    """Memory of each process before any weight."""
    hop_ms: float
    """Time of each frame in addition to its link."""

    def __post_init__(self) -> None:
        require(1 <= len(self.nodes) <= MAX_NODES, f"nodes must name 1 to {MAX_NODES} machines", len(self.nodes))
        names = [node.name for node in self.nodes]
        require(len(set(names)) == len(names), "nodes must have different names", names)
        require_at_least(1, self, "context", "sessions", "prefill_chunk")
        require_at_least(0, self, "overhead_gb", "hop_ms")


@register("split_plan")
@dataclass(kw_only=True)
class PlanSettings(LabSettings):
    """Settings of the planner."""

    project: PlanProjectSettings


def run(settings: PlanSettings, place: entry.Run) -> dict[str, Any]:
    """Make the plan; return the figures of the last line. UserError, with the missing GB, if it fits nowhere."""
    project, model = settings.project, settings.model
    architecture = own_architecture(model)
    stored = model.dtype if model.quantization is Quantization.none else model.quantization
    title = f"{model.name} in {stored.name}"
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
        raise UserError(f"project.nodes must have room for {title}: {error}") from None
    print_plan(plan, title)
    return figures_of(plan)


def own_architecture(model: ModelSettings) -> Architecture:
    """The model's sizes in its precision: a preset's, or those of its own config without a preset.

    UserError for a config that cannot be read. The config of a hub model without a preset is downloaded.
    """
    if is_of_preset(model):
        return sized_architecture(model)
    from lab.models.sources import load_config  # loads transformers

    config = load_config(model)
    own = sized_architecture(replace(model, architecture=architecture_of(config)))
    layers = [
        replace(own, layer_weights=layer.packable + layer.others, unpacked_weights=layer.others)
        for layer in layer_weights_of(config)
    ]
    return max(layers, key=lambda layer: layer.layer_bytes)


def sized_architecture(model: ModelSettings) -> Architecture:
    """`model.architecture` with the size of its values in the model's precision."""
    value_bytes = _VALUE_BYTES[model.dtype]
    head = Quantization.none if model.quantization.bits is None else Quantization.int8
    return Architecture(
        **asdict(model.architecture),
        value_bytes=value_bytes,
        weight_bytes=bytes_of_weight(model.quantization, value_bytes),
        head_weight_bytes=bytes_of_weight(head, value_bytes),
    )


def node_of(node: NodeSettings) -> Node:
    """A node in bytes and seconds."""
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
    shards = []
    for placed in plan.placements:
        figures = asdict(placed) | {
            "node": placed.node.name,
            "layers": f"{placed.layers.start}:{placed.layers.stop}",
            "memory_bytes": placed.node.memory_bytes,
        }
        shards.append(figures)
    return {
        "token_seconds": plan.token_seconds,
        "tokens_per_second": 1 / plan.token_seconds,
        "cuts": [placed.layers.start for placed in plan.placements][1:],
        "shards": shards,
        "left_out": {node.name: why for node, why in plan.left_out},
    }


def print_plan(plan: Plan, title: str) -> None:
    """Print the plan as a table, on stderr."""
    table = Table("node", "layers", "weights GB", "KV GB", "work GB", "of GB", "compute ms", "hop ms", title=title)
    for placed in plan.placements:
        sizes = (placed.weights_bytes, placed.kv_bytes, placed.workspace_bytes, placed.node.memory_bytes)
        times = (placed.compute_seconds, placed.hop_seconds)
        cells = [f"{size / 1e9:.2f}" for size in sizes] + [f"{1000 * seconds:.2f}" for seconds in times]
        table.add_row(placed.node.name, f"{placed.layers.start}:{placed.layers.stop}", *cells)
    for node, why in plan.left_out:
        table.add_row(node.name, "-", "left out:", why)
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 120)
    console.print(table)
    console.print(f"{1000 * plan.token_seconds:.1f} ms a token, {1 / plan.token_seconds:.1f} tokens a second")


main = entry.command("split_plan", PlanSettings, run)

if __name__ == "__main__":
    main()
