import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.supercore.task_identity import TaskIdentity

from fl.adapters import AdapterIndex
from fl.bench import __main__ as bench
from fl.bench.settings import FederatedBenchProjectSettings, FederatedBenchSettings
from fl.rounds import RoundFold
from fl.settings import FederatedSettings, WireDtype
from lab.command.entry import Run, compose_settings
from lab.command.processes import run_to_end
from lab.models.lora import fresh_adapter
from lab.settings import UserError, to_plain
from tests.fl import two_sites

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _inside_a_run() -> None:
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1


def project(*overrides: str) -> FederatedBenchProjectSettings:
    toy = f"project.adapter_bytes={MIB} project.many_replies=40 project.turns=3"
    return compose_settings("fed_bench", f"{toy} {' '.join(overrides)}", FederatedBenchSettings).project


def test_folding_has_a_ratio_with_its_spread() -> None:
    row = bench.folding(project())
    speed = row["relative_speed"]
    assert 0 < speed.low <= speed.median <= speed.high
    assert speed.n == row["exact_seconds"].n == 3
    assert row["holds"] == (speed.median >= 0.5)


def test_memory_does_not_grow_and_a_server_that_keeps_replies_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    row = bench.memory(project())
    assert row["holds"]
    assert row["peak_bytes"][0] > 4 * MIB, "the sums themselves are counted"
    add, kept = RoundFold.add, []

    def keeping(self: RoundFold, node_id: int, reply: Any, *sizes: int) -> None:
        kept.append(reply)
        add(self, node_id, reply, *sizes)

    monkeypatch.setattr(RoundFold, "add", keeping)
    hoarding = bench.memory(project())
    assert not hoarding["holds"]
    assert hoarding["growth_in_adapters"] > 30


@pytest.mark.parametrize("name", ["random", "smollm2_135m", "llama3_8b", "llama3_70b"])
def test_messages_stay_small(name: str) -> None:
    row = bench.message(name)
    assert row["holds"]
    assert row["adapter_bytes"] < row["message_bytes"]


def test_a_message_with_more_around_it_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bench.message("random")["adapter_bytes"]
    monkeypatch.setattr(bench, "message_bytes", lambda message: whole + 4097)
    assert not bench.message("random")["holds"]


def test_the_adapter_made_from_numbers_is_the_models_own() -> None:
    for name in ("random", "smollm2_135m"):
        settings = compose_settings("fed_learn", f"model={name}", FederatedSettings)
        rank = settings.project.lora.rank
        real = fresh_adapter(settings.model, settings.project.lora, 0)
        assert AdapterIndex.of(bench.adapter_of(settings.model, rank), WireDtype.float32) == AdapterIndex.of(
            real, WireDtype.float32
        )


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(UserError, match=r"project.many_replies must be greater than few_replies=2, got 2"):
        project("project.many_replies=2")
    with pytest.raises(UserError, match=r"project.adapter_bytes must be a positive multiple of 4, got 6"):
        project("project.adapter_bytes=6")


def test_nothing_is_measured_for_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = [f"project.report={tmp_path / 'file' / 'report.json'}"]
    settings = compose_settings("fed_bench", words, FederatedBenchSettings)
    with pytest.raises(UserError, match=r"^project\.report must be a folder that can be written, got "):
        bench.run(settings, Run(tmp_path / "run"))


def figures(loss: float) -> dict[str, Any]:
    return {"eval_loss_before": 3.0, "eval_loss_after": loss}


@pytest.mark.parametrize(("federated", "holds"), [(2.0, True), (2.015, True), (2.03, False), (1.97, False)])
def test_two_percent_of_perplexity_are_a_hundredth_of_a_nat_twice(
    federated: float, holds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def simulate(overrides: list[str], folder: Path, timeout_seconds: float) -> dict[str, Any]:
        return figures(2.0 if "project.baseline=central" in overrides else federated)

    monkeypatch.setattr(bench, "simulate", simulate)
    row = bench.comparison(project(), tmp_path)
    assert [seed["seed"] for seed in row["seeds"]] == [0, 1, 2]
    assert row["holds"] == holds
    assert row["perplexity_ratio"].median == pytest.approx(np.exp(federated - 2.0))


def test_a_server_that_grows_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = {"num_clients": 1, "rounds_completed": 3, "refused": [], "wall_seconds": 1.0, "train_seconds": 1.0}

    def after(*memory: int) -> bool:
        rows = [{"step": step, "server_rss_bytes": value} for step, value in enumerate(memory)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"result": True}]))
        monkeypatch.setattr(bench, "simulate", lambda *arguments: done | {"aggregate_seconds": 0.1})
        row = bench.scale(project(), tmp_path)
        assert row["server_rss_bytes"] == list(memory)
        return bool(row["holds"])

    assert after(50, 1000, 1040), "the first round still loads"
    assert not after(50, 1000, 1060)


def test_a_server_that_grows_with_every_round_of_many_sites_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = {"num_clients": 9, "rounds_completed": 4, "refused": [], "wall_seconds": 1.0}
    site = {"uplink_bytes": 7, "train_seconds": 0.5, "peak_rss_bytes": 10**8}
    folder = tmp_path / "many"
    folder.mkdir()

    def slope(*memory: int) -> tuple[float, bool]:
        rows = [{"step": n, "server_rss_bytes": value, "by_site": {"3": site}} for n, value in enumerate(memory)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"result": True}]))
        monkeypatch.setattr(bench, "simulate", lambda *arguments: done)
        row = bench.many_sites(project("project.lines_of_many_sites=3"), folder)
        assert row["uplink_bytes_of_a_site"].median == 7
        return row["bytes_a_round"], row["holds"]

    assert slope(0, 10**8, 10**8, 10**8 + 400_000) == (pytest.approx(400_000), True)
    assert slope(0, 10**8, 10**8, 10**8 + 600_000) == (pytest.approx(600_000), False)


def test_a_server_that_takes_more_than_flowers_own_or_computes_something_else_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(
        wall: float, memory: int, loss: float, held_out: float = 3.0, refused: Sequence[str] = ()
    ) -> tuple[bool, float, float]:
        def simulate(overrides: list[str], folder: Path, timeout_seconds: float) -> dict[str, Any]:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "server_rss_bytes": memory}) + "\n")
            losses = {"train_loss_by_round": [loss], "eval_loss_by_round": [held_out]}
            return {"wall_seconds": wall, "refused": refused, **losses}

        losses = {"train_loss_by_round": [2.0], "eval_loss_by_round": [3.0]}
        theirs = {"wall_seconds": 10.0, "server_rss_bytes": [90, 100], **losses}
        monkeypatch.setattr(bench, "simulate", simulate)
        monkeypatch.setattr(bench, "run_to_end", lambda *arguments: ([], theirs))
        found = bench.stock(project("project.stock_turns=2"), tmp_path)
        assert found["wall_ratio"].n == 2
        return found["holds"], found["wall_ratio"].median, found["memory_ratio"].median

    assert row(9.0, 100, 2.0) == (True, 0.9, 1.0)
    assert not row(10.1, 100, 2.0)[0]
    assert not row(9.0, 101, 2.0)[0]
    assert not row(9.0, 100, 2.01)[0]
    assert not row(9.0, 100, 2.0, held_out=3.01)[0]
    assert not row(9.0, 100, 2.0, refused=["client 1"])[0]


@pytest.mark.real
def test_flowers_own_fedavg_over_the_same_clients_comes_to_the_same_losses(simulated: Path, tmp_path: Path) -> None:
    """Up to rounding: its mean is one of float32."""
    ours = json.loads((simulated / "result.json").read_text())
    theirs = run_to_end("simulations.stock", two_sites.words(simulated / "shared.jsonl"), tmp_path, 270)[1]
    for name in ("train_loss_by_round", "eval_loss_by_round"):
        assert theirs[name] == pytest.approx(ours[name], abs=1e-4), name
        assert abs(theirs[name][0] - theirs[name][1]) > 1e-2, "rounds differ by more than that"
    assert len(theirs["server_rss_bytes"]) == len(ours["train_loss_by_round"])
    assert theirs["wall_seconds"] > 0


@pytest.mark.real
def test_a_toy_run_of_all_parts_writes_its_report(
    tmp_path: Path, simulated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The federated runs are one, which other tests look at, too; the central one is a process of its own."""
    here = f"[{','.join(json.dumps(word) for word in two_sites.words(simulated / 'shared.jsonl'))}]"
    overrides = [
        f"project.adapter_bytes={MIB}", "project.many_replies=20", "project.turns=2", "project.size_models=[random]",
        f"project.scale={here}", "project.stock_turns=0", f"project.many_sites={here}", f"project.compare={here}",
        f"project.compare_seeds=[{two_sites.SEED}]",
        f"project.report={tmp_path / 'report.json'}", "project.run_timeout_seconds=270",
    ]  # fmt: skip
    settings = compose_settings("fed_bench", " ".join(map(shlex.quote, overrides)), FederatedBenchSettings)
    monkeypatch.setenv("PYTHONPATH", str(two_sites.ROOT))
    as_a_process = bench.simulate

    def simulate(overrides: list[str], folder: Path, timeout_seconds: float) -> dict[str, Any]:
        if "project.baseline=central" in overrides:
            return as_a_process(overrides, folder, timeout_seconds)
        shutil.copytree(simulated, folder)
        done: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return done

    monkeypatch.setattr(bench, "simulate", simulate)
    done = bench.run(settings, Run(tmp_path / "run"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["benchmark"] == "fl"
    assert report["rows"] == to_plain(done["rows"])
    assert [row["part"] for row in report["rows"]] == [
        "folding",
        "memory",
        "message",
        "scale",
        "many_sites",
        "comparison",
    ]
    assert done["missed"] == sum(not row["holds"] for row in report["rows"])
    simulation, many, comparison = report["rows"][3:]
    assert many["sites_asked"] == 4
    assert (simulation["num_clients"], simulation["rounds_completed"], simulation["refused"]) == (2, 2, 0)
    assert len(simulation["server_rss_bytes"]) == 2
    [seed] = comparison["seeds"]
    assert seed["perplexity_federated"] < seed["perplexity_before"]
    assert seed["perplexity_central"] < seed["perplexity_before"]
    assert seed["perplexity_central"] != seed["perplexity_federated"]
