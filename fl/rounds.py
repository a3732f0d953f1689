"""Reports of rounds and runs, and the fold that combines the replies of a round.

A reply is checked and folded in when it arrives, then discarded.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from flwr.app import Message, RecordDict

from fl.adapters import AdapterIndex, PackedAdapter
from fl.aggregation.exact import MetricMean, check_weight
from fl.aggregation.rules import RoundSum
from fl.messages import DATA, EVALUATE, METRICS, PARTITION, WEIGHT, from_records, metrics_of, partition_of
from lab.faults import Fault, Lost
from lab.learning.counts import Counts

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


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A client asked in a round whose reply was not folded in, and why."""

    node_id: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class ClientRow:
    """One client's part in one round; its figures are in `train` and `evaluate`, under the client's names for them."""

    node_id: int
    partition_id: int | None
    train_weight: int
    """Weight of its adapter; 0 in an evaluation-only row."""
    evaluate_weight: int
    """Weight of its held-out figures; 0 when it reported none."""
    train: dict[str, float]
    evaluate: dict[str, float]
    uplink_bytes: int
    """Size of its reply as Flower serialises it; 0 under Flower's own `start()`, where it is not measured."""
    downlink_bytes: int
    """Size of the message it was sent, likewise."""
    counts: Counts | None = None
    """Counts of its lines (read, skipped, cut, ...); None if it does not report them."""

    @property
    def site(self) -> int:
        """Number for people: of its partition, else of the node."""
        return self.node_id if self.partition_id is None else self.partition_id


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """One finished round."""

    round: int
    adapter: dict[str, torch.Tensor]
    """The new global adapter, in the number format of the wire."""
    train: dict[str, float]
    """Weighted means of the clients' training figures."""
    evaluate: dict[str, float]
    """Weighted means of the clients' held-out figures, of the adapter they *received*: that of the round before."""
    clients: list[ClientRow]
    """Rows of the clients that were folded in, by partition."""
    refused: list[Refusal]
    downlink_bytes: int
    """Bytes of all messages sent in the round, as Flower serialises them."""
    uplink_bytes: int
    """Bytes of all replies folded in."""
    round_seconds: float
    """Time from the first message sent to the new adapter."""
    aggregate_seconds: float
    """Part of `round_seconds`: checking and folding replies, and taking the mean."""
    ledger: dict[str, float] = field(default_factory=dict)
    """Norms of what the aggregation kept and lost; empty where it cannot lose anything."""
    server_rss_bytes: int = 0
    """Resident size of the server's process after the round."""
    late: int = 0
    """Replies to earlier rounds that came during this one, and were dropped."""
    unused: int = 0
    """Clients asked beyond the share of the round, whose replies it did not wait for."""
    left_out: list[str] = field(default_factory=list)
    """Sites that were not asked because they had failed too often."""


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """A finished run: the last adapter, and its figures on the clients' held-out parts."""

    adapter: dict[str, torch.Tensor]
    evaluate: dict[str, float]
    """Weighted means of the clients' held-out figures of the last adapter."""
    clients: list[ClientRow]
    refused: list[Refusal]


class RoundFailed(Fault):
    """Too few clients gave a good reply, or two nodes have one partition, which ends the run.

    `adapter` is the last good one, `refused` the reasons.
    """

    def __init__(
        self,
        phase: str,
        server_round: int,
        adapter: dict[str, torch.Tensor],
        refused: list[Refusal],
        good: int = 0,
        quorum: int = 1,
        *,
        has_twins: bool = False,
    ) -> None:
        self.server_round = server_round
        self.adapter = adapter
        self.refused = refused
        reasons = "; ".join(f"node {refusal.node_id} {refusal.reason}" for refusal in refused)
        self.ended = f"with {good} good replies of the {quorum} that it needs" if good else "without one good reply"
        if has_twins:
            self.ended = "because two nodes have one partition"
        super().__init__(f"{phase} round {server_round} ended {self.ended}: {reasons or 'no node was asked'}")


class RunStopped(RuntimeError):
    """The server was asked to stop."""


class NodesMissing(Lost):
    """Fewer clients registered than the run needs before the deadline."""


class RoundFold:
    """The replies of one round, folded into exact sums one by one: the same replies in any order give the same result.

    adapters: the sum that adapters are folded into; None where replies carry held-out figures only.
    decode: the adapter of a reply's content that must have an index.
    """

    def __init__(
        self,
        adapters: RoundSum | None,
        decode: Callable[[RecordDict, AdapterIndex], PackedAdapter] = from_records,
    ) -> None:
        self._adapters = adapters
        self._decode = decode
        self._train = MetricMean()
        self._evaluate = MetricMean()
        self._rows: list[ClientRow] = []
        self.refused: list[Refusal] = []
        self.has_twins = False
        """Whether two nodes have one partition: which of them counted would depend on the order of their replies."""
        self.seconds = 0.0
        self.last_line = ""

    def add(self, node_id: int, reply: Message, uplink_bytes: int, downlink_bytes: int) -> None:
        """Check a reply and fold it in, or refuse it as a whole with one warning. The bytes are those of the reply, and
        of the message that it answers."""
        started = time.perf_counter()
        if reply.has_error():
            self.refuse(node_id, describe_error(reply))
        else:
            try:
                self._rows.append(row := self._fold(node_id, reply.content, uplink_bytes, downlink_bytes))
                self.last_line = _describe_row(row)
            except ValueError as error:
                self.refuse(node_id, f"was refused: {error}")
        self.seconds += time.perf_counter() - started

    def refuse(self, node_id: int, reason: str) -> None:
        """Exclude a client from this round."""
        self.refused.append(Refusal(node_id=node_id, reason=reason))
        self.last_line = f"node {node_id} {reason}"
        log.warning("node %d %s; the round continues without it", node_id, reason)

    @property
    def rows(self) -> list[ClientRow]:
        """Rows of the clients that were folded in, by partition."""
        return sorted(self._rows, key=lambda row: (row.partition_id is None, row.partition_id, row.node_id))

    def packed(self) -> PackedAdapter:
        """The next adapter, packed for the wire."""
        assert self._adapters is not None, "an evaluation has no adapter"
        started = time.perf_counter()
        packed = self._adapters.result()
        self.seconds += time.perf_counter() - started
        return packed

    def ledger(self) -> dict[str, float]:
        """Norms of what the aggregation kept and lost, once `packed` has been called."""
        return self._adapters.ledger() if self._adapters else {}

    def train_means(self) -> dict[str, float]:
        """Weighted means of the training figures."""
        return self._train.means()

    def evaluate_means(self) -> dict[str, float]:
        """Weighted means of the held-out figures."""
        return self._evaluate.means()

    def _fold(self, node_id: int, content: RecordDict, uplink_bytes: int, downlink_bytes: int) -> ClientRow:
        """Check everything before adding anything, so that a refused reply changes nothing."""
        train, evaluate = metrics_of(content, METRICS), metrics_of(content, EVALUATE)
        row = ClientRow(
            node_id=node_id,
            partition_id=partition_of(train.pop(PARTITION, None)),
            train_weight=_take_weight(METRICS, train) if self._adapters else 0,
            evaluate_weight=_take_weight(EVALUATE, evaluate) if evaluate else 0,
            train=_finite(METRICS, train),
            evaluate=_finite(EVALUATE, evaluate),
            uplink_bytes=uplink_bytes,
            downlink_bytes=downlink_bytes,
            counts=_counts(metrics_of(content, DATA)),
        )
        others = (known.node_id for known in self._rows if known.partition_id == row.partition_id is not None)
        if (other := next(others, None)) is not None:
            self.has_twins = True
            raise ValueError(f"{PARTITION} must differ between nodes, got {row.partition_id} like node {other}")
        if self._adapters:
            reply = self._decode(content, self._adapters.expected(row.partition_id))
            self._adapters.fold(reply, row.partition_id, row.train_weight)
            self._train.fold(row.train, row.train_weight)
        if row.evaluate_weight:
            self._evaluate.fold(row.evaluate, row.evaluate_weight)
        return row


def _describe_row(row: ClientRow) -> str:
    """`client 2: train_loss 2.1301, eval_loss 2.2010`: the losses among a client's figures."""
    losses = [f"{name} {value:.4f}" for name, value in (row.train | row.evaluate).items() if name.endswith("loss")]
    return f"client {row.site}: {', '.join(losses)}"


def describe_error(reply: Message) -> str:
    """One line for an error reply. Reasons of the simulation are whole tracebacks: the last line is taken."""
    code, reason = reply.error.code, reply.error.reason or ""
    last_line = (reason.strip().splitlines() or ["no reason given"])[-1]
    return f"{ERRORS.get(code, 'failed')} (Flower code {code}: {last_line[-300:]})"


def _counts(numbers: dict[str, object]) -> Counts | None:
    try:
        return Counts.checked(numbers) if numbers else None
    except ValueError as error:
        raise ValueError(f"{DATA}.{error}") from error


def _take_weight(record: str, metrics: dict[str, object]) -> int:
    """Remove the weight from a record's figures, and return it."""
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
