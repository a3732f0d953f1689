"""Federated averaging of LoRA adapters, weighted by dataset size: the server's side of a round.

Knows nothing about models, data or settings files. A reply is checked and folded in when it arrives, and not kept.

One message a client a round. The server sends the adapter (records ARRAYS and INDEX of `fl.adapters`) and CONFIG (the
caller's values and SERVER_ROUND). A client answers a train message with the adapter it trained (ARRAYS, INDEX), METRICS
(WEIGHT = its number of training examples, PARTITION, and figures of the training) and EVALUATE (its own WEIGHT = its
number of held-out examples, and figures of the adapter it *received*); an evaluate message with METRICS (PARTITION) and
EVALUATE; a query message with METRICS (PARTITION) alone.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fl.adapters import Adapter, AdapterIndex

CONFIG = "config"
METRICS = "metrics"
EVALUATE = "evaluate"
WEIGHT = "num-examples"
PARTITION = "partition-id"
SERVER_ROUND = "server-round"


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A reply that was not folded in, and why."""

    node_id: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class ClientRow:
    """What one client reported in one round; its figures are in `train` and `evaluate` under the names it gave them."""

    node_id: int
    partition_id: int | None
    train_examples: int
    """Weight of its adapter; 0 in an evaluation-only row."""
    evaluate_examples: int
    train: dict[str, float]
    evaluate: dict[str, float]
    uplink_bytes: int
    """Its reply as Flower serialises it."""


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """One finished round. `evaluate` is about the adapter the clients received, so about the round before."""

    round: int
    adapter: dict[str, torch.Tensor]
    """The new global adapter, in the wire's type."""
    train: dict[str, float]
    """Weighted means of the clients' training figures."""
    evaluate: dict[str, float]
    """Weighted means of the clients' held-out figures of the adapter *received*."""
    clients: list[ClientRow]
    """By partition."""
    refused: list[Refusal]
    downlink_bytes: int
    """All messages sent in the round, as Flower serialises them."""
    uplink_bytes: int
    """All replies folded in."""
    round_seconds: float
    """From the first message sent to the last reply folded in."""
    aggregate_seconds: float
    """Of these: checking and folding replies, and taking the mean."""


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """A finished run: the last adapter, the reports of its rounds, and the evaluation of the last adapter."""

    adapter: dict[str, torch.Tensor]
    rounds_completed: int
    evaluate: dict[str, float]
    """Weighted means of the clients' held-out figures of the last adapter."""
    evaluate_clients: list[ClientRow]
    evaluate_refused: list[Refusal]


class RoundFailed(RuntimeError):
    """No client gave a good reply: the run ends. `adapter` is the last good one; `refused` says what became of each."""

    def __init__(self, server_round: int, adapter: dict[str, torch.Tensor], refused: list[Refusal]) -> None:
        self.server_round = server_round
        self.adapter = adapter
        self.refused = refused
        reasons = "; ".join(f"node {refusal.node_id}: {refusal.reason}" for refusal in refused) or "nobody was asked"
        super().__init__(f"round {server_round}: no good reply ({reasons})")


class NodesMissing(RuntimeError):
    """Fewer clients registered than the run needs before the deadline."""


class WeightedFedAvg(Strategy):
    """The mean of the clients' LoRA tensors weighted by their number of examples (FedAvg, arXiv:1602.05629), exact.

    index: what every adapter of the run consists of, and its type on the wire.
    num_clients: nodes that must be registered before round 1.
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
        raise NotImplementedError

    def run(
        self,
        grid: Grid,
        initial: Adapter,
        *,
        num_rounds: int,
        train_config: Mapping[str, bool | int | float | str],
        evaluate_config: Mapping[str, bool | int | float | str],
        on_round: Callable[[RoundReport], None],
    ) -> RunReport:
        """Run all rounds, then evaluate the last adapter; `on_round` is called after every round, to write it down.

        Raises NodesMissing, and RoundFailed when a round (or the last evaluation) has no good reply.
        """
        raise NotImplementedError

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The round's train messages, for Flower's own `start()` and its wrappers."""
        raise NotImplementedError

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies, in any order and one at a time; RoundFailed when none is good."""
        raise NotImplementedError

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The round's evaluate messages, for Flower's own `start()`."""
        raise NotImplementedError

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Weighted means of the held-out figures; None when nobody was asked."""
        raise NotImplementedError

    def summary(self) -> None:
        """Log what was resolved, before round 1."""
        raise NotImplementedError
