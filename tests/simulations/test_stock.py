from pathlib import Path

import pytest

from lab.command.processes import run_to_end
from tests.federated import on_jsonl, write_dialogues


def test_flowers_own_fedavg_over_the_same_clients_comes_to_the_same_losses(tmp_path: Path) -> None:
    """Up to rounding: its mean is one of float32."""
    words = on_jsonl(write_dialogues(tmp_path / "data.jsonl", 30), 3, "project.workers=1")
    ours, stock = (
        run_to_end(f"simulations.{module}", words, tmp_path / module, 270)[1] for module in ("fed_sim", "stock")
    )
    for name in ("train_loss_by_round", "eval_loss_by_round"):
        assert stock[name] == pytest.approx(ours[name], abs=1e-4), name
        assert stock[name][0] - stock[name][1] > 1e-2, "rounds differ by more than that"
    assert len(stock["server_rss_bytes"]) == 2
    assert stock["wall_seconds"] > 0
