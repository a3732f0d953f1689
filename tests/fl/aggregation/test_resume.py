"""A run under every rule, killed before its last round and resumed: the same bytes as without the interruption."""

import shutil
from pathlib import Path

import pytest

from fl.run import state
from fl.settings import Aggregation, FederatedSettings
from tests.fl.aggregation.test_federation import MIXED, federate, settings_of

CASES = {
    "stack": (Aggregation.stack, MIXED),
    "svd": (Aggregation.svd, (*MIXED[:2], "project.residual_rank=3")),
    "nesterov": (
        Aggregation.rolora,
        (
            "project.server_optimizer.name=nesterov",
            "project.compression.uplink=int4",
            "project.compression.downlink=int8",
        ),
    ),
    "personal": (Aggregation.average, ("project.share=A", "project.server_optimizer.name=fedavgm")),
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_is_uninterrupted(case: str, tmp_path: Path) -> None:
    """What was rounded away, momentum, frozen rows and personal factors included."""
    rule, overrides = CASES[case]

    def settings(*more: str) -> FederatedSettings:
        own = f"project.site_folder={tmp_path / 'sites'}"
        return settings_of(tmp_path, rule, *overrides, own, "project.rounds=3", *more)

    whole, _ = federate(settings(), tmp_path / "whole")
    left = tmp_path / "left"
    for number in range(3):
        shutil.copytree(tmp_path / f"whole/adapters/round-{number:04d}", left / f"adapters/round-{number:04d}")
    again, _ = federate(settings(f"project.resume={left}"), tmp_path / "again")
    assert again == whole
    if "project.share=A" in overrides:
        own = sorted((tmp_path / "sites").rglob("site-*-adapter"))
        assert len(own) == 3, "the same run at its sites, not a second one"


def test_resumed_before_the_first_round_from_an_adapter_that_has_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sites of lower ranks get its best rows then, as in a run that was not interrupted."""
    rule, overrides = CASES["svd"]
    own = f"project.site_folder={tmp_path / 'sites'}"
    federate(settings_of(tmp_path, Aggregation.average, own, "project.rounds=1"), tmp_path / "first")
    start = f"project.warm_start={tmp_path / 'first/adapters/round-0001'}"

    def settings(*more: str) -> FederatedSettings:
        return settings_of(tmp_path, rule, *overrides, own, start, "project.rounds=2", *more)

    monkeypatch.setattr(state, "KEPT_STATES", 9)
    whole, _ = federate(settings(), tmp_path / "whole")
    left = tmp_path / "left"
    shutil.copytree(tmp_path / "whole/adapters/round-0000", left / "adapters/round-0000")
    again, _ = federate(settings(f"project.resume={left}"), tmp_path / "again")
    assert again == whole
