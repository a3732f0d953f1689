import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context
from safetensors.torch import load_file

from fl.checkpoint import latest_adapter
from fl.client import Site, open_client, read_all
from fl.client_app import make_client_app
from fl.rounds import RoundFailed
from fl.run.page import header
from fl.server import first_adapter, serve
from fl.settings import FederatedSettings
from lab.command.entry import Run
from lab.models.conversion import byte_tokenizer
from lab.settings import UserError, to_plain
from tests.federated import InProcessGrid, small_settings, write_dialogues


def federate(settings: FederatedSettings, folder: Path) -> dict[str, Any]:
    grid = InProcessGrid(make_client_app(lambda context: settings), settings.project.num_clients)
    return serve(grid, settings, Run(folder))


def test_every_round_leaves_an_adapter_and_a_row_and_the_result_says_what_they_say(tmp_path: Path) -> None:
    settings = small_settings(write_dialogues(tmp_path / "d.jsonl", 30), 3)
    figures = federate(settings, tmp_path / "run")
    folders = sorted(path.name for path in (tmp_path / "run" / "adapters").iterdir())
    assert folders == ["round-0000", "round-0001", "round-0002"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("step") for row in rows] == [1, 2, None]
    assert {key: rows[-1][key] for key in figures} == to_plain(figures)
    assert [row["eval_loss_before"] for row in rows[:2]] == [
        figures["eval_loss_before"],
        figures["eval_loss_by_round"][0],
    ]
    assert all(row["server_rss_bytes"] > 2**27 and row["replies"] == 3 for row in rows[:2])
    assert figures["eval_loss_after"] < figures["eval_loss_before"]
    assert [sorted(row["by_site"]) for row in rows[:2]] == [["0", "1", "2"]] * 2
    for row in rows[:2]:
        for name in ("uplink_bytes", "downlink_bytes"):
            assert sum(site[name] for site in row["by_site"].values()) == row[name]
        assert all(site["train_seconds"] > 0 and site["peak_rss_bytes"] > 2**27 for site in row["by_site"].values())
    page = Path(figures["report"]).read_text()
    assert page.count("<img") == len(figures["plots"]) == 1
    for row in rows[:2]:
        assert f"{row['eval_loss_before']:.4f}" in page
    assert "<script" not in page


def test_the_table_of_rounds_grows_with_every_round(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fl.server")
    federate(small_settings(write_dialogues(tmp_path / "d.jsonl", 30), 3), tmp_path / "run")
    table = [record.message for record in caplog.records if record.message.startswith(("table of", "round "))]
    assert table[0] == f"table of rounds: {header()}"
    assert [line.split(":")[0] for line in table[1:]] == ["round 1 of 2", "round 2 of 2"]
    assert all("3 of 3" in line for line in table[1:])


def test_the_run_goes_on_without_a_client_that_cannot_read_its_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own log names the line, the server is told the number."""
    data = write_dialogues(tmp_path / "d.jsonl", 30)
    good = federate(small_settings(data, 3), tmp_path / "good")
    assert good["refused"] == []
    lines = data.read_text().splitlines()
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join([*lines[:-1], lines[-1][:-1]]) + "\n")
    figures = federate(small_settings(bad, 3), tmp_path / "run")
    assert figures["rounds_completed"] == 2
    assert len(figures["refused"]) == 2
    told = "project.data must hold lines that can be learnt from, got 1 of 10 malformed (named in the site's own log)"
    assert all(told in line for line in figures["refused"])
    own = [r.message for r in caplog.records if r.name == "fl.client_app"]
    assert own
    assert all(line.startswith(f"{bad}:30 must be one JSON object, got: ") for line in own)
    assert not any(f"{bad}:30" in r.message for r in caplog.records if r.name != "fl.client_app")
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["refused"] for row in rows[:2]] == [1, 1]


def test_when_all_fail_in_a_later_round_the_last_good_adapter_is_on_disk(tmp_path: Path) -> None:
    settings = small_settings(write_dialogues(tmp_path / "d.jsonl", 30), 2)
    asked = []

    def fails_from_the_second_round(context: Context) -> FederatedSettings:
        asked.append(context)
        if len(asked) > 2:
            raise UserError("project.data.path must be a JSONL file, got nothing")
        return settings

    grid = InProcessGrid(make_client_app(fails_from_the_second_round), 2)
    with pytest.raises(RoundFailed, match="train round 2 ended without one good reply") as failed:
        serve(grid, settings, Run(tmp_path / "run"))
    assert [refusal.reason for refusal in failed.value.refused] == [
        "raised an error (Flower code 2: project.data.path must be a JSONL file, got nothing)"
    ] * 2
    adapter = latest_adapter(tmp_path / "run" / "adapters")
    assert adapter is not None
    assert adapter.name == "round-0001"
    warm = small_settings(tmp_path / "d.jsonl", 2, f"project.warm_start={adapter}")
    left = first_adapter(warm)
    assert all(torch.equal(left[name], failed.value.adapter[name]) for name in left)
    fresh = first_adapter(settings)
    assert not all(torch.equal(left[name], fresh[name]) for name in left)


def test_the_same_run_twice_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    data = write_dialogues(tmp_path / "d.jsonl", 30)
    tensors = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        figures = federate(small_settings(data, 2, f"seed={seed}", "project.rounds=1"), tmp_path / name)
        tensors.append((figures["adapter_path"] / "adapter_model.safetensors").read_bytes())
    assert tensors[0] == tensors[1] != tensors[2]


def test_each_site_says_what_became_of_its_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    data = write_dialogues(tmp_path / "d.jsonl", 40)
    with data.open("a") as file:
        file.write(json.dumps({"prompt": "long", "response": "x" * 200}) + "\n")
        file.write("\n" + json.dumps({"messages": [{"role": "user", "content": "no answer"}]}) + "\n")
    settings = small_settings(data, 2, "project.data.max_held_out=null", "project.weighting=answer_tokens")
    figures = federate(settings, tmp_path / "run")
    splits = read_all(settings, byte_tokenizer())
    assert figures["sites"] == {str(index): split.counts for index, split in enumerate(splits)}
    assert sum(split.counts.lines_read for split in splits) == 42
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["sites"] == rows[-1]["sites"] == to_plain(figures["sites"])
    assert "sites" not in rows[1], "said once"
    said = [record for record in caplog.records if record.name == "fl.server"]
    for index, split in enumerate(splits):
        assert f"client {index}: {split.counts.line()}" in [record.message for record in said]
    [cut] = [record.message for record in said if "cut before their end token" in record.message]
    assert "1 of " in cut
    assert "project.data.sequence_length=206 would hold all of them" in cut
    assert figures["weighting"] == "answer_tokens"
    assert "the mean is weighted by each client's number of answer tokens" in caplog.text
    assert "numbers of answer tokens" in (figures["adapter_path"] / "README.md").read_text()


def test_the_mean_is_weighted_as_the_settings_say(tmp_path: Path) -> None:
    data = write_dialogues(tmp_path / "d.jsonl", 30)
    for weighting in ("examples", "answer_tokens"):
        settings = small_settings(data, 2, f"project.weighting={weighting}", "project.rounds=1")
        figures = federate(settings, tmp_path / weighting)
        clients = [open_client(settings, Site(index)) for index in range(2)]
        start = first_adapter(settings)
        trained = []
        for client in clients:
            client.load(start)
            trained.append(client.train(1)[0])
        train = [client.split.train for client in clients]
        tokens = [sum(example.targets for example in part) for part in train]
        weights = tokens if weighting == "answer_tokens" else [len(part) for part in train]
        assert weights[0] != weights[1]
        mean = load_file(figures["adapter_path"] / "adapter_model.safetensors")
        for name in start:
            expected = np.average([adapter[name].double().numpy() for adapter in trained], axis=0, weights=weights)
            assert np.abs(mean[name].numpy() - expected).max() < 1e-7


def test_before_and_after_are_measured_over_the_same_clients(tmp_path: Path) -> None:
    """A learning rate of next to nothing: the model stands still, and so does its loss."""
    data = write_dialogues(tmp_path / "d.jsonl", 60)
    still = ("project.fraction=0.5", "project.rounds=3", "project.optimization.learning_rate=1e-9")
    figures = federate(small_settings(data, 4, *still), tmp_path / "run")
    assert len(figures["eval_sites"]) == 2
    assert figures["eval_loss_after"] == pytest.approx(figures["eval_loss_before"], rel=1e-5)
    other = [loss for loss in figures["eval_loss_by_round"] if abs(loss / figures["eval_loss_before"] - 1) > 1e-5]
    assert other, "control: other clients were asked in between"


def test_a_part_of_the_clients_and_a_bfloat16_wire(tmp_path: Path) -> None:
    data = write_dialogues(tmp_path / "d.jsonl", 30)
    whole = federate(small_settings(data, 4), tmp_path / "whole")
    half = federate(small_settings(data, 4, "project.fraction=0.5", "project.wire_dtype=bfloat16"), tmp_path / "half")
    assert half["adapter_bytes"] * 2 == whole["adapter_bytes"]
    assert half["adapter_bytes"] < half["uplink_bytes_per_client_round"] < half["adapter_bytes"] + 4096
    rows = [json.loads(line) for line in (tmp_path / "half" / "metrics.jsonl").read_text().splitlines()]
    assert [row["replies"] for row in rows[:2]] == [2, 2]
