import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fl import client_app
from fl.adapters import AdapterIndex, PackedAdapter
from fl.client import LoRAClient, Site, open_client
from fl.client_app import make_client_app
from fl.compression.messages import RUN
from fl.messages import (
    ARRAYS,
    CONFIG,
    DATA,
    EVALUATE,
    INDEX,
    METRICS,
    PARTITION,
    SERVER_ROUND,
    WEIGHT,
    from_records,
    to_array_record,
    to_records,
)
from fl.server import serve
from fl.settings import Codec, FederatedSettings, WireDtype
from lab.command.entry import Run
from lab.learning.counts import Counts
from lab.models.conversion import byte_tokenizer
from lab.models.lora import fresh_adapter
from lab.settings import UserError
from tests.federated import CANARY, InProcessGrid, files_below, forms, leaks, small_settings, write_dialogues

TRAIN_FIGURES = {"train_loss", "train_tokens", "train_seconds", "gradient_norm", "peak_rss_bytes"}


def message_of(settings: FederatedSettings, kind: str, node_id: int = 1_007) -> Message:
    adapter = fresh_adapter(settings.model, settings.project.lora, settings.seed)
    content = to_records(PackedAdapter.pack(adapter, AdapterIndex.of(adapter, WireDtype.float32)))
    content[CONFIG] = ConfigRecord({SERVER_ROUND: 1})
    return Message(content, node_id, kind, ttl=60.0, group_id="1")


def ask(grid: InProcessGrid, message: Message) -> Message:
    [reply] = grid.send_and_receive([message])
    return reply


@pytest.fixture
def settings(tmp_path: Path) -> FederatedSettings:
    return small_settings(write_dialogues(tmp_path / "data.jsonl", 30, CANARY), 2)


def grid_of(settings: FederatedSettings, app: ClientApp | None = None) -> InProcessGrid:
    return InProcessGrid(app or make_client_app(lambda context: settings), settings.project.num_clients)


def test_a_train_reply_is_the_trained_adapter_and_figures_of_the_received_one(settings: FederatedSettings) -> None:
    reply = ask(grid_of(settings), message_of(settings, "train"))
    client = open_client(settings, Site(1))
    assert {*reply.content} == {ARRAYS, INDEX, METRICS, EVALUATE, DATA}
    assert Counts.checked({**reply.content.metric_records[DATA]}) == client.split.counts
    metrics, evaluation = reply.content.metric_records[METRICS], reply.content.metric_records[EVALUATE]
    assert {*metrics} == {PARTITION, WEIGHT, *TRAIN_FIGURES}
    assert (metrics[PARTITION], metrics[WEIGHT]) == (1, len(client.split.train))
    client.load(from_records(message_of(settings, "train").content).unpack())
    assert evaluation["eval_loss"] == client.evaluate()
    client.load(from_records(reply.content).unpack())
    assert evaluation["eval_loss"] != client.evaluate()
    assert evaluation[WEIGHT] == len(client.split.held_out)


def test_an_evaluate_reply_has_no_adapter_and_a_query_reply_names_the_partition(settings: FederatedSettings) -> None:
    reply = ask(grid_of(settings), message_of(settings, "evaluate"))
    assert {*reply.content} == {METRICS, EVALUATE, DATA}
    reply = ask(grid_of(settings), Message(RecordDict(), 1_007, "query", ttl=60.0, group_id="0"))
    assert reply.content == RecordDict({METRICS: MetricRecord({PARTITION: 1})})


def test_a_site_that_holds_nothing_out_trains_and_is_not_measured(settings: FederatedSettings, tmp_path: Path) -> None:
    settings.project.data.held_out_fraction = 1e-9
    for kind, records in (("train", {ARRAYS, INDEX, METRICS, DATA}), ("evaluate", {METRICS, DATA})):
        reply = ask(grid_of(settings), message_of(settings, kind))
        assert {*reply.content} == records
        assert reply.content.metric_records[DATA]["examples_held_out"] == 0
    figures = serve(grid_of(settings), settings, Run(tmp_path / "run"))
    assert (figures["eval_loss_before"], figures["eval_loss_after"], figures["eval_sites"]) == (None, None, [])
    assert figures["rounds_completed"] == 2


def test_an_error_of_ours_reaches_the_server_as_its_own_line(settings: FederatedSettings) -> None:
    def refuse(context: Context) -> FederatedSettings:
        raise UserError("project.data.path must be a JSONL file,\n got 'nothing'")

    reply = ask(grid_of(settings, make_client_app(refuse)), message_of(settings, "train"))
    assert reply.error.reason == "project.data.path must be a JSONL file, got 'nothing'"


@pytest.mark.parametrize("key", ["model.cache_dir", "project.site_folder"])
def test_a_place_of_the_site_that_cannot_be_written_is_one_line_with_its_key(
    settings: FederatedSettings, tmp_path: Path, key: str
) -> None:
    message = message_of(settings, "train")
    message.content[CONFIG] = ConfigRecord({SERVER_ROUND: 1, RUN: "ab12"})
    settings.project.compression.uplink = Codec.int8  # which a site keeps something for
    settings.project.site_folder = str(tmp_path / "sites")
    group, name = key.split(".")
    place = write_dialogues(tmp_path / "file", 1, "") / "José, [x]"
    setattr(getattr(settings, group), name, str(place))
    reply = ask(grid_of(settings), message)
    assert reply.error.reason == f"{key} must be a folder that can be written, got {str(place)!r} (Not a directory)"


def test_a_full_disk_of_the_site_is_named(settings: FederatedSettings) -> None:
    def full(context: Context) -> FederatedSettings:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), CANARY)

    reason = ask(grid_of(settings, make_client_app(full)), message_of(settings, "train")).error.reason
    assert reason is not None
    assert reason.startswith("the site's disk is full: OSError in full (test_client_app.py:")
    assert CANARY not in reason


def quoting(context: Context) -> FederatedSettings:
    raise KeyError(CANARY)


def test_the_text_of_a_strangers_error_stays_at_the_site(
    settings: FederatedSettings, caplog: pytest.LogCaptureFixture
) -> None:
    grid = grid_of(settings, make_client_app(quoting))
    reason = ask(grid, message_of(settings, "train")).error.reason
    assert reason is not None
    assert reason.startswith("KeyError in quoting (test_client_app.py:")
    assert not leaks(grid.wire)
    assert "KeyError in quoting" in caplog.text
    assert not leaks([caplog.text.encode()])


def test_without_the_guard_the_text_of_an_error_would_travel(
    settings: FederatedSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_app, "guarded", lambda message, answer: answer())
    grid = grid_of(settings, make_client_app(quoting))
    ask(grid, message_of(settings, "train"))
    assert "text" in leaks(grid.wire)


def serve_here(settings: FederatedSettings, app: ClientApp, folder: Path) -> InProcessGrid:
    grid = grid_of(settings, app)
    serve(grid, settings, Run(folder))
    return grid


def test_no_message_and_no_server_file_holds_a_clients_text(
    settings: FederatedSettings, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    grid = serve_here(settings, make_client_app(lambda context: settings), tmp_path / "run")
    assert len(grid.wire) > 60, "every object of 12 messages and their replies was searched"
    assert "text" in leaks([(tmp_path / "data.jsonl").read_bytes()]), "it is in the clients' text"
    assert not leaks(grid.wire)
    assert not leaks(files_below(tmp_path / "run"))
    output = capfd.readouterr()
    assert not leaks([output.out.encode(), output.err.encode(), caplog.text.encode()])


Spoil = Callable[[Message, FederatedSettings], None]


def put_text_in_a_record(reply: Message, settings: FederatedSettings) -> None:
    reply.content["note"] = ConfigRecord({"note": CANARY})


def put_text_in_a_metric_name(reply: Message, settings: FederatedSettings) -> None:
    reply.content.metric_records[METRICS][CANARY] = 1.0


def writable(reply: Message) -> PackedAdapter:
    packed = from_records(reply.content)
    return PackedAdapter(packed.index, packed.array.copy())


def put_ids_in_the_adapter(reply: Message, settings: FederatedSettings) -> None:
    packed = writable(reply)
    ids = byte_tokenizer()(CANARY)["input_ids"]
    packed.array[100 : 100 + len(ids)] = ids
    reply.content[ARRAYS] = to_array_record(packed)


def put_raw_ids_in_the_adapter(reply: Message, settings: FederatedSettings) -> None:
    packed = writable(reply)
    ids = np.asarray(byte_tokenizer()(CANARY)["input_ids"], np.int32)
    packed.array[7 : 7 + len(ids)] = ids.view(np.float32)
    reply.content[ARRAYS] = to_array_record(packed)


def put_a_list_of_ids_in_a_record(reply: Message, settings: FederatedSettings) -> None:
    ids = byte_tokenizer()(CANARY)["input_ids"]
    reply.content["note"] = ConfigRecord({"ids": list(ids)})


LEAKS: list[tuple[Spoil, str]] = [
    (put_text_in_a_record, "text"),
    (put_text_in_a_metric_name, "text"),
    (put_ids_in_the_adapter, "<f4"),
    (put_raw_ids_in_the_adapter, "<i4"),
    (put_a_list_of_ids_in_a_record, "zigzag"),
]


@pytest.mark.parametrize(("spoil", "form"), LEAKS, ids=[spoil.__name__ for spoil, _ in LEAKS])
def test_a_client_that_leaks_on_purpose_is_found(
    spoil: Spoil, form: str, settings: FederatedSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = client_app.answer_train

    def leaky(message: Message, client: LoRAClient) -> Message:
        reply = honest(message, client)
        spoil(reply, settings)
        return reply

    monkeypatch.setattr(client_app, "answer_train", leaky)
    grid = grid_of(settings)
    ask(grid, message_of(settings, "train"))
    assert form in leaks(grid.wire)


def test_the_search_knows_every_form_at_any_place() -> None:
    rng = np.random.default_rng(0)
    found = {}
    for form, parts in forms(CANARY):
        noise = rng.integers(0, 256, 10_001, np.uint8).tobytes()
        assert not leaks([noise])
        found[form] = form in leaks([noise[:5_003] + parts[3] + noise[5_003:]])
    assert all(found.values()), found
    assert len(found) == 20
