import json
from pathlib import Path

import pytest
import torch

from fl.bench import mean
from fl.bench.settings import FederatedMeanBenchSettings, MeanBenchProjectSettings
from fl.settings import Codec
from lab.command.entry import Run, compose_settings
from lab.settings import UserError, to_plain


def settings_of(*overrides: str) -> FederatedMeanBenchSettings:
    toy = ["project.width=48", "project.rank=3", "project.sites=4", "project.turns=2", "project.uplink_model=random"]
    return compose_settings("fed_mean_bench", [*toy, "tracking=none", *overrides], FederatedMeanBenchSettings)


@pytest.fixture
def project() -> MeanBenchProjectSettings:
    return settings_of().project


def test_the_factored_tail_is_the_dense_one_and_a_rank_too_few_is_caught(
    project: MeanBenchProjectSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = mean.svd(project)
    assert row["tail_error"] <= 1e-4
    assert row["factored_seconds"].n == row["speed"].n == 2
    honest = mean.product
    monkeypatch.setattr(mean, "product", lambda state: honest(state) * (1 + 0.2 * torch.eye(48, dtype=torch.float64)))
    assert mean.svd(project)["tail_error"] > 1e-4


def test_a_toy_run_writes_its_report(tmp_path: Path) -> None:
    settings = settings_of(f"project.report={tmp_path / 'report.json'}")
    done = mean.run(settings, Run(tmp_path / "run"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rows"] == to_plain(done["rows"])
    assert [row["row"] for row in report["rows"]] == ["svd", *["uplink"] * 4]
    assert all(row["holds"] for row in report["rows"][1:])


def test_a_format_that_takes_more_is_caught(project: MeanBenchProjectSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mean, "LARGEST_SHARE", {Codec.int8: 0.25})
    [row] = mean.uplink(project)
    assert not row["holds"]
    assert 0.25 < row["share"] < 0.26


def test_sizes_without_a_tail_are_refused() -> None:
    with pytest.raises(UserError, match=r"^project\.rank must be less than width=48 and 48, got 48"):
        settings_of("project.rank=48", "project.sites=1")
