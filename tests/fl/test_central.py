from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fl.adapters import load_into
from fl.central import train_centrally, union_batches
from fl.client import Site, open_client
from fl.client_app import make_client_app
from fl.server import first_adapter, serve
from fl.settings import FederatedSettings
from lab.command.entry import Run
from lab.learning.examples import batches
from lab.learning.training import accumulate_gradients, trainable_parameters
from tests.federated import InProcessGrid, small_settings, write_dialogues


def federate(settings: FederatedSettings, folder: Path) -> dict[str, Any]:
    return serve(
        InProcessGrid(make_client_app(lambda context: settings), settings.project.num_clients), settings, Run(folder)
    )


def adapter_of(figures: dict[str, Any]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(figures["adapter_path"] / "adapter_model.safetensors")
    return tensors


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_n_times_the_accumulation_has_the_gradient_of_the_union_batch(tmp_path: Path) -> None:
    settings = small_settings(write_dialogues(tmp_path / "d.jsonl", 40), 1, "project.data.max_examples=0")
    client = open_client(settings, Site(0))
    model = client.base.model
    load_into(model, first_adapter(settings))

    def gradients(batch_size: int, count: int) -> torch.Tensor:
        for parameter in trainable_parameters(model):
            parameter.grad = None
        accumulate_gradients(model, list(islice(batches(client.split.train, batch_size, seed=3), count)))
        return torch.cat([p.grad.flatten() for p in trainable_parameters(model) if p.grad is not None])

    clients, batch = 4, 3
    optimization = union_batches(settings.project.optimization, clients)
    assert optimization.accumulation == clients * settings.project.optimization.accumulation
    union = gradients(clients * batch, 1)
    assert union.norm() > 1e-3
    torch.testing.assert_close(gradients(batch, optimization.accumulation), union, rtol=1e-4, atol=1e-6)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(gradients(batch, clients - 1), union, rtol=1e-4, atol=1e-6)


ONE_STEP = ("project.rounds=1", "project.local_steps=1", "project.partition_by=iid")


def both_ways(tmp_path: Path, batch_size: int) -> tuple[float, list[dict[str, Any]]]:
    """Largest difference of the two adapters, as a share of what training moved; and both results."""
    one_step = [*ONE_STEP, f"project.optimization.batch_size={batch_size}"]
    settings = small_settings(tmp_path / "d.jsonl", 1, *one_step)
    results = [federate(settings, tmp_path / "federated"), train_centrally(settings, Run(tmp_path / "central"))]
    federated, central = map(adapter_of, results)
    moved = largest_difference(federated, first_adapter(settings))
    assert moved > 1e-4
    return largest_difference(federated, central) / moved, results


def test_one_client_with_a_full_batch_and_one_step_is_central_training(tmp_path: Path) -> None:
    settings = small_settings(write_dialogues(tmp_path / "d.jsonl", 40), 1, *ONE_STEP)
    everything = len(open_client(settings, Site(0)).split.train)
    difference, [federated, central] = both_ways(tmp_path, everything)
    # The order of the examples differs, so sums round differently, and AdamW's first step divides by the gradient.
    assert difference < 0.05
    assert federated["eval_loss_before"] == pytest.approx(central["eval_loss_before"], rel=1e-6)
    assert federated["eval_loss_after"] == pytest.approx(central["eval_loss_after"], rel=1e-5)


def test_with_a_part_of_the_batch_they_differ(tmp_path: Path) -> None:
    write_dialogues(tmp_path / "d.jsonl", 40)
    difference, [federated, central] = both_ways(tmp_path, 4)
    assert difference > 0.5
    assert federated["eval_loss_after"] != pytest.approx(central["eval_loss_after"], rel=1e-5)


def test_the_last_line_of_the_baseline_has_the_keys_of_a_federation(tmp_path: Path) -> None:
    settings = small_settings(write_dialogues(tmp_path / "d.jsonl", 40), 2)
    federated = federate(settings, tmp_path / "federated")
    central = train_centrally(
        small_settings(tmp_path / "d.jsonl", 2, "project.baseline=central"), Run(tmp_path / "central")
    )
    assert central.keys() == federated.keys()
    assert (federated["baseline"], central["baseline"]) == ("none", "central")
    assert central["rounds_completed"] == 2
    assert len(central["eval_loss_by_round"]) == len(central["train_loss_by_round"]) == 2
    assert central["uplink_bytes_per_client_round"] == central["downlink_bytes_per_client_round"] == 0
    assert central["eval_loss_after"] < central["eval_loss_before"]
    assert central["adapter_path"].name == "round-0002"


def test_what_is_written_is_what_was_trained(tmp_path: Path) -> None:
    settings = small_settings(write_dialogues(tmp_path / "d.jsonl", 40), 2)
    figures = train_centrally(settings, Run(tmp_path / "central"))
    clients = [open_client(settings, Site(index)) for index in range(2)]
    clients[0].load(adapter_of(figures))  # the base model is one
    held_out = [len(client.split.held_out) for client in clients]
    loss = sum(client.evaluate() * count for client, count in zip(clients, held_out))
    assert figures["eval_loss_after"] == pytest.approx(loss / sum(held_out), rel=1e-6)
