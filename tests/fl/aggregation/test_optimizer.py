from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fl.adapters import PackedAdapter
from fl.aggregation.optimizer import ServerOptimizer
from fl.aggregation.parts import B
from fl.settings import Aggregation, ServerOptimizerName, ServerOptimizerSettings, WireDtype
from lab.settings import UserError
from tests.federated import small_settings, write_dialogues
from tests.fl.aggregation.oracle import Reply, adapter_of, aggregator_of, folded, replies_to
from tests.fl.aggregation.test_federation import federate, settings_of

NAMES = [name for name in ServerOptimizerName if name is not ServerOptimizerName.none]
RULES = [rule for rule in Aggregation if not rule.takes_ranks]
Vector = npt.NDArray[np.float64]


def optimizer_of(name: ServerOptimizerName, learning_rate: float = 0.05, momentum: float = 0.9) -> ServerOptimizer:
    found = ServerOptimizer.of(
        ServerOptimizerSettings(name=name, learning_rate=learning_rate, momentum=momentum, beta2=0.99, epsilon=1e-3)
    )
    assert found is not None
    return found


class Published:
    """The papers' formulas for one tensor, in float64 numpy."""

    def __init__(self, name: ServerOptimizerName) -> None:
        self.name, self.steps, self.first, self.second = name, 0, np.zeros(1), np.zeros(1)

    def step(self, sent: Vector, mean: Vector) -> Vector:
        gradient, self.steps = sent - mean, self.steps + 1
        if self.name is ServerOptimizerName.fedadam:
            self.first = 0.9 * self.first + 0.1 * gradient
            self.second = 0.99 * self.second + 0.01 * gradient**2
            first, second = self.first / (1 - 0.9**self.steps), self.second / (1 - 0.99**self.steps)
            return sent - 0.05 * first / (np.sqrt(second) + 1e-3)
        self.first = 0.9 * self.first + gradient
        ahead = gradient + 0.9 * self.first if self.name is ServerOptimizerName.nesterov else self.first
        return sent - 0.05 * ahead


def mean_of(replies: list[Reply], name: str) -> Vector:
    """The float64 mean, rounded to float32 as the exact mean is: Adam divides by what may be very small."""
    weights = [reply.weight for reply in replies]
    mean = np.average([reply.trained[name].double().numpy() for reply in replies], axis=0, weights=weights)
    return mean.astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NAMES)
def test_five_rounds_are_the_published_ones(name: ServerOptimizerName, rule: Aggregation) -> None:
    """rolora trains each tensor in every other round, and its momentum waits."""
    aggregator = aggregator_of(rule, 4)
    aggregator.optimizer = optimizer_of(name)
    published = {tensor: Published(name) for tensor in adapter_of(4, 0)}
    sent = aggregator.start(adapter_of(4, 0))
    for server_round in range(1, 6):
        before = sent.unpack()
        replies = replies_to(before, rule, server_round, (4, 4, 4))
        sent = folded(aggregator, server_round, sent, replies)
        trained = replies[0].trained
        for tensor, value in sent.unpack().items():
            if tensor not in trained:
                assert torch.equal(value, before[tensor])
                continue
            want = published[tensor].step(before[tensor].double().numpy(), mean_of(replies, tensor))
            np.testing.assert_allclose(value.numpy(), want, rtol=2e-7, atol=2e-7)
            assert np.abs(value.numpy() - mean_of(replies, tensor)).max() > 1e-3, "it is not the mean"


def test_a_whole_step_without_momentum_is_the_mean() -> None:
    aggregator, plain = aggregator_of(Aggregation.average, 4), aggregator_of(Aggregation.average, 4)
    aggregator.optimizer = optimizer_of(ServerOptimizerName.fedavgm, 1.0, 0.0)
    sent = aggregator.start(adapter_of(4, 0))
    replies = replies_to(sent.unpack(), Aggregation.average, 1, (4, 4))
    stepped, mean = folded(aggregator, 1, sent, replies), folded(plain, 1, sent, replies)
    np.testing.assert_allclose(stepped.array, mean.array, rtol=2e-7)
    assert aggregator.state() == {}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_goes_on_with_the_same_bytes(name: ServerOptimizerName, rule: Aggregation) -> None:
    """After three rounds: rolora has then trained B twice and A once."""

    def go(optimizer: ServerOptimizer, sent: PackedAdapter, rounds: range) -> PackedAdapter:
        aggregator = aggregator_of(rule, 4)
        aggregator.optimizer = optimizer
        for server_round in rounds:
            replies = replies_to(sent.unpack(), rule, server_round, (4, 4))
            sent = folded(aggregator, server_round, sent, replies)
        return sent

    first, start = optimizer_of(name), aggregator_of(rule, 4).start(adapter_of(4, 0))
    half = go(first, start, range(1, 4))
    state = first.state()
    whole = go(first, half, range(4, 6))
    other = optimizer_of(name)
    other.load_state(state)
    assert go(other, half, range(4, 6)).array.tobytes() == whole.array.tobytes()
    assert go(optimizer_of(name), half, range(4, 6)).array.tobytes() != whole.array.tobytes(), "its state matters"
    assert {value.dtype for value in state.values()} <= {torch.float64, torch.float32}
    assert all(place.rpartition("/")[0] in adapter_of(4, 0) for place in state)


@pytest.mark.parametrize("name", NAMES)
def test_the_state_of_another_kind_of_optimizer_is_refused(name: ServerOptimizerName) -> None:
    other = ServerOptimizerName.fedadam if name is not ServerOptimizerName.fedadam else ServerOptimizerName.nesterov
    first, sent = optimizer_of(other), adapter_of(4, 0)
    first.step(sent, adapter_of(4, 1))
    with pytest.raises(ValueError, match=rf"not of project\.server_optimizer\.name={name.name}"):
        optimizer_of(name).load_state(first.state())
    optimizer_of(other).load_state(first.state())


def test_bfloat16_on_the_wire_is_rounded_after_the_step() -> None:
    aggregator = aggregator_of(Aggregation.average, 4)
    aggregator.index = type(aggregator.index)(aggregator.index.names, aggregator.index.shapes, WireDtype.bfloat16)
    aggregator.optimizer = optimizer_of(ServerOptimizerName.nesterov)
    sent = aggregator.start(adapter_of(4, 0))
    total = aggregator.begin(1, sent)
    total.fold(PackedAdapter.pack(adapter_of(4, 1), aggregator.index), 0, 1)
    name = next(name for name in aggregator.index.names if B in name)
    before, mean = sent.unpack()[name], adapter_of(4, 1)[name].bfloat16()
    step = 0.05 * 1.9 * (before.double() - mean.double())
    assert torch.equal(total.result().unpack()[name], (before.double() - step).float().bfloat16())


def test_a_run_with_an_optimizer_gives_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, Aggregation.rolora, "project.server_optimizer.name=nesterov")
    one = federate(settings, tmp_path / "one")[0]
    assert one == federate(settings, tmp_path / "two", backwards=True)[0]
    assert one != federate(settings_of(tmp_path, Aggregation.rolora), tmp_path / "plain")[0]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ("project.aggregation=svd", "project.server_optimizer.name=nesterov"),
            r"project\.aggregation must be average, ffa or rolora, whose factors keep their basis, for "
            r"server_optimizer\.name=nesterov, got 'svd'",
        ),
        (
            ("project.server_optimizer.name=fedadam",),
            r"project\.server_optimizer\.learning_rate must be at most 0\.1 for name=fedadam, got 0\.7",
        ),
        (
            ("project.server_optimizer.name=nesterov", "project.server_optimizer.momentum=0"),
            r"project\.server_optimizer\.momentum must be greater than 0 for name=nesterov, got 0\.0",
        ),
    ],
)
def test_what_makes_no_step_is_refused(overrides: tuple[str, ...], line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{line}"):
        small_settings(write_dialogues(tmp_path / "d.jsonl", 30), 3, *overrides)
