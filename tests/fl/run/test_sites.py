"""Rounds whose sites fail, vanish or are slow: what a round waits for, and whom the next ones ask."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator

import pytest
from flwr.app import Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fl.messages import METRICS, PARTITION
from fl.rounds import RoundFailed
from fl.run.sites import SiteRecord, SiteRecords
from fl.settings import FederatedSettings
from lab.command.entry import compose_settings
from lab.settings import UserError
from tests.fl.test_strategy import INITIAL, NODES, FakeGrid, bytes_of, run, strategy_for, train

NODE = {partition: node for node, partition in NODES.items()}


@pytest.fixture(autouse=True)
def _inside_a_run() -> None:
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1


def answer(message: Message, partition: int) -> RecordDict:
    if message.metadata.message_type == "query":
        return RecordDict({METRICS: MetricRecord({PARTITION: partition})})
    return train(message, partition)


class SlowGrid(FakeGrid):
    """Replies of the `slow` partitions can be pulled only after they were looked for `looks` times, and when a round
    that is `rounds` later has begun. `kind` says which messages are slow."""

    def __init__(self, slow: set[int], *, looks: int = 0, rounds: int = 0, kind: str = "train") -> None:
        super().__init__(NODES, answer)
        self.slow, self.looks, self.rounds, self.kind = slow, looks, rounds, kind
        self.looked: dict[str, int] = {}

    def is_ready(self, message: Message) -> bool:
        """Whether a reply has come."""
        number = message.metadata.message_id
        self.looked[number] = self.looked.get(number, 0) + 1
        newest = max(int(sent.metadata.group_id) for sent in self.sent)
        later = newest - int(message.metadata.group_id)
        is_slow = (
            self.partitions[message.metadata.dst_node_id] in self.slow and message.metadata.message_type == self.kind
        )
        return not is_slow or (self.looked[number] > self.looks and later >= self.rounds)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for message_id in message_ids:
            message = self.waiting.get(message_id)
            if message is None or not self.is_ready(message):
                continue
            del self.waiting[message_id]
            answer = self.answer(message, self.partitions[message.metadata.dst_node_id])
            assert answer is not None
            yield answer


def asked(grid: FakeGrid, server_round: int, kind: str = "train") -> list[int]:
    """The partitions that were asked in a round."""
    found = [m for m in grid.sent if m.metadata.message_type == kind and m.metadata.group_id == str(server_round)]
    return sorted(NODES[message.metadata.dst_node_id] for message in found)


def test_a_round_ends_at_its_deadline_with_its_quorum_and_late_replies_are_dropped() -> None:
    grid = SlowGrid({4}, rounds=3)
    _, reports, _ = run(grid, strategy_for(quorum=4, deadline_seconds=0.01), num_rounds=8)
    assert [row.partition_id for row in reports[0].clients] == [0, 1, 2, 3, 5]
    assert [refusal.reason for refusal in reports[0].refused] == ["missed the round's deadline"]
    assert [number for number in range(1, 9) if 4 in asked(grid, number)] == [1, 5], "between, it works on round 1"
    assert [report.late for report in reports] == [0, 0, 0, 1, 0, 0, 0, 1]
    assert all(4 not in [row.partition_id for row in report.clients] for report in reports), "no late reply counts"


def test_a_reply_between_two_rounds_is_late_and_an_error_is_not() -> None:
    class BetweenRounds(SlowGrid):
        is_between = False

        def get_node_ids(self) -> Iterable[int]:
            self.is_between = True
            return super().get_node_ids()

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            self.is_between = False
            return super().push_messages(messages)

        def is_ready(self, message: Message) -> bool:
            return self.is_between or self.partitions[message.metadata.dst_node_id] not in self.slow

        def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
            for message_id in message_ids:
                message = self.waiting[message_id]
                if self.partitions[message.metadata.dst_node_id] == 5 and self.is_ready(message):
                    del self.waiting[message_id]
                    yield Message(Error(3, "gone"), reply_to=message)
                else:
                    yield from super().pull_messages([message_id])

    strategy = strategy_for(quorum=4, deadline_seconds=0.01)
    _, reports, _ = run(BetweenRounds({4, 5}), strategy, num_rounds=3)
    assert [report.late for report in reports] == [0, 1, 1]
    assert {record.partition: record.late for record in strategy.sites.records if record.late} == {None: 2}


def test_a_node_that_is_late_to_name_its_partition_holds_no_round_up() -> None:
    """It takes part once its answer has come."""
    grid, began = SlowGrid({4}, rounds=3, kind="query"), time.monotonic()
    strategy = strategy_for(fraction=0.99, quorum=4, deadline_seconds=0.05, message_ttl_seconds=60.0)
    _, reports, _ = run(grid, strategy, num_rounds=6)
    assert time.monotonic() - began < 30
    assert [4 in [row.partition_id for row in report.clients] for report in reports] == [False] * 3 + [True] * 3
    queries = [m for m in grid.sent if m.metadata.message_type == "query" and NODES[m.metadata.dst_node_id] == 4]
    assert len(queries) == 1
    assert [report.late for report in reports] == [0] * 6


def test_nodes_that_have_not_named_their_partition_are_waited_for_where_the_quorum_needs_them() -> None:
    strategy = strategy_for(fraction=0.99, quorum=5, deadline_seconds=0.001, message_ttl_seconds=60.0)
    _, [report], _ = run(SlowGrid({2, 4}, looks=20, kind="query"), strategy, num_rounds=1)
    assert len(report.clients) >= 5


def test_a_node_that_starts_again_keeps_the_record_of_its_site() -> None:
    sites = SiteRecords(3, 2)
    sites.succeeded(7, 1)
    sites.failed(7, 1)
    sites.failed(7, 2)
    sites.succeeded(8, 1)
    [record] = sites.records
    assert (record.node_id, record.partition, record.failures, record.failures_in_row) == (8, 1, 2, 0)


def test_the_mean_is_that_of_the_replies_in_time() -> None:
    """The same bytes as a federation in which the slow site does not exist."""
    slow, _, _ = run(SlowGrid({4}, rounds=9), strategy_for(quorum=4, deadline_seconds=0.01), num_rounds=2)
    others = {node: partition for node, partition in NODES.items() if partition != 4}
    absent, _, _ = run(FakeGrid(others, train), strategy_for(num_clients=5), num_rounds=2)
    assert bytes_of(slow) == bytes_of(absent)
    everyone, _, _ = run(FakeGrid(NODES, train), strategy_for(), num_rounds=2)
    assert bytes_of(slow) != bytes_of(everyone), "a negative control"


def test_without_its_quorum_a_round_waits_beyond_the_deadline_and_then_fails() -> None:
    grid = SlowGrid({4}, looks=30)
    _, reports, _ = run(grid, strategy_for(quorum=6, deadline_seconds=0.001), num_rounds=1)
    assert len(reports[0].clients) == 6

    def fails(message: Message, partition: int) -> RecordDict | Error:
        return Error(0, "gone") if partition in (1, 2) else train(message, partition)

    with pytest.raises(
        RoundFailed, match="train round 1 ended with 4 good replies of the 5 that it needs: node"
    ) as why:
        run(FakeGrid(NODES, fails), strategy_for(quorum=5))
    assert len(why.value.refused) == 2


def test_the_last_evaluation_wants_its_quorum_beyond_the_deadline() -> None:
    grid = SlowGrid({1, 2, 3, 4, 5}, looks=20, kind="evaluate")
    strategy = strategy_for(quorum=4, deadline_seconds=0.001)
    result = strategy.run(grid, INITIAL, num_rounds=1, on_round=lambda report: None)
    assert len(result.clients) >= 4


def test_a_run_that_continues_is_evaluated_at_the_quorum_of_the_sites_of_round_1() -> None:
    """Although others have named their partition long before."""
    grid = SlowGrid({3, 4, 5}, looks=20, kind="query")
    strategy = strategy_for(fraction=0.5, quorum=3, deadline_seconds=0.001, message_ttl_seconds=60.0)
    result = strategy.run(
        grid, INITIAL, num_rounds=1, finished_rounds=1, first_asked=[3, 4, 5], on_round=lambda report: None
    )
    assert [row.partition_id for row in result.clients] == [3, 4, 5]


def test_more_are_asked_than_are_needed_and_the_first_count() -> None:
    grid = SlowGrid({0, 3}, rounds=9)
    _, reports, _ = run(grid, strategy_for(fraction=0.5, oversample=2))
    for report, most in zip(reports, (5, 4), strict=True):
        assert len(asked(grid, report.round)) == most, "of 6; the second round cannot ask the slow"
        assert len(report.clients) == 3
        assert report.unused == most - 3
        assert report.refused == [], "who was not needed has not failed"
        assert not {row.partition_id for row in report.clients} & {0, 3}


def test_a_site_that_fails_three_rounds_in_a_row_is_left_out_for_a_while(caplog: pytest.LogCaptureFixture) -> None:
    def fails(message: Message, partition: int) -> RecordDict | Error:
        return Error(8, "killed") if partition == 2 else train(message, partition)

    grid = FakeGrid(NODES, fails)
    _, reports, _ = run(grid, strategy_for(sites=SiteRecords(3, 2)), num_rounds=9)
    assert [number for number in range(1, 10) if 2 in asked(grid, number)] == [1, 2, 3, 6, 7, 8]
    said = [record.message for record in caplog.records if "in a row" in record.message]
    assert len(said) == 2
    assert re.fullmatch(r"node \d+ failed 3 rounds in a row and is left out of the next 2", said[0])
    assert [len(report.left_out) for report in reports] == [0, 0, 0, 1, 1, 0, 0, 0, 1]


def test_a_good_reply_ends_the_row() -> None:
    fails_in = {1, 2, 4, 5}

    def fails(message: Message, partition: int) -> RecordDict | Error:
        bad = partition == 2 and int(message.metadata.group_id) in fails_in
        return Error(8, "killed") if bad else train(message, partition)

    grid = FakeGrid(NODES, fails)
    run(grid, strategy_for(sites=SiteRecords(3, 2)), num_rounds=6)
    assert all(2 in asked(grid, number) for number in range(1, 7))


def test_those_left_out_come_back_when_the_quorum_needs_them() -> None:
    records = SiteRecords(1, 5)
    for node, failed_in in ((1, 2), (2, 1), (3, 3)):
        records.failed(node, failed_in)
    assert records.present([1, 2, 3, 4], 4, 1) == [4]
    assert records.present([1, 2, 3, 4], 4, 2) == [2, 4], "the longest left out first"
    assert records.present([1, 2, 3, 4], 7, 1) == [2, 4], "its time is over"
    assert records.left_out(4, {2, 4}) == ["node 1", "node 3"], "who came back is not left out"


def test_a_run_that_continues_knows_its_sites_by_partition() -> None:
    before = SiteRecords(1, 3)
    before.of(11, 4)
    before.failed(11, 2)
    records = SiteRecords(1, 3, before.records)
    assert records.needs_partitions
    assert records.present([77], 3, 0) == [77], "nobody knows who that is"
    records.of(77, 4)
    assert records.present([77], 3, 0) == []
    assert not records.needs_partitions
    assert records.records == [SiteRecord(node_id=77, partition=4, failures=1, left_out_until=5)]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("project.quorum=5", "project.quorum must be in [1, 4], the clients of a round, got 5"),
        ("project.fraction=0.5 project.quorum=3", "project.quorum must be in [1, 2], the clients of a round, got 3"),
        ("project.oversample=1", "project.oversample must be in [0, 0], the other clients, got 1"),
        ("project.round_deadline_seconds=0", "project.round_deadline_seconds must be null or in (0, reply_timeout"),
        ("project.max_failures=0", "project.max_failures must be at least 1, got 0"),
    ],
)
def test_a_round_that_cannot_be_is_refused_in_a_line(words: str, line: str) -> None:
    with pytest.raises(UserError, match=re.escape(line)):
        compose_settings("fed_learn", words, FederatedSettings)
