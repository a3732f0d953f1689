from pathlib import Path

import pytest

from fl.settings import FederatedSettings
from lab.command.entry import Run, compose_settings
from lab.command.processes import run_to_end
from lab.settings import UserError
from simulations import stock
from tests.federated import on_jsonl, write_dialogues


def test_flowers_own_fedavg_over_the_same_clients_comes_to_the_same_losses(tmp_path: Path) -> None:
    """Up to rounding: its mean is one of float32."""
    words = on_jsonl(write_dialogues(tmp_path / "data.jsonl", 30), 3, "project.workers=1")
    ours, theirs = (
        run_to_end(f"simulations.{module}", words, tmp_path / module, 270)[1] for module in ("fed_sim", "stock")
    )
    for name in ("train_loss_by_round", "eval_loss_by_round"):
        assert theirs[name] == pytest.approx(ours[name], abs=1e-4), name
        assert theirs[name][0] - theirs[name][1] > 1e-2, "rounds differ by more than that"
    assert len(theirs["server_rss_bytes"]) == 2
    assert theirs["wall_seconds"] > 0


@pytest.mark.parametrize("word", ["project.fraction=0.5", "project.quorum=2", "project.aggregation=svd"])
def test_settings_that_flowers_fedavg_does_not_have_are_refused(word: str, tmp_path: Path) -> None:
    words = on_jsonl(tmp_path / "data.jsonl", 3, word)
    name = word.partition("=")[0]
    with pytest.raises(UserError, match=rf"{name} must be left out"):
        stock.run(compose_settings("fed_learn", " ".join(words), FederatedSettings), Run(tmp_path))
