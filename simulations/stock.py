"""A federation by Flower's own FedAvg, with its defaults, to compare ours with: `python -m simulations.stock`.

Its clients and Ray workers are those of `simulations/fed_sim.py`, and so are its settings; those that Flower's FedAvg
does not have are refused. With Flower's FedAvg clients train in one message and evaluate the new adapter in another;
ours do both in one. The adapter travels as the same one array.
"""

import time
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fl.adapters import AdapterIndex, PackedAdapter
from fl.client import LoRAClient, open_client
from fl.client_app import site_of
from fl.messages import ARRAYS, CONFIG, METRICS, SERVER_ROUND, WEIGHT, read_array, to_array_record
from fl.server import first_adapter
from fl.server_app import make_server_app
from fl.settings import FederatedSettings
from lab.command import entry
from lab.device import open_device, read_memory
from lab.settings import UserError
from simulations.flower import quiet_flower, run_apps

OURS = (
    *("fraction", "quorum", "oversample", "round_deadline_seconds", "aggregation", "site_ranks", "site_alphas"),
    *("server_optimizer", "compression", "share", "baseline", "resume"),
)
"""Settings that have their defaults here."""


def run(settings: FederatedSettings, place: entry.Run) -> dict[str, Any]:
    """Run all rounds; the figures of the last line have the names that our server gives them. UserError for a setting
    that Flower's FedAvg does not have."""
    usual = entry.compose_settings("fed_learn", "", FederatedSettings).project
    for name in OURS:
        if getattr(settings.project, name) != getattr(usual, name):
            raise UserError(f"project.{name} must be left out: Flower's FedAvg has nothing like it")
    figures: dict[str, Any] = {}
    initial = first_adapter(settings)
    index = AdapterIndex.of(initial, settings.project.wire_dtype)

    def work(grid: Grid, context: Context) -> None:
        figures.update(serve(grid, settings, to_array_record(PackedAdapter.pack(initial, index))))

    with quiet_flower():
        run_apps(make_server_app(work), make_stock_client(settings, index), settings)
    return figures


def serve(grid: Grid, settings: FederatedSettings, arrays: ArrayRecord) -> dict[str, Any]:
    """All rounds of Flower's FedAvg, and the server's resident memory after each."""
    begin, device = time.perf_counter(), open_device(settings.device)
    memory: list[int] = []

    def on_round(server_round: int, arrays: ArrayRecord) -> None:
        if server_round:
            memory.append(read_memory(device).rss_bytes)

    clients = settings.project.num_clients
    strategy = FedAvg(
        min_train_nodes=clients,  # FedAvg counts the nodes of a round before they are all there
        min_evaluate_nodes=clients,
        min_available_nodes=clients,
        weighted_by_key=WEIGHT,
        arrayrecord_key=ARRAYS,
        configrecord_key=CONFIG,
    )
    result = strategy.start(
        grid,
        arrays,
        num_rounds=settings.project.rounds,
        timeout=settings.project.reply_timeout_seconds,
        evaluate_fn=on_round,
    )
    return {
        "wall_seconds": time.perf_counter() - begin,
        "server_rss_bytes": memory,
        "train_loss_by_round": [
            result.train_metrics_clientapp[n]["train_loss"] for n in sorted(result.train_metrics_clientapp)
        ],
        "eval_loss_by_round": [
            result.evaluate_metrics_clientapp[n]["eval_loss"] for n in sorted(result.evaluate_metrics_clientapp)
        ],
    }


def make_stock_client(settings: FederatedSettings, index: AdapterIndex) -> ClientApp:
    """A ClientApp around the same `LoRAClient`, for Flower's FedAvg."""
    client_app = ClientApp()

    def loaded(message: Message, context: Context) -> LoRAClient:
        client = open_client(settings, site_of(context))
        client.load(PackedAdapter(index, read_array(message.content, index.dtype.numpy, index.size)).unpack())
        return client

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        client = loaded(message, context)
        adapter, figures = client.train(int(str(message.content.config_records[CONFIG][SERVER_ROUND])))
        metrics = MetricRecord({WEIGHT: client.weight(client.split.train), "train_loss": figures.loss})
        content = RecordDict({ARRAYS: to_array_record(PackedAdapter.pack(adapter, index)), METRICS: metrics})
        return Message(content, reply_to=message)

    @client_app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        client = loaded(message, context)
        metrics = MetricRecord({WEIGHT: client.weight(client.split.held_out), "eval_loss": client.evaluate()})
        return Message(RecordDict({METRICS: metrics}), reply_to=message)

    return client_app


main = entry.command("fed_learn", FederatedSettings, run)

if __name__ == "__main__":
    main()
