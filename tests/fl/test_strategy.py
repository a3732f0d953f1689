import itertools
import logging
import math
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping as ClientSideClipping
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping as ServerSideClipping
from flwr.supercore.task_identity import TaskIdentity

from fl.adapters import AdapterIndex, PackedAdapter
from fl.messages import (
    ADAPTER,
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
    to_index_record,
    to_records,
)
from fl.rounds import NodesMissing, RoundFailed, RoundReport, RunStopped
from fl.settings import WireDtype
from fl.strategy import WeightedFedAvg
from lab.learning.counts import Counts
from tests.federated import MemoryGrid, in_order

Handler = Callable[[Message, int], RecordDict | Error | None]
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _inside_a_run() -> None:
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1


class FakeGrid(MemoryGrid):
    """A handler answers."""

    def __init__(
        self, partitions: dict[int, int], handler: Handler, order: Callable[[list[str]], list[str]] = in_order
    ) -> None:
        super().__init__(partitions, order)
        self.handler = handler

    def answer(self, message: Message, partition: int) -> Message | None:
        answer = self.handler(message, partition)
        return None if answer is None else Message(answer, reply_to=message)


def state_of(values: np.ndarray[Any, Any]) -> dict[str, torch.Tensor]:
    half = torch.from_numpy(values.astype(np.float32))
    return {"layers.0.lora_A.weight": half.reshape(2, -1), "layers.0.lora_B.weight": half.flip(0).reshape(-1, 2)}


INITIAL = state_of(np.linspace(-1, 1, 10))
INDEX_32 = AdapterIndex.of(INITIAL, WireDtype.float32)
NODES = {1_000 + 7 * partition: partition for partition in (4, 2, 0, 5, 1, 3)}


def train(message: Message, partition: int) -> RecordDict:
    """A client whose answer depends on what it received, its partition and the round."""
    received = from_records(message.content)
    state = received.unpack()
    server_round = message.content.config_records[CONFIG][SERVER_ROUND]
    assert isinstance(server_round, int)
    rng = np.random.default_rng([partition, server_round])
    trained = {name: x.float() * 0.9 + torch.from_numpy(rng.standard_normal(x.shape)) / 7 for name, x in state.items()}
    mean = float(torch.stack([x.float().mean() for x in state.values()]).mean())
    evaluate = MetricRecord({WEIGHT: 3 + partition, "eval_loss": mean + partition / 3})
    if message.metadata.message_type == "evaluate":
        return RecordDict({METRICS: MetricRecord({PARTITION: partition}), EVALUATE: evaluate})
    content = to_records(PackedAdapter.pack(trained, received.index))
    content[METRICS] = MetricRecord(
        {WEIGHT: 10 + 3 * partition, PARTITION: partition, "train_loss": 1 / (1 + partition)}
    )
    content[EVALUATE] = evaluate
    return content


def strategy_for(index: AdapterIndex = INDEX_32, **changes: Any) -> WeightedFedAvg:
    settings: dict[str, Any] = {
        "num_clients": 6,
        "fraction": 1.0,
        "seed": 7,
        "message_ttl_seconds": 5.0,
        "register_timeout_seconds": 0.05,
        "poll_seconds": 0.001,
    }
    return WeightedFedAvg(index, **{**settings, **changes})


def arrays_of(state: dict[str, torch.Tensor], index: AdapterIndex) -> ArrayRecord:
    return to_array_record(PackedAdapter.pack(state, index))


def run(
    grid: Grid, strategy: WeightedFedAvg, num_rounds: int = 2
) -> tuple[dict[str, torch.Tensor], list[RoundReport], dict[str, float]]:
    reports: list[RoundReport] = []
    result = strategy.run(grid, INITIAL, num_rounds=num_rounds, on_round=reports.append)
    return result.adapter, reports, result.evaluate


def bytes_of(state: dict[str, torch.Tensor]) -> bytes:
    return b"".join(state[name].contiguous().view(torch.uint8).numpy().tobytes() for name in sorted(state))


def test_all_orders_of_six_replies_give_the_same_bytes_and_metrics() -> None:
    strategy = strategy_for()
    grid = FakeGrid(NODES, train)
    arrays = arrays_of(INITIAL, INDEX_32)
    messages = list(strategy.configure_train(1, arrays, ConfigRecord({"lr": 0.1}), grid))
    replies = [Message(train(message, NODES[message.metadata.dst_node_id]), reply_to=message) for message in messages]
    results = set()
    for order in itertools.permutations(replies):
        aggregated, metrics = strategy.aggregate_train(1, order)
        assert aggregated is not None
        results.add((aggregated[ADAPTER].data, str(metrics)))
    assert len(results) == 1


def test_the_round_loop_gives_the_same_bytes_in_any_order_of_arrival() -> None:
    results = set()
    for order in list(itertools.permutations(range(6)))[::31]:
        ranks = {f"m{number}": order[number % 6] for number in range(12)}
        grid = FakeGrid(NODES, train, lambda ids, ranks=ranks: sorted(ids, key=ranks.__getitem__))  # type: ignore[misc]
        adapter, reports, evaluate = run(grid, strategy_for(), num_rounds=1)
        results.add((bytes_of(adapter), str(reports[0].train), str(reports[0].evaluate), str(evaluate)))
    assert len(results) == 1


def test_the_weighted_mean_is_that_of_numpy_and_metrics_follow_their_own_weights() -> None:
    grid = FakeGrid(NODES, train)
    adapter, [report], evaluate = run(grid, strategy_for(), num_rounds=1)
    answers = [train(message, NODES[message.metadata.dst_node_id]) for message in grid.sent[:6]]
    weights = [10 + 3 * NODES[message.metadata.dst_node_id] for message in grid.sent[:6]]
    for name in INITIAL:
        want = np.average([from_records(answer).unpack()[name].numpy() for answer in answers], axis=0, weights=weights)
        np.testing.assert_allclose(adapter[name].numpy(), want, rtol=1e-6, atol=1e-7)
    partitions = np.arange(6)
    np.testing.assert_allclose(
        report.train["train_loss"], np.average(1 / (1 + partitions), weights=10 + 3 * partitions)
    )
    np.testing.assert_allclose(
        report.evaluate["eval_loss"], np.average(partitions / 3, weights=3 + partitions), atol=1e-7
    )
    assert set(report.train) == {"train_loss"}
    assert [row.partition_id for row in report.clients] == list(range(6))
    assert [row.train_weight for row in report.clients] == [10, 13, 16, 19, 22, 25]
    assert evaluate != report.evaluate


def test_round_two_starts_from_round_one_and_messages_carry_round_and_ttl() -> None:
    grid = FakeGrid(NODES, train)
    adapter, reports, _ = run(grid, strategy_for())
    assert [report.round for report in reports] == [1, 2]
    assert bytes_of(from_records(grid.sent[6].content).unpack()) == bytes_of(reports[0].adapter)
    assert bytes_of(adapter) == bytes_of(reports[1].adapter)
    kinds = [message.metadata.message_type for message in grid.sent]
    assert kinds == ["train"] * 12 + ["evaluate"] * 6
    assert {message.metadata.ttl for message in grid.sent} == {5.0}
    assert dict(grid.sent[6].content.config_records[CONFIG]) == {SERVER_ROUND: 2}


@pytest.mark.parametrize("dtype", list(WireDtype))
def test_flowers_own_start_gives_the_same_bytes(dtype: WireDtype) -> None:
    index = AdapterIndex.of(INITIAL, dtype)
    ours, reports, _ = run(FakeGrid(NODES, train), strategy_for(index), num_rounds=3)
    grid = FakeGrid(NODES, train, lambda ids: ids[::-1])
    result = strategy_for(index).start(
        grid,
        arrays_of(INITIAL, index),
        num_rounds=3,
        train_config=ConfigRecord({"lr": 0.1}),
    )
    theirs = from_records(RecordDict({ARRAYS: result.arrays, INDEX: to_index_record(index)})).unpack()
    assert bytes_of(ours) == bytes_of(theirs)
    assert result.train_metrics_clientapp[3] == reports[2].train
    assert next(iter(ours.values())).dtype is dtype.torch
    assert dict(grid.sent[0].content.config_records[CONFIG]) == {"lr": 0.1, SERVER_ROUND: 1}


def test_differential_privacy_wrappers_run_and_without_noise_and_clipping_change_next_to_nothing() -> None:
    plain, _, _ = run(FakeGrid(NODES, train), strategy_for(), num_rounds=2)
    for wrapper in (ServerSideClipping, ClientSideClipping):
        wrapped = wrapper(strategy_for(), noise_multiplier=0.0, clipping_norm=1e6, num_sampled_clients=6)
        result = wrapped.start(FakeGrid(NODES, train), arrays_of(INITIAL, INDEX_32), num_rounds=2)
        private = from_records(RecordDict({ARRAYS: result.arrays, INDEX: to_index_record(INDEX_32)})).unpack()
        for name in plain:
            torch.testing.assert_close(private[name], plain[name], rtol=1e-5, atol=1e-6)
    # The clipping one is no wrapper around nothing: a tight norm keeps the adapter close to where it began.
    clipped = ServerSideClipping(strategy_for(), noise_multiplier=0.0, clipping_norm=1e-3, num_sampled_clients=6)
    result = clipped.start(FakeGrid(NODES, train), arrays_of(INITIAL, INDEX_32), num_rounds=1)
    initial = PackedAdapter.pack(INITIAL, INDEX_32).array
    assert np.linalg.norm(result.arrays[ADAPTER].numpy() - initial) <= 1.001e-3
    assert np.linalg.norm(PackedAdapter.pack(plain, INDEX_32).array - initial) > 0.1


@pytest.mark.parametrize("wrapper", [ServerSideClipping, ClientSideClipping])
def test_the_noise_of_differential_privacy_is_on_every_value_in_its_size_and_of_its_seed(wrapper: Any) -> None:
    """Gaussian, of deviation noise_multiplier * clipping_norm / num_sampled_clients (arXiv 1710.06963), by numpy."""
    big = state_of(np.linspace(-1, 1, 10_000))
    index = AdapterIndex.of(big, WireDtype.float32)

    def mean(noise_multiplier: float, seed: int) -> np.ndarray[Any, Any]:
        wrapped = wrapper(strategy_for(index), noise_multiplier, clipping_norm=300.0, num_sampled_clients=6)
        np.random.seed(seed)
        result = wrapped.start(FakeGrid(NODES, train), arrays_of(big, index), num_rounds=1)
        return result.arrays[ADAPTER].numpy()

    plain, noisy = mean(0.0, 1), mean(0.02, 1)
    noise = noisy - plain
    assert abs(noise.std() - 1.0) < 0.05, "10 of its standard errors"
    assert abs(noise.mean()) < 0.05
    assert np.count_nonzero(noise) > 0.999 * index.size
    assert noisy.tobytes() == mean(0.02, 1).tobytes()
    assert noisy.tobytes() != mean(0.02, 2).tobytes()


def spoil(content: RecordDict, how: str) -> RecordDict | Error:
    """One bad reply of each kind; the name says which."""
    packed = from_records(content)
    state, index = packed.unpack(), packed.index
    metrics, evaluate = content.metric_records[METRICS], content.metric_records[EVALUATE]
    name = next(iter(state))

    def send(changed: dict[str, torch.Tensor], dtype: WireDtype = WireDtype.float32) -> None:
        other = AdapterIndex.of(changed, dtype)
        content.update(to_records(PackedAdapter.pack(changed, other)))

    match how:
        case "missing":
            send({key: x for key, x in state.items() if key != name})
        case "unknown":
            send({**state, "layers.0.lora_C.weight": torch.ones(2)})
        case "shape":
            send({**state, name: state[name].T})
        case "dtype":
            send(state, WireDtype.bfloat16)
        case "float64":
            content[ARRAYS] = ArrayRecord({ADAPTER: Array(np.ones(index.size))})
        case "size":
            content[ARRAYS] = to_array_record(PackedAdapter(index, np.ones(index.size + 1, np.float32)))
        case "two arrays":
            content.array_records[ARRAYS]["more"] = Array(np.ones(1, np.float32))
        case "no arrays":
            del content[ARRAYS]
        case "no index":
            del content[INDEX]
        case "index bytes":
            content[INDEX] = ConfigRecord({INDEX: b"\x00" * 40})
        case "nan" | "inf":
            state[name][0, 0] = math.nan if how == "nan" else math.inf
            send(state)
        case "range":
            state[name][0, 0] = 2.0**29
            send(state)
        case "weight 0":
            metrics[WEIGHT] = 0
        case "weight -1":
            metrics[WEIGHT] = -1
        case "weight 1.5":
            metrics[WEIGHT] = 1.5
        case "weight bool":
            metrics.__dict__["_data"][WEIGHT] = True  # Flower itself refuses to
        case "no weight":
            del metrics[WEIGHT]
        case "no metrics":
            del content[METRICS]
        case "loss nan":
            metrics["train_loss"] = math.nan
        case "loss list":
            metrics["train_loss"] = [1.0, 2.0]
        case "evaluate weight":
            evaluate[WEIGHT] = 0
        case "evaluate nan":
            evaluate["eval_loss"] = math.nan
        case "partition":
            metrics[PARTITION] = -3
        case "counts":
            content[DATA] = MetricRecord(asdict(Counts()) | {"lines_read": -1})
        case "other counts":
            content[DATA] = MetricRecord({"lines": 1})
        case "crashed":
            return Error(8, "ClientApp stopped responding.")
        case "raised":
            return Error(2, "Traceback\n  File\nValueError: client boom")
        case "gone":
            return Error(5, None)
    return content


SPOILED = {
    "counts": "data.lines_read must be a whole number from 0 on, got -1",
    "other counts": "data.answer_tokens is unknown or missing",
    "missing": "1 of 2 tensors are missing, the first is layers.0.lora_A.weight",
    "unknown": "1 tensors are unknown, the first is layers.0.lora_C.weight",
    "shape": "layers.0.lora_A.weight must have shape [2, 5], got [5, 2]",
    "dtype": "values must be float32, got bfloat16",
    "float64": "arrays.adapter must be <f4 x 20, got <f8 x 20",
    "size": "arrays.adapter must be <f4 x 20, got <f4 x 21",
    "two arrays": "the one array 'adapter'",
    "no arrays": "the one array 'adapter'",
    "no index": "index must be a ConfigRecord",
    "index bytes": "index must be an encoded adapter index",
    "nan": "values must be finite",
    "inf": "values must be finite",
    "range": "must be at most 2**29",
    "weight 0": "metrics.weight: weight must be in [1, 536870912], got 0",
    "weight -1": "got -1",
    "weight 1.5": "weight must be a positive whole number, got 1.5",
    "weight bool": "weight must be a positive whole number, got True",
    "no weight": "metrics.weight is missing",
    "no metrics": "metrics.weight is missing",
    "loss nan": "metrics.train_loss must be one finite number, got nan",
    "loss list": "metrics.train_loss must be one finite number, got [1.0, 2.0]",
    "evaluate weight": "evaluate.weight: weight must be in",
    "evaluate nan": "evaluate.eval_loss must be one finite number, got nan",
    "partition": "metrics.partition-id must be a whole number from 0 on, got -3",
    "crashed": "crashed (Flower code 8: ClientApp stopped responding.)",
    "raised": "raised an error (Flower code 2: ValueError: client boom)",
    "gone": "is gone (Flower code 5: no reason given)",
}


@pytest.mark.parametrize(("how", "reason"), SPOILED.items())
def test_a_bad_reply_is_refused_once_by_name_and_leaves_no_trace(
    how: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The round with the bad client among six is byte for byte the round of the other five, wherever it comes."""
    bad = 1_000 + 7 * 2
    others = {node_id: partition for node_id, partition in NODES.items() if node_id != bad}
    want, [want_report], _ = run(FakeGrid(others, train), strategy_for(num_clients=5), num_rounds=1)

    def handler(message: Message, partition: int) -> RecordDict | Error:
        content = train(message, partition)
        return spoil(content, how) if partition == 2 and message.metadata.message_type == "train" else content

    orders: list[Callable[[list[str]], list[str]]] = [in_order, lambda ids: ids[::-1]]
    for order in orders:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="fl.rounds"):
            got, [report], _ = run(FakeGrid(NODES, handler, order), strategy_for(), num_rounds=1)
        assert bytes_of(got) == bytes_of(want)
        assert (report.train, report.evaluate) == (want_report.train, want_report.evaluate)
        [refusal] = report.refused
        assert refusal.node_id == bad
        assert reason in refusal.reason
        [record] = caplog.records
        assert record.levelname == "WARNING"
        assert f"node {bad} " in record.getMessage()
        assert reason in record.getMessage()


def test_a_client_that_never_answers_is_counted_out_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl.strategy.EXPIRY_GRACE_SECONDS", 0.0)

    def handler(message: Message, partition: int) -> RecordDict | None:
        return None if partition == 3 and message.metadata.message_type == "train" else train(message, partition)

    _, [report], _ = run(FakeGrid(NODES, handler), strategy_for(message_ttl_seconds=0.2), num_rounds=1)
    [refusal] = report.refused
    assert refusal.node_id == 1_021
    assert "time to live" in refusal.reason
    assert len(report.clients) == 5


def test_two_nodes_with_one_partition_end_the_run_by_name() -> None:
    """Whichever replies first: the adapter must not depend on that."""
    orders: list[Callable[[list[str]], list[str]]] = [in_order, lambda ids: ids[::-1]]
    for order in orders:
        twin = FakeGrid({**NODES, 2_000: 3}, train, order)
        with pytest.raises(RoundFailed) as failed:
            run(twin, strategy_for(), num_rounds=1)
        said = str(failed.value)
        assert said.startswith("train round 1 ended because two nodes have one partition: node ")
        assert "partition-id must differ between nodes, got 3 like node " in said
        assert "2000" in said
        assert "1021" in said
        assert bytes_of(failed.value.adapter) == bytes_of(INITIAL)


def test_a_message_that_cannot_be_sent_is_counted_out() -> None:
    class Deaf(FakeGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            messages = list(messages)
            return [] if messages[0].metadata.dst_node_id == 1_000 else super().push_messages(messages)

    _, [report], _ = run(Deaf(NODES, train), strategy_for(), num_rounds=1)
    assert [refusal.node_id for refusal in report.refused] == [1_000]


def test_a_round_without_a_good_reply_ends_the_run_and_keeps_the_last_adapter() -> None:
    def handler(message: Message, partition: int) -> RecordDict | Error:
        second = message.content.config_records[CONFIG][SERVER_ROUND] == 2
        return Error(2, "boom") if second else train(message, partition)

    reports: list[RoundReport] = []
    with pytest.raises(
        RoundFailed, match=r"train round 2 ended without one good reply: node 1000 raised an error"
    ) as e:
        strategy_for().run(
            FakeGrid(NODES, handler),
            INITIAL,
            num_rounds=3,
            on_round=reports.append,
        )
    assert [report.round for report in reports] == [1]
    assert bytes_of(e.value.adapter) == bytes_of(reports[0].adapter)
    assert len(e.value.refused) == 6
    with pytest.raises(RoundFailed, match="train round 2"):
        strategy_for().start(FakeGrid(NODES, handler), arrays_of(INITIAL, INDEX_32), num_rounds=3)


def test_an_evaluation_without_a_good_reply_is_an_error() -> None:
    def handler(message: Message, partition: int) -> RecordDict | Error:
        return Error(8) if message.metadata.message_type == "evaluate" else train(message, partition)

    with pytest.raises(RoundFailed, match="evaluate round 1"):
        run(FakeGrid(NODES, handler), strategy_for(), num_rounds=1)


def test_start_names_the_node_that_the_superlink_answers_for(caplog: pytest.LogCaptureFixture) -> None:
    """Flower's own replies (time to live, node gone) come from node 1, the SuperLink."""
    strategy = strategy_for()
    grid = FakeGrid(NODES, train)
    messages = list(strategy.configure_train(1, arrays_of(INITIAL, INDEX_32), ConfigRecord(), grid))
    grid.push_messages(messages)
    replies = [
        Message(train(message, NODES[message.metadata.dst_node_id]), reply_to=message) for message in messages[1:]
    ]
    gone = Message(Error(5), reply_to=messages[0])
    gone.metadata.__dict__["_src_node_id"] = 1
    strategy.aggregate_train(1, [*replies, gone])
    assert f"node {messages[0].metadata.dst_node_id} is gone" in caplog.text


def test_it_waits_for_the_clients_and_says_so_then_gives_up(caplog: pytest.LogCaptureFixture) -> None:
    class Slow(FakeGrid):
        looks = 0

        def get_node_ids(self) -> Iterable[int]:
            self.looks += 1
            return list(self.partitions)[: min(self.looks, 6)]

    with caplog.at_level(logging.INFO, logger="fl.strategy"):
        _, [report], _ = run(Slow(NODES, train), strategy_for(register_timeout_seconds=5.0), num_rounds=1)
    assert len(report.clients) == 6
    assert "waiting for clients: 1 of 6 clients are registered" in caplog.text
    with pytest.raises(NodesMissing, match=r"6 of 7 clients are registered after .*register_timeout_seconds=0.05"):
        run(FakeGrid(NODES, train), strategy_for(num_clients=7))


def test_it_stops_when_asked_to_and_takes_no_reply_of_a_client_that_was_ended_for_a_bad_one() -> None:
    asked = []

    def handler(message: Message, partition: int) -> RecordDict | Error:
        asked.append(partition)
        return train(message, partition) if len(asked) < 4 else Error(8, "killed")

    def stop_after(answers: int, nodes: dict[int, int] = NODES) -> int:
        reports: list[RoundReport] = []
        asked.clear()
        strategy = strategy_for(register_timeout_seconds=60.0)
        with pytest.raises(RunStopped):
            strategy.run(
                FakeGrid(nodes, handler),
                INITIAL,
                num_rounds=1,
                on_round=reports.append,
                stopped=lambda: len(asked) >= answers,
            )
        assert not reports
        return len(asked)

    assert stop_after(0, {}) == 0, "while it waits for nodes"
    assert stop_after(4) == 4
    assert stop_after(6) == 6, "a round of three good replies and three errors would have been one"


def test_later_rounds_go_on_with_the_clients_that_are_left(caplog: pytest.LogCaptureFixture) -> None:
    def handler(message: Message, partition: int) -> RecordDict:
        if len(grid.waiting) == 0:
            grid.partitions.pop(1_000, None)  # it leaves when all have answered in round 1
        return train(message, partition)

    grid = FakeGrid(dict(NODES), handler)
    _, reports, _ = run(grid, strategy_for())
    assert [len(report.clients) for report in reports] == [6, 5]
    assert "5 of 6 clients are registered" in caplog.text


def test_a_fraction_is_drawn_over_partitions_so_that_node_ids_do_not_matter() -> None:
    def handler(message: Message, partition: int) -> RecordDict:
        if message.metadata.message_type == "query":
            return RecordDict({METRICS: MetricRecord({PARTITION: partition})})
        return train(message, partition)

    def partitions(nodes: dict[int, int], seed: int) -> list[list[int | None]]:
        grid = FakeGrid(nodes, handler)
        _, reports, _ = run(grid, strategy_for(fraction=0.5, seed=seed), num_rounds=4)
        assert sum(message.metadata.message_type == "query" for message in grid.sent) == 6
        return [[row.partition_id for row in report.clients] for report in reports]

    other_ids = {9_000 - 13 * partition: partition for partition in range(6)}
    drawn = partitions(NODES, 7)
    assert drawn == partitions(other_ids, 7)
    assert drawn != partitions(NODES, 8)
    assert [len(row) for row in drawn] == [3, 3, 3, 3]
    assert len({tuple(row) for row in drawn}) > 1


def test_bytes_are_those_of_the_real_messages() -> None:
    big = state_of(np.linspace(-1, 1, 60_000))
    index = AdapterIndex.of(big, WireDtype.float32)
    reports: list[RoundReport] = []
    strategy_for(index).run(
        FakeGrid(NODES, train),
        big,
        num_rounds=1,
        on_round=reports.append,
    )
    [report] = reports
    assert 6 * index.tensor_bytes < report.downlink_bytes <= 6 * 1.01 * index.tensor_bytes
    assert report.uplink_bytes == sum(row.uplink_bytes for row in report.clients)
    assert report.downlink_bytes == sum(row.downlink_bytes for row in report.clients)
    assert all(index.tensor_bytes < row.downlink_bytes <= 1.01 * index.tensor_bytes for row in report.clients)
    assert 6 * index.tensor_bytes < report.uplink_bytes <= 6 * 1.01 * index.tensor_bytes


def aggregate_peak_bytes(replies: int, adapter_bytes: int) -> int:
    """tracemalloc's peak of aggregate_train over generated replies; the full size (1,000 x 16 MiB) is a benchmark's."""
    index = AdapterIndex(("lora",), ((adapter_bytes // 4,),), WireDtype.float32)
    strategy = strategy_for(index)
    rng = np.random.default_rng(0)

    def generated() -> Iterator[Message]:
        for number in range(replies):
            content = to_records(PackedAdapter(index, rng.standard_normal(index.size, np.float32)))
            content[METRICS] = MetricRecord({WEIGHT: 1 + number})
            yield Message(content, 1, "train")

    tracemalloc.start()
    try:
        arrays, _ = strategy.aggregate_train(1, generated())
        assert arrays is not None
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_server_memory_does_not_grow_with_the_number_of_replies() -> None:
    few, many = aggregate_peak_bytes(2, MIB), aggregate_peak_bytes(200, MIB)
    assert many - few <= 2 * MIB


def test_the_round_loop_holds_one_reply_at_a_time() -> None:
    """Peak of `run` with 100 clients of 1 MiB replies that are all ready at once."""
    size = MIB // 4
    index = AdapterIndex(("lora",), ((size,),), WireDtype.float32)

    def handler(message: Message, partition: int) -> RecordDict:
        content = to_records(PackedAdapter(index, np.full(size, partition, np.float32)))
        content[METRICS] = MetricRecord({WEIGHT: 1})
        content[EVALUATE] = MetricRecord({WEIGHT: 1, "eval_loss": 0.0})
        return content

    def peak(clients: int) -> int:
        grid = FakeGrid({100 + number: number for number in range(clients)}, handler)
        tracemalloc.start()
        try:
            strategy_for(index, num_clients=clients).run(
                grid,
                {"lora": torch.zeros(size)},
                num_rounds=1,
                on_round=lambda report: None,
            )
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(2), peak(100)
    assert many - few <= 2 * MIB


@pytest.mark.parametrize(("change", "message"), [({"num_clients": 0}, "num_clients"), ({"fraction": 0.0}, "fraction")])
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message} must be in"):
        strategy_for(**change)
