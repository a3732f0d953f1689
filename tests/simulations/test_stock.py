from pathlib import Path

import pytest

from fl.settings import FederatedSettings
from lab.command.entry import Run, compose_settings
from lab.settings import UserError
from simulations import stock
from tests.federated import on_jsonl


@pytest.mark.parametrize("word", ["project.fraction=0.5", "project.quorum=2", "project.aggregation=svd"])
def test_settings_that_flowers_fedavg_does_not_have_are_refused(word: str, tmp_path: Path) -> None:
    words = on_jsonl(tmp_path / "data.jsonl", 3, word)
    name = word.partition("=")[0]
    with pytest.raises(UserError, match=rf"{name} must be left out"):
        stock.run(compose_settings("fed_learn", " ".join(words), FederatedSettings), Run(tmp_path))
