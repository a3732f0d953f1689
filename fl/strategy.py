"""Federated averaging of LoRA adapters, weighted as the clients say: the server's side of a round.

Knows nothing about models, data or settings files. A reply is checked and folded in when it arrives, and not kept.

One message a client a round. The server sends the adapter (records ARRAYS and INDEX of `fl.adapters`) and CONFIG (the
caller's values and SERVER_ROUND). A client answers
    a train message with the adapter it trained (ARRAYS, INDEX), METRICS (WEIGHT = its training examples or their answer
        tokens, PARTITION, figures of the training) and, if it has a held-out part, EVALUATE (WEIGHT = the same of that
        part, figures of the adapter it *received*);
    an evaluate message with EVALUATE if it has a held-out part, and METRICS (PARTITION) if it likes;
    a query message (sent only when `fraction` < 1) with METRICS (PARTITION);
    the first two with DATA if it likes: `lab.learning.counts.Counts`, what became of its lines, in whole numbers.

The global adapter is what travels: with bfloat16 on the wire the mean is rounded to bfloat16 at the end of each round.
"""

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fl.adapters import (
    ARRAYS,
    INDEX,
    Adapter,
    AdapterIndex,
    Packed,
    from_float32,
    index_from,
    message_bytes,
    pack,
    packed_from,
    to_array_record,
    to_float32,
    unpack,
)
from fl.aggregation import MAX_REPLIES, ExactMean, MetricMean, check_weight
from lab.faults import Fault, Lost
from lab.learning.counts import Counts

CONFIG = "config"
METRICS = "metrics"
EVALUATE = "evaluate"
DATA = "data"
WEIGHT = "weight"
PARTITION = "partition-id"
SERVER_ROUND = "server-round"

EXPIRY_GRACE_SECONDS = 5.0
"""A SuperLink itself reports a message that outlived its time; if that report does not come either, we stop waiting."""
WAITING_LOG_SECONDS = 10.0

ERRORS = {  # flwr.common.constant.ErrorCode
    0: "failed in the backend",
    1: "could not load the client app",
    2: "raised an error",
    3: "gave no reply within the message's time to live",
    4: "gave a reply that got lost",
    5: "is gone",
    6: "failed a precondition of a mod",
    7: "got a broken app bundle",
    8: "crashed",
}

log = logging.getLogger(__name__)

ConfigValues = Mapping[str, bool | int | float | str]


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A client asked in a round whose reply was not folded in, and why."""

    node_id: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class ClientRow:
    """What one client reported in one round; its figures are in `train` and `evaluate` under the names it gave them."""

    node_id: int
    partition_id: int | None
    train_weight: int
    """Weight of its adapter; 0 in an evaluation-only row."""
    evaluate_weight: int
    """Weight of its held-out figures; 0 when it reported none."""
    train: dict[str, float]
    evaluate: dict[str, float]
    uplink_bytes: int
    """Its reply as Flower serialises it; 0 under Flower's own `start()`, which does not look."""
    counts: Counts | None = None
    """What became of its lines; None when it does not say."""


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """One finished round."""

    round: int
    adapter: dict[str, torch.Tensor]
    """The new global adapter, in the wire's type."""
    train: dict[str, float]
    """Weighted means of the clients' training figures."""
    evaluate: dict[str, float]
    """Weighted means of the clients' held-out figures, of the adapter they *received*: that of the round before."""
    clients: list[ClientRow]
    """By partition; only those folded in."""
    refused: list[Refusal]
    downlink_bytes: int
    """All messages sent in the round, as Flower serialises them."""
    uplink_bytes: int
    """All replies folded in."""
    round_seconds: float
    """From the first message sent to the new adapter."""
    aggregate_seconds: float
    """Of these: checking and folding replies, and taking the mean."""


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """A finished run: the last adapter and what the clients' held-out parts say about it."""

    adapter: dict[str, torch.Tensor]
    rounds_completed: int
    evaluate: dict[str, float]
    """Weighted means of the clients' held-out figures of the last adapter."""
    clients: list[ClientRow]
    refused: list[Refusal]


class RoundFailed(Fault):
    """No client gave a good reply: the run ends. `adapter` is the last good one, `refused` what became of whom."""

    def __init__(self, phase: str, server_round: int, adapter: dict[str, torch.Tensor], refused: list[Refusal]) -> None:
        self.server_round = server_round
        self.adapter = adapter
        self.refused = refused
        reasons = "; ".join(f"node {refusal.node_id} {refusal.reason}" for refusal in refused)
        super().__init__(f"{phase} round {server_round} ended without one good reply: {reasons or 'no node was asked'}")


class NodesMissing(Lost):
    """Fewer clients registered than the run needs before the deadline."""


class RoundFold:
    """One round's replies, folded into exact sums one at a time: the same replies in any order give the same result.

    trains: whether the replies carry adapters, or held-out figures only.
    """

    def __init__(self, index: AdapterIndex, *, trains: bool) -> None:
        self._index = index
        self._mean = ExactMean(index.size) if trains else None
        self._train = MetricMean()
        self._evaluate = MetricMean()
        self._rows: list[ClientRow] = []
        self.refused: list[Refusal] = []
        self.seconds = 0.0
        self.last_line = ""

    def add(self, node_id: int, reply: Message, uplink_bytes: int) -> None:
        """Check a reply and fold it in, or refuse it as a whole, saying so once."""
        started = time.perf_counter()
        if reply.has_error():
            self.refuse(node_id, _describe_error(reply))
        else:
            try:
                self._rows.append(row := self._fold(node_id, reply.content, uplink_bytes))
                self.last_line = _describe_row(row)
            except ValueError as error:
                self.refuse(node_id, f"was refused: {error}")
        self.seconds += time.perf_counter() - started

    def refuse(self, node_id: int, reason: str) -> None:
        """Count a client out of this round."""
        self.refused.append(Refusal(node_id=node_id, reason=reason))
        self.last_line = f"node {node_id} {reason}"
        log.warning("node %d %s; the round goes on without it", node_id, reason)

    @property
    def rows(self) -> list[ClientRow]:
        """What the clients that were folded in reported, by partition."""
        return sorted(self._rows, key=lambda row: (row.partition_id is None, row.partition_id, row.node_id))

    def packed(self) -> Packed:
        """The mean adapter, packed for the wire."""
        assert self._mean is not None, "an evaluation has no adapter"
        started = time.perf_counter()
        packed = from_float32(self._mean.mean(), self._index)
        self.seconds += time.perf_counter() - started
        return packed

    def train_means(self) -> dict[str, float]:
        """Weighted means of the training figures."""
        return self._train.means()

    def evaluate_means(self) -> dict[str, float]:
        """Weighted means of the held-out figures."""
        return self._evaluate.means()

    def _fold(self, node_id: int, content: RecordDict, uplink_bytes: int) -> ClientRow:
        """Everything is checked before anything is added, so that a refused reply leaves no trace."""
        train, evaluate = _metrics(content, METRICS), _metrics(content, EVALUATE)
        row = ClientRow(
            node_id=node_id,
            partition_id=_partition(train.pop(PARTITION, None)),
            train_weight=_take_weight(METRICS, train) if self._mean else 0,
            evaluate_weight=_take_weight(EVALUATE, evaluate) if evaluate else 0,
            train=_finite(METRICS, train),
            evaluate=_finite(EVALUATE, evaluate),
            uplink_bytes=uplink_bytes,
            counts=_counts(_metrics(content, DATA)),
        )
        if self._mean:
            self._check_index(content)
            self._mean.fold(to_float32(packed_from(content, self._index), self._index), row.train_weight)
            self._train.fold(row.train, row.train_weight)
        if row.evaluate_weight:
            self._evaluate.fold(row.evaluate, row.evaluate_weight)
        return row

    def _check_index(self, content: RecordDict) -> None:
        if (difference := self._index.difference(index_from(content))) is not None:
            raise ValueError(difference)


class WeightedFedAvg(Strategy):
    """The mean of the clients' LoRA tensors, weighted by what they say (FedAvg, arXiv:1602.05629), exact.

    `run` is its own round loop. The `configure_*` and `aggregate_*` methods use the same fold, so that Flower's
    `start()` and its wrappers work too and give the same bytes. (The wrappers for differential privacy want a float32
    wire: they compute on the array they find in the message.)

    index: what every adapter of the run consists of, and its type on the wire.
    num_clients: nodes that must be registered before round 1; later rounds go on with those that are there.
    fraction: part of the registered nodes asked in a round, in (0, 1]; drawn from (seed, round) over partitions.
    message_ttl_seconds: how long a client may take for one message; then it counts as failed.
    register_timeout_seconds: how long to wait for `num_clients` nodes.
    poll_seconds: pause between two looks for replies.
    """

    def __init__(
        self,
        index: AdapterIndex,
        *,
        num_clients: int,
        fraction: float,
        seed: int,
        message_ttl_seconds: float,
        register_timeout_seconds: float,
        poll_seconds: float,
    ) -> None:
        if not 1 <= num_clients <= MAX_REPLIES:
            raise ValueError(f"num_clients must be in [1, {MAX_REPLIES}], got {num_clients}")
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {fraction}")
        self.index = index
        self.num_clients = num_clients
        self.fraction = fraction
        self.seed = seed
        self.message_ttl_seconds = message_ttl_seconds
        self.register_timeout_seconds = register_timeout_seconds
        self.poll_seconds = poll_seconds
        self._partitions: dict[int, int] = {}
        self._asked: list[Message] = []
        self._first_asked: list[int] = []
        self._on_reply: Callable[[str], None] = lambda line: None

    def run(
        self,
        grid: Grid,
        initial: Adapter,
        *,
        num_rounds: int,
        train_config: ConfigValues,
        evaluate_config: ConfigValues,
        on_round: Callable[[RoundReport], None],
        on_reply: Callable[[str], None] = lambda line: None,
    ) -> RunReport:
        """Run all rounds, then evaluate the last adapter at the nodes of round 1, which evaluated the first one.

        `on_round` is called after every round, to write it down; `on_reply` with one line for every client asked, as
        soon as it has answered or was counted out, to show progress.

        Raises NodesMissing, and RoundFailed when a round (or the last evaluation) has no good reply.
        """
        packed, self._first_asked = pack(initial, self.index), []
        self._on_reply = on_reply
        self.summary()
        for server_round in range(1, num_rounds + 1):
            packed, report = self._train_round(grid, server_round, packed, train_config)
            self._first_asked = self._first_asked or [message.metadata.dst_node_id for message in self._asked]
            on_round(report)
        fold = self._evaluate_round(grid, num_rounds, packed, evaluate_config)
        return RunReport(
            adapter=unpack(packed, self.index),
            rounds_completed=num_rounds,
            evaluate=fold.evaluate_means(),
            clients=fold.rows,
            refused=fold.refused,
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The round's train messages, one for each node drawn."""
        return self._messages(MessageType.TRAIN, server_round, arrays, config, self._draw(grid, server_round))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies, in any order and one at a time; RoundFailed when none is good."""
        fold = self._fold_all(replies, trains=True)
        if not fold.rows:
            raise RoundFailed("train", server_round, self._last_sent(), fold.refused)
        return to_array_record(fold.packed()), MetricRecord(dict(fold.train_means()))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The round's evaluate messages, to the nodes that this round trained."""
        return self._messages(MessageType.EVALUATE, server_round, arrays, config, self._draw(grid, server_round))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Weighted means of the held-out figures; RoundFailed when no reply is good."""
        fold = self._fold_all(replies, trains=False)
        if not fold.rows:
            raise RoundFailed("evaluate", server_round, self._last_sent(), fold.refused)
        return MetricRecord(dict(fold.evaluate_means()))

    def summary(self) -> None:
        """Log what was resolved, before round 1."""
        log.info(
            "weighted FedAvg: %d tensors, %d bytes as %s; %d clients, %.0f %% of them a round; %.0f s for a message",
            len(self.index.names),
            self.index.tensor_bytes,
            self.index.dtype.name,
            self.num_clients,
            100 * self.fraction,
            self.message_ttl_seconds,
        )

    def _train_round(
        self, grid: Grid, server_round: int, packed: Packed, config: ConfigValues
    ) -> tuple[Packed, RoundReport]:
        started = time.perf_counter()
        arrays, values = to_array_record(packed), ConfigRecord(dict(config))
        messages = list(self.configure_train(server_round, arrays, values, grid))
        downlink_bytes = sum(map(message_bytes, messages))
        fold = RoundFold(self.index, trains=True)
        self._exchange(grid, messages, fold)
        if not fold.rows:
            raise RoundFailed("train", server_round, unpack(packed, self.index), fold.refused)
        packed = fold.packed()
        return packed, RoundReport(
            round=server_round,
            adapter=unpack(packed, self.index),
            train=fold.train_means(),
            evaluate=fold.evaluate_means(),
            clients=fold.rows,
            refused=fold.refused,
            downlink_bytes=downlink_bytes,
            uplink_bytes=sum(row.uplink_bytes for row in fold.rows),
            round_seconds=time.perf_counter() - started,
            aggregate_seconds=fold.seconds,
        )

    def _evaluate_round(self, grid: Grid, server_round: int, packed: Packed, config: ConfigValues) -> RoundFold:
        arrays, values = to_array_record(packed), ConfigRecord(dict(config))
        fold = RoundFold(self.index, trains=False)
        there = set(grid.get_node_ids())
        nodes = [node_id for node_id in self._first_asked if node_id in there] or self._draw(grid, server_round)
        self._exchange(grid, self._messages(MessageType.EVALUATE, server_round, arrays, values, nodes), fold)
        if not fold.rows:
            raise RoundFailed("evaluate", server_round, unpack(packed, self.index), fold.refused)
        return fold

    def _messages(
        self, kind: str, server_round: int, arrays: ArrayRecord, config: ConfigRecord, nodes: list[int]
    ) -> list[Message]:
        content = RecordDict(
            {
                ARRAYS: arrays,
                INDEX: ConfigRecord({INDEX: self.index.encode()}),
                CONFIG: ConfigRecord({**config, SERVER_ROUND: server_round}),
            }
        )
        self._asked = [self._message(content, node_id, kind, server_round) for node_id in nodes]
        return self._asked

    def _message(self, content: RecordDict, node_id: int, kind: str, server_round: int) -> Message:
        return Message(content, node_id, kind, ttl=self.message_ttl_seconds, group_id=str(server_round))

    def _draw(self, grid: Grid, server_round: int) -> list[int]:
        """The nodes of a round. A part of them is drawn over partitions: node ids differ from run to run."""
        nodes = self._registered(grid, self.num_clients if server_round == 1 else 1)
        if self.fraction < 1:
            nodes = self._by_partition(grid, nodes)
            count = max(1, round(self.fraction * len(nodes)))
            nodes = random.Random(f"{self.seed}/{server_round}").sample(nodes, count)
        if len(nodes) > MAX_REPLIES:
            raise ValueError(f"a round must ask at most {MAX_REPLIES} nodes, got {len(nodes)}")
        return nodes

    def _registered(self, grid: Grid, needed: int) -> list[int]:
        """All registered nodes, once there are enough."""
        started = time.monotonic()
        last_log = -WAITING_LOG_SECONDS
        while len(nodes := sorted(grid.get_node_ids())) < needed:
            waited = time.monotonic() - started
            state = f"{len(nodes)} of {needed} clients are registered after {waited:.0f} s"
            if waited >= self.register_timeout_seconds:
                raise NodesMissing(f"{state}; gave up (register_timeout_seconds={self.register_timeout_seconds:g})")
            if waited - last_log >= WAITING_LOG_SECONDS:
                log.info("waiting for clients: %s", state)
                last_log = waited
            time.sleep(self.poll_seconds)
        if len(nodes) < self.num_clients:
            log.warning("%d of %d clients are registered; going on without the rest", len(nodes), self.num_clients)
        return nodes

    def _by_partition(self, grid: Grid, nodes: list[int]) -> list[int]:
        """The nodes that say which partition they hold, by partition; each is asked once in a run."""
        unknown = [node_id for node_id in nodes if node_id not in self._partitions]
        messages = [self._message(RecordDict(), node_id, MessageType.QUERY, 0) for node_id in unknown]
        for node_id, reply in self._replies(grid, messages):
            try:
                if reply is None or reply.has_error():
                    raise ValueError("no reply" if reply is None else _describe_error(reply))
                partition = _partition(_metrics(reply.content, METRICS).get(PARTITION))
                if partition is None:
                    raise ValueError(f"{METRICS}.{PARTITION} is missing")
                self._partitions[node_id] = partition
            except ValueError as error:
                log.warning("node %d did not name its partition and is left out: %s", node_id, error)
        known = [node_id for node_id in nodes if node_id in self._partitions]
        if not known:
            raise NodesMissing(f"none of {len(nodes)} registered clients named its partition")
        return sorted(known, key=lambda node_id: (self._partitions[node_id], node_id))

    def _exchange(self, grid: Grid, messages: list[Message], fold: RoundFold) -> None:
        for node_id, reply in self._replies(grid, messages):
            if reply is None:
                fold.refuse(node_id, ERRORS[3])
            else:
                fold.add(node_id, reply, 0 if reply.has_error() else message_bytes(reply))
            del reply  # before the next one is pulled
            self._on_reply(fold.last_line)

    def _replies(self, grid: Grid, messages: list[Message]) -> Iterator[tuple[int, Message | None]]:
        """(node, reply) as they arrive, None for a node that could not be asked or sent nothing in time.

        One message a pull: a pull of many would hold every reply that has arrived. One message a push: what a push of
        many returns when one fails differs from grid to grid.
        """
        pending: dict[str, int] = {}
        for message in messages:
            message_id = next(iter(grid.push_messages([message])), None)
            if message_id:
                pending[message_id] = message.metadata.dst_node_id
            else:
                yield message.metadata.dst_node_id, None
        deadline = time.monotonic() + self.message_ttl_seconds + EXPIRY_GRACE_SECONDS
        while pending and time.monotonic() < deadline:
            for message_id in [*pending]:
                for reply in grid.pull_messages([message_id]) if message_id in pending else ():
                    if (node_id := pending.pop(reply.metadata.reply_to_message_id, None)) is not None:
                        yield node_id, reply
                    del reply
            if pending:
                time.sleep(self.poll_seconds)
        yield from ((node_id, None) for node_id in pending.values())

    def _fold_all(self, replies: Iterable[Message], *, trains: bool) -> RoundFold:
        fold = RoundFold(self.index, trains=trains)
        for reply in replies:
            fold.add(self._asked_node(reply), reply, 0)
            del reply
        return fold

    def _asked_node(self, reply: Message) -> int:
        """The node a reply is about; the SuperLink answers in its own name for a node that cannot."""
        asked = {message.metadata.message_id: message.metadata.dst_node_id for message in self._asked}
        return asked.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)

    def _last_sent(self) -> dict[str, torch.Tensor]:
        return unpack(packed_from(self._asked[0].content, self.index), self.index) if self._asked else {}


def _describe_row(row: ClientRow) -> str:
    """`client 2: train_loss 2.1301, eval_loss 2.2010`: the losses among a client's figures."""
    losses = [f"{name} {value:.4f}" for name, value in (row.train | row.evaluate).items() if name.endswith("loss")]
    return f"client {row.node_id if row.partition_id is None else row.partition_id}: {', '.join(losses)}"


def _describe_error(reply: Message) -> str:
    """One line for an error reply; the simulation's reasons are whole tracebacks, whose last line says it."""
    code, reason = reply.error.code, reply.error.reason or ""
    last_line = (reason.strip().splitlines() or ["no reason given"])[-1]
    return f"{ERRORS.get(code, 'failed')} (Flower code {code}: {last_line[-300:]})"


def _metrics(content: RecordDict, name: str) -> dict[str, object]:
    """A copy of one MetricRecord; empty when there is none."""
    record = content.get(name)  # not content.metric_records: see fl.adapters.packed_from
    return {**record} if isinstance(record, MetricRecord) else {}


def _counts(numbers: dict[str, object]) -> Counts | None:
    try:
        return Counts.checked(numbers) if numbers else None
    except ValueError as error:
        raise ValueError(f"{DATA}.{error}") from error


def _partition(value: object) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ValueError(f"{METRICS}.{PARTITION} must be a whole number from 0 on, got {value!r}")
    return value


def _take_weight(record: str, metrics: dict[str, object]) -> int:
    """The record's weight, taken out of its figures."""
    if WEIGHT not in metrics:
        raise ValueError(f"{record}.{WEIGHT} is missing")
    try:
        return check_weight(metrics.pop(WEIGHT))
    except ValueError as error:
        raise ValueError(f"{record}.{WEIGHT}: {error}") from error


def _finite(record: str, metrics: dict[str, object]) -> dict[str, float]:
    try:
        return MetricMean.check(metrics)
    except ValueError as error:
        raise ValueError(f"{record}.{error}") from error
