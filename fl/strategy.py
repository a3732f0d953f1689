"""Federated averaging of LoRA adapters, with the weights that clients report: the server's side of a round.

Knows nothing about models, data or settings files. With bfloat16 on the wire, the global adapter is rounded to bfloat16
at the end of each round, since it is what the server sends.
"""

import logging
import math
import random
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from typing_extensions import override

from fl.adapters import Adapter, AdapterIndex, PackedAdapter
from fl.aggregation.exact import MAX_REPLIES
from fl.aggregation.rules import Aggregator
from fl.compression.server import ServerLink
from fl.messages import (
    ARRAYS,
    CONFIG,
    INDEX,
    METRICS,
    PARTITION,
    SERVER_ROUND,
    from_records,
    message_bytes,
    metrics_of,
    partition_of,
    to_array_record,
    to_index_record,
)
from fl.pending import PendingMessages
from fl.rounds import ERRORS, NodesMissing, RoundFailed, RoundFold, RoundReport, RunReport, RunStopped, describe_error
from fl.run.sites import SiteRecords
from fl.run.state import Stateful

EXPIRY_GRACE_SECONDS = 5.0
"""Flower's SuperLink reports a message that has expired; if that report does not arrive either, we stop waiting."""
WAITING_LOG_SECONDS = 10.0

log = logging.getLogger(__name__)


@dataclass(eq=False)
class WeightedFedAvg(Strategy):
    """The clients' LoRA tensors, combined with the weights they report: their exact mean (FedAvg, arXiv:1602.05629), or
    what another `aggregator` makes of them.

    `run` is its own round loop. The `configure_*` and `aggregate_*` methods use the same fold, so that Flower's
    `start()` and its wrappers work too and give the same bytes. (The wrappers for differential privacy want a float32
    wire and the exact mean: they compute on the array they find in the message.)
    """

    index: AdapterIndex
    """Tensors of the run's first adapter, and their type on the wire."""
    _: KW_ONLY
    num_clients: int
    """Nodes that must be registered before round 1; later rounds use those that are still there."""
    fraction: float
    """Share of the registered nodes that take part in a round, in (0, 1]; drawn from (seed, round) over partitions."""
    seed: int
    message_ttl_seconds: float
    """Time limit of a client for one message; then it counts as failed."""
    register_timeout_seconds: float
    """Longest wait for `num_clients` nodes."""
    poll_seconds: float
    """Pause between two looks for replies."""
    aggregator: Aggregator | None = None
    """The rule from replies to the next adapter; None: the exact mean."""
    link: ServerLink | None = None
    """Compression between the server and the sites; None: adapters travel as they are."""
    quorum: int = 1
    """Good replies without which a round fails."""
    oversample: int = 0
    """Sites asked in a round beyond its share; the round ends with the first good replies of as many as its share."""
    deadline_seconds: float = math.inf
    """From here on a round waits only until it has its quorum; a site that has not replied has failed the round."""
    sites: SiteRecords = field(default_factory=lambda: SiteRecords(sys.maxsize, 0))
    """What became of each site so far, and who is left out."""
    components: Mapping[str, Stateful] = field(default_factory=dict)
    """Parts with state between rounds, such as a server optimizer, by the name under which the state is saved."""
    _partitions: dict[int, int] = field(default_factory=dict, init=False)
    _asked: list[Message] = field(default_factory=list, init=False)
    _asked_whole: RecordDict | None = field(default=None, init=False)
    """The content of the last messages, uncompressed."""
    _first_asked: list[int] = field(default_factory=list, init=False)
    _first_partitions: list[int] = field(default_factory=list, init=False)
    _needed_nodes: int = field(default=1, init=False)
    _unanswered: PendingMessages = field(default_factory=PendingMessages, init=False)
    """Messages of earlier rounds, whose replies will be dropped."""
    _queries: PendingMessages = field(default_factory=PendingMessages, init=False)
    """Messages that ask for a partition."""
    _share: int = field(default=1, init=False)
    """Good replies that the round waits for."""
    _late: int = field(default=0, init=False)
    _on_reply: Callable[[str], None] = field(default=lambda line: None, init=False)
    _stopped: Callable[[], bool] = field(default=lambda: False, init=False)

    def __post_init__(self) -> None:
        if not 1 <= self.num_clients <= MAX_REPLIES:
            raise ValueError(f"num_clients must be in [1, {MAX_REPLIES}], got {self.num_clients}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction}")
        self._aggregator = self.aggregator or Aggregator(self.index)

    def run(
        self,
        grid: Grid,
        initial: Adapter,
        *,
        num_rounds: int,
        on_round: Callable[[RoundReport], None],
        finished_rounds: int = 0,
        first_asked: Sequence[int] = (),
        on_reply: Callable[[str], None] = lambda line: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> RunReport:
        """Run all rounds, then evaluate the last adapter at the nodes of round 1, which evaluated the first one.

        A run that continues is given the number of its `finished_rounds`, the adapter of the last one, and the
        partitions that were asked in round 1 (`first_partitions`).

        `on_round` is called after every round, to record it; `on_reply` with one line for every client asked, as soon
        as it has replied or failed, to show progress. `stopped` is called between two polls for replies or nodes.

        Raises NodesMissing, RoundFailed when a round (or the last evaluation) has no good reply, and RunStopped.
        """
        self._unanswered, self._queries, self._late = PendingMessages(), PendingMessages(), 0
        packed, self._first_asked, self._first_partitions = self._aggregator.start(initial), [], [*first_asked]
        self._on_reply, self._stopped = on_reply, stopped
        self.summary()
        self._needed_nodes = self.num_clients
        for server_round in range(finished_rounds + 1, num_rounds + 1):
            packed, report = self._train_round(grid, server_round, packed)
            if server_round == 1:
                self._first_asked = [message.metadata.dst_node_id for message in self._asked]
                known = [self._partitions[node] for node in self._first_asked if node in self._partitions]
                self._first_partitions = sorted(known)
            on_round(report)
        fold = self._evaluate_round(grid, num_rounds, packed)
        return RunReport(
            adapter=packed.unpack(), evaluate=fold.evaluate_means(), clients=fold.rows, refused=fold.refused
        )

    @property
    def first_partitions(self) -> list[int]:
        """The partitions that were asked in round 1; empty where all were (`fraction` 1), whatever their partitions."""
        return self._first_partitions

    @override
    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self._messages(MessageType.TRAIN, server_round, arrays, config, self._draw(grid, server_round))

    @override
    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        sent = from_records(self._asked_whole) if self._asked_whole else None
        fold = self._fold_all("train", server_round, replies, self._fold_of(server_round, sent), sent)
        return to_array_record(self._next(server_round, sent, fold)), MetricRecord(dict(fold.train_means()))

    @override
    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self._messages(MessageType.EVALUATE, server_round, arrays, config, self._draw(grid, server_round))

    @override
    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        sent = from_records(self._asked_whole) if self._asked_whole else None
        fold = self._fold_all("evaluate", server_round, replies, RoundFold(None), sent)
        return MetricRecord(dict(fold.evaluate_means()))

    @override
    def summary(self) -> None:
        log.info(
            "weighted FedAvg: %d tensors, %d bytes as %s; %d clients, %.0f %% of them a round; %.0f s for a message; "
            "quorum %d, deadline %g s, %d clients more than needed are asked",
            len(self._aggregator.index.names),
            self._aggregator.index.tensor_bytes,
            self.index.dtype.name,
            self.num_clients,
            100 * self.fraction,
            self.message_ttl_seconds,
            self.quorum,
            self.deadline_seconds,
            self.oversample,
        )

    def _train_round(self, grid: Grid, server_round: int, packed: PackedAdapter) -> tuple[PackedAdapter, RoundReport]:
        started, late = time.perf_counter(), self._late
        messages = list(self.configure_train(server_round, to_array_record(packed), ConfigRecord(), grid))
        fold = self._fold_of(server_round, packed)
        downlink_bytes = self._exchange(grid, messages, fold, self.quorum, min(self._share, len(messages)))
        left_out = self.sites.left_out(server_round, {message.metadata.dst_node_id for message in messages})
        self._note(server_round, fold)
        self._check("train", server_round, packed, fold, self.quorum)
        packed = self._next(server_round, packed, fold)
        return packed, RoundReport(
            round=server_round,
            adapter=packed.unpack(),
            train=fold.train_means(),
            evaluate=fold.evaluate_means(),
            clients=fold.rows,
            refused=fold.refused,
            downlink_bytes=downlink_bytes,
            uplink_bytes=sum(row.uplink_bytes for row in fold.rows),
            round_seconds=time.perf_counter() - started,
            aggregate_seconds=fold.seconds,
            ledger=fold.ledger(),
            late=self._late - late,
            unused=len(messages) - len(fold.rows) - len(fold.refused),
            left_out=left_out,
        )

    def _note(self, server_round: int, fold: RoundFold) -> None:
        for row in fold.rows:
            self.sites.succeeded(row.node_id, row.partition_id)
        for refusal in fold.refused:
            self.sites.failed(refusal.node_id, server_round)

    def _evaluate_round(self, grid: Grid, server_round: int, packed: PackedAdapter) -> RoundFold:
        nodes = self._asked_first(grid) or self._draw(grid, server_round)
        arrays, fold = to_array_record(packed), RoundFold(None)
        messages = self._messages(MessageType.EVALUATE, server_round, arrays, ConfigRecord(), nodes)
        self._exchange(grid, messages, fold, self.quorum, len(messages))
        self._check("evaluate", server_round, packed, fold, 1)
        return fold

    def _check(self, phase: str, server_round: int, sent: PackedAdapter | None, fold: RoundFold, needed: int) -> None:
        """RoundFailed for a round with too few good replies, or with two of one partition."""
        good = len(fold.rows)
        if good < needed or fold.has_twins:
            state = sent.unpack() if sent else {}
            raise RoundFailed(phase, server_round, state, fold.refused, good, needed, has_twins=fold.has_twins)

    def _asked_first(self, grid: Grid) -> list[int]:
        """The nodes of round 1 that are still there. Node ids differ from run to run: a run that continues knows the
        partitions."""
        if self._first_asked:
            there = set(grid.get_node_ids())
            return [node_id for node_id in self._first_asked if node_id in there]
        nodes = self._registered(grid, self._needed_nodes)
        if not self._first_partitions:
            return nodes
        return self._by_partition(grid, nodes, self._first_partitions)

    def _messages(
        self, kind: str, server_round: int, arrays: ArrayRecord, config: ConfigRecord, nodes: list[int]
    ) -> list[Message]:
        index, about = self._aggregator.index, {**config, SERVER_ROUND: server_round}
        whole = RecordDict({ARRAYS: arrays, INDEX: to_index_record(index), CONFIG: ConfigRecord(about)})
        self._asked, self._asked_whole = [], whole
        for node_id in nodes:
            content = whole
            if self.link:
                content, compression = self.link.content(node_id, arrays, index)
                content[CONFIG] = ConfigRecord({**about, **compression})
            self._asked.append(self._message(content, node_id, kind, server_round))
        return self._asked

    def _message(self, content: RecordDict, node_id: int, kind: str, server_round: int) -> Message:
        return Message(content, node_id, kind, ttl=self.message_ttl_seconds, group_id=str(server_round))

    def _draw(self, grid: Grid, server_round: int) -> list[int]:
        """The nodes of a round. A part of them is drawn over partitions: node ids differ from run to run."""
        nodes = self._registered(grid, self.num_clients if server_round == 1 else self._needed_nodes)
        self._needed_nodes = self.quorum  # sites may leave once a run has begun, or has begun again
        if self.fraction < 1 or self.sites.needs_partitions:
            nodes = self._by_partition(grid, nodes)
        self._share = max(1, min(self.quorum, len(nodes)), round(self.fraction * len(nodes)))
        nodes = self.sites.present(self._idle(grid, nodes), server_round, min(self.quorum, len(nodes)))
        count = min(len(nodes), self._share + self.oversample)
        if count < len(nodes):
            nodes = random.Random(f"{self.seed}/{server_round}").sample(nodes, count)
        if len(nodes) > MAX_REPLIES:
            raise ValueError(f"a round must ask at most {MAX_REPLIES} nodes, got {len(nodes)}")
        return nodes

    def _idle(self, grid: Grid, nodes: list[int]) -> list[int]:
        """The nodes that do not work on an earlier round any more, as soon as they suffice for the quorum."""
        while True:
            self._drop_late(grid)
            busy = self._unanswered.nodes
            idle = [node for node in nodes if node not in busy]
            if len(idle) >= min(self.quorum, len(nodes)):
                return idle
            self._pause()

    def _drop_late(self, grid: Grid) -> None:
        """Drop and count replies to earlier rounds."""
        for node_id, reply in self._unanswered.pull(grid):
            if reply is not None and not reply.has_error():
                self._late += 1
                self.sites.was_late(node_id)

    def _registered(self, grid: Grid, needed: int) -> list[int]:
        """All registered nodes, once there are enough of them."""
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
            self._pause()
        if len(nodes) < self.num_clients:
            log.warning("%d of %d clients are registered; going on without the rest", len(nodes), self.num_clients)
        return nodes

    def _by_partition(self, grid: Grid, nodes: list[int], wanted: Collection[int] = ()) -> list[int]:
        """The nodes that have named their partition, by partition; only those of the `wanted` ones, if there are any.
        Each is asked once per run; one that is late takes part from the round on that follows its answer."""
        began = time.monotonic()
        asked = self._partitions.keys() | self._queries.nodes
        for node_id in (node for node in nodes if node not in asked):
            query = self._message(RecordDict(), node_id, MessageType.QUERY, 0)
            self._queries.push(grid, query, self.message_ttl_seconds + EXPIRY_GRACE_SECONDS)
        while True:
            for node_id, reply in self._queries.pull(grid):
                self._check_stopped()
                self._learn_partition(node_id, reply)
            known = [node for node in nodes if node in self._partitions]
            if wanted:
                known = [node for node in known if self._partitions[node] in wanted]
            is_late = time.monotonic() - began >= self.deadline_seconds and len(known) >= self.quorum
            if is_late or not self._queries.nodes & {*nodes}:
                break
            self._pause(self._queries.pause_seconds)
        if not known and not wanted:
            raise NodesMissing(f"none of {len(nodes)} registered clients named its partition")
        return sorted(known, key=lambda node_id: (self._partitions[node_id], node_id))

    def _learn_partition(self, node_id: int, reply: Message | None) -> None:
        try:
            if reply is None or reply.has_error():
                raise ValueError("no reply" if reply is None else describe_error(reply))
            partition = partition_of(metrics_of(reply.content, METRICS).get(PARTITION))
            if partition is None:
                raise ValueError(f"{METRICS}.{PARTITION} is missing")
            self._partitions[node_id] = partition
            self.sites.of(node_id, partition)
        except ValueError as error:
            log.warning("node %d did not name its partition and is left out: %s", node_id, error)

    def _exchange(self, grid: Grid, messages: list[Message], fold: RoundFold, quorum: int, share: int) -> int:
        """Fold in replies until `share` of them are good, or the deadline has passed and `quorum` are.

        Returns the bytes of the messages.
        """
        sent_bytes = {message.metadata.dst_node_id: message_bytes(message) for message in messages}

        def is_over(waited_seconds: float) -> bool:
            good = len(fold.rows)
            is_late = waited_seconds >= self.deadline_seconds and good >= quorum
            return good >= share or is_late or fold.has_twins

        for node_id, reply in self._replies(grid, messages, is_over):
            if reply is None:
                if len(fold.rows) >= share or fold.has_twins:
                    continue  # asked in addition, and not needed; or of a round that fails
                fold.refuse(node_id, ERRORS[3] if self.deadline_seconds == math.inf else "missed the round's deadline")
            else:
                fold.add(node_id, reply, 0 if reply.has_error() else message_bytes(reply), sent_bytes[node_id])
            del reply  # before the next one is pulled
            self._on_reply(fold.last_line)
        return sum(sent_bytes.values())

    def _replies(
        self, grid: Grid, messages: list[Message], is_over: Callable[[float], bool] = lambda seconds: False
    ) -> Iterator[tuple[int, Message | None]]:
        """(node, reply) as they arrive, None for a node that could not be asked or sent nothing in time.

        `is_over`, given the seconds waited, ends the waiting early. A later reply is dropped in a later round.
        """
        pending = PendingMessages()
        for message in messages:
            if not pending.push(grid, message, self.message_ttl_seconds + EXPIRY_GRACE_SECONDS):
                yield message.metadata.dst_node_id, None
        began = time.monotonic()
        while pending and not is_over(time.monotonic() - began):
            self._drop_late(grid)
            for node_id, reply in pending.pull(grid):
                self._check_stopped()  # when we are stopped, clients are killed and reply with errors
                yield node_id, reply
                del reply
                if is_over(0.0):
                    break
            if pending and not is_over(0.0):
                self._pause(pending.pause_seconds)
        self._unanswered.take(pending)
        yield from ((node_id, None) for node_id in pending.nodes)

    def _pause(self, least_seconds: float = 0.0) -> None:
        self._check_stopped()
        time.sleep(max(self.poll_seconds, least_seconds))

    def _check_stopped(self) -> None:
        if self._stopped():
            raise RunStopped("stopped")

    def _fold_of(self, server_round: int, sent: PackedAdapter | None) -> RoundFold:
        """An empty fold of the adapters that sites make of `sent`."""
        adapters, link = self._aggregator.begin(server_round, sent), self.link
        if link is None:
            return RoundFold(adapters)
        assert sent is not None, "an update is against what was sent"
        return RoundFold(adapters, lambda content, expected: link.decode(content, expected, sent))

    def _next(self, server_round: int, sent: PackedAdapter | None, fold: RoundFold) -> PackedAdapter:
        """The next adapter, as it will be sent."""
        packed = fold.packed()
        if self.link is None or sent is None:
            return packed
        return self.link.advance(server_round, sent, packed, [(row.node_id, row.partition_id) for row in fold.rows])

    def _fold_all(
        self,
        phase: str,
        server_round: int,
        replies: Iterable[Message],
        fold: RoundFold,
        sent: PackedAdapter | None,
    ) -> RoundFold:
        """All replies, folded in one by one; RoundFailed when none is good."""
        for reply in replies:
            fold.add(self._asked_node(reply), reply, 0, 0)
            del reply
        self._check(phase, server_round, sent, fold, self.quorum if phase == "train" else 1)
        return fold

    def _asked_node(self, reply: Message) -> int:
        """The node that a reply is about; for a node that cannot reply, the SuperLink does."""
        asked = {message.metadata.message_id: message.metadata.dst_node_id for message in self._asked}
        return asked.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)
