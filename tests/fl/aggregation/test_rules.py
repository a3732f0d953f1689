import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fl.adapters import PackedAdapter
from fl.aggregation.parts import A, B, cut, factors_of, modules_of, trained_halves
from fl.settings import Aggregation
from lab.faults import Fault
from tests.fl.aggregation.oracle import (
    SCALE,
    SHAPES,
    Reply,
    adapter_of,
    aggregator_of,
    dense,
    distance,
    folded,
    mean_product,
    norm,
    replies_to,
)

EXACT = (Aggregation.ffa, Aggregation.rolora, Aggregation.stack)
RANKS = (4, 8, 16, 32)


def rounds_of(
    rule: Aggregation, ranks: tuple[int, ...], rounds: int, residual_rank: int
) -> list[tuple[list[Reply], PackedAdapter, dict[str, float]]]:
    """Replies, next adapter and ledger of each round."""
    rank = max(ranks)
    aggregator = aggregator_of(rule, rank, site_ranks=ranks if len(set(ranks)) > 1 else (), residual_rank=residual_rank)
    sent, found = aggregator.start(adapter_of(rank, 0, is_new=True)), []
    for server_round in range(1, rounds + 1):
        replies = replies_to(sent.unpack(), rule, server_round, ranks)
        total = aggregator.begin(server_round, sent)
        for reply in replies:
            total.fold(PackedAdapter.pack(reply.trained, total.expected(reply.site)), reply.site, reply.weight)
        sent = total.result()
        found.append((replies, sent, total.ledger()))
    return found


@pytest.mark.parametrize("rule", EXACT)
def test_the_exact_rules_are_the_dense_mean_in_every_round(rule: Aggregation) -> None:
    for replies, sent, _ in rounds_of(rule, (4, 4, 4), 4, residual_rank=48):
        want = mean_product(replies)
        assert distance(dense(sent.unpack()), want) <= 1e-6 * norm(want)


def test_the_mean_of_the_factors_is_not_the_mean_product() -> None:
    """The negative control, and the reason why the other rules exist."""
    for replies, sent, _ in rounds_of(Aggregation.average, (4, 4, 4), 2, residual_rank=0):
        want = mean_product(replies)
        assert distance(dense(sent.unpack()), want) > 0.1 * norm(want)


def test_stack_takes_sites_of_different_ranks_and_no_more_rows_than_the_matrix() -> None:
    found = rounds_of(Aggregation.stack, (2, 4, 8), 5, residual_rank=48)
    for replies, sent, ledger in found:
        want = mean_product(replies)
        assert distance(dense(sent.unpack()), want) <= 1e-6 * norm(want)
        assert ledger["lost_norm"] == ledger["lost_norm_total"] == 0
        assert ledger["residual_norm"] == pytest.approx(norm(want), rel=1e-6)
    shapes = [factors_of(found[-1][1].unpack(), module)[1].shape[0] for module in sorted(SHAPES)]
    assert shapes == [8 + 40, 8 + 48], "5 x 14 rows are more than these matrices have"


@pytest.mark.parametrize("residual_rank", [0, 7])
def test_svd_keeps_the_best_part_and_says_what_is_lost(residual_rank: int) -> None:
    """Ranks 4, 8, 16 and 32 in one round, against the singular values of the dense mean."""
    lost = 0.0
    for number, (replies, sent, ledger) in enumerate(rounds_of(Aggregation.svd, RANKS, 3, residual_rank)):
        want = mean_product(replies)
        values = {module: torch.linalg.svdvals(product) for module, product in want.items()}
        tail = norm({module: found[32 + residual_rank :] for module, found in values.items()})
        assert number == 0 or tail > 0.01 * norm(want), "there is something to lose"
        assert distance(dense(sent.unpack()), want) == pytest.approx(tail, rel=1e-4)
        assert ledger["lost_norm"] == pytest.approx(tail, rel=1e-4)
        rest = norm({module: found[32 : 32 + residual_rank] for module, found in values.items()})
        assert ledger["residual_norm"] == pytest.approx(rest, rel=1e-4)
        assert ledger["update_norm"] == pytest.approx(norm(want), rel=1e-6)
        lost += ledger["lost_norm"]
        assert ledger["lost_norm_total"] == pytest.approx(lost)


def test_svd_with_room_for_everything_is_exact() -> None:
    for replies, sent, ledger in rounds_of(Aggregation.svd, RANKS, 3, residual_rank=32):
        want = mean_product(replies)
        assert distance(dense(sent.unpack()), want) <= 1e-6 * norm(want)
        assert ledger["lost_norm"] <= 1e-12 * norm(want)


def test_every_site_gets_the_best_of_its_own_rank_back() -> None:
    [(_, sent, _)] = rounds_of(Aggregation.svd, RANKS, 1, residual_rank=32)
    whole = dense(sent.unpack())
    for rank in RANKS:
        first, rest = cut(sent.unpack(), rank)
        assert {factors_of(first, module)[1].shape[0] for module in modules_of(first)} == {rank}
        values = {module: torch.linalg.svdvals(product)[rank:] for module, product in whole.items()}
        assert distance(dense(first), whole) == pytest.approx(norm(values), rel=1e-4, abs=1e-6 * norm(whole))
        if rest:
            assert norm(dense(rest)) == pytest.approx(norm(values), rel=1e-4, abs=1e-6 * norm(whole))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for module, (outputs, inputs) in SHAPES.items():
            self.add_module(module.rpartition(".")[2], nn.Linear(inputs, outputs, bias=False))


@pytest.mark.parametrize("how", ["cat", "svd"])
def test_peft_combines_the_same_adapters_to_the_same_product(how: str) -> None:
    """`add_weighted_adapter` as second oracle: cat is stack, svd is svd."""
    rule = Aggregation.stack if how == "cat" else Aggregation.svd
    [(replies, sent, _)] = rounds_of(rule, RANKS, 1, residual_rank=64 if how == "cat" else 0)
    targets = [module.rpartition(".")[2] for module in SHAPES]
    configs = [LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=targets) for rank in RANKS]  # type: ignore[arg-type]
    model = get_peft_model(Layers(), configs[0], "site0")  # type: ignore[arg-type]
    for site, config in enumerate(configs[1:], 1):
        model.add_adapter(f"site{site}", config)
    with torch.no_grad():
        for reply, module, half in itertools.product(replies, SHAPES, (A, B)):
            layer = model.base_model.model.get_submodule(module.rpartition(".")[2])
            layer.get_parameter(f"{half.strip('.')}.site{reply.site}.weight").copy_(
                reply.trained[f"{module}{half}weight"]
            )
    weights = [reply.weight / sum(reply.weight for reply in replies) for reply in replies]
    names = [f"site{site}" for site in range(len(RANKS))]
    model.add_weighted_adapter(names, weights, "mean", combination_type=how, svd_rank=32)
    ours = dense(sent.unpack())
    theirs = {
        module: model.base_model.model.get_submodule(module.rpartition(".")[2])
        .get_delta_weight("mean")
        .detach()
        .double()
        for module in SHAPES
    }
    assert distance(ours, theirs) <= 1e-5 * norm(ours), "PEFT computes in float32"


@pytest.mark.parametrize("rule", list(Aggregation))
def test_the_replies_in_any_order_give_the_same_bytes(rule: Aggregation) -> None:
    ranks = (2, 4, 8, 8) if rule.takes_ranks else (8, 8, 8, 8)
    initial = adapter_of(8, 3)
    results = set()
    for order in itertools.permutations(range(4)):
        aggregator = aggregator_of(rule, 8, site_ranks=ranks if rule.takes_ranks else (), residual_rank=48)
        sent = aggregator.start(initial)
        replies = replies_to(sent.unpack(), rule, 1, ranks)
        results.add(folded(aggregator, 1, sent, [replies[place] for place in order]).array.tobytes())
    assert len(results) == 1


def test_rows_without_weight_are_those_of_a_new_adapter() -> None:
    """Zero times zero has no gradient: it could never learn again."""
    aggregator = aggregator_of(Aggregation.svd, 8)
    sent = aggregator.start(adapter_of(8, 0, is_new=True))
    replies = replies_to(sent.unpack(), Aggregation.svd, 1, (8,))
    for name, tensor in replies[0].trained.items():
        if B in name:
            tensor[:, 3:] = 0
    state, new = folded(aggregator, 1, sent, replies).unpack(), adapter_of(8, 1, is_new=True)
    for module in SHAPES:
        B_OR, A_RI = factors_of(state, module)
        assert torch.equal(A_RI[3:], factors_of(new, module)[1][3:])
        assert not B_OR[:, 3:].any()
        assert B_OR[:, :3].any(dim=0).all()
        torch.testing.assert_close(A_RI[:3].norm(dim=1), torch.full((3,), 3**-0.5))


def test_a_site_of_a_low_rank_trains_the_best_rows_of_a_warm_start() -> None:
    initial = adapter_of(8, 3)
    sent = aggregator_of(Aggregation.svd, 8, site_ranks=(2, 8)).start(initial)
    want = dense(initial)
    assert distance(dense(sent.unpack()), want) <= 1e-6 * norm(want)
    tail = norm({module: torch.linalg.svdvals(product)[2:] for module, product in want.items()})
    assert distance(dense(cut(sent.unpack(), 2)[0]), want) == pytest.approx(tail, rel=1e-4)
    assert distance(dense(cut(initial, 2)[0]), want) > 1.1 * tail, "its own first rows are not the best"


def test_ffa_trains_b_alone_and_rolora_one_factor_after_the_other() -> None:
    for rule, halves in ((Aggregation.ffa, [(B,)] * 4), (Aggregation.rolora, [(B,), (A,)] * 2)):
        assert [trained_halves(rule, server_round) for server_round in range(1, 5)] == halves
        before = adapter_of(4, 0, is_new=True)
        for number, (replies, sent, _) in enumerate(rounds_of(rule, (4, 4), 4, 0)):
            trained = halves[number][0]
            assert all(trained in name for reply in replies for name in reply.trained)
            for name, tensor in sent.unpack().items():
                assert torch.equal(tensor, before[name]) == (trained not in name)
            before = sent.unpack()


def test_a_reply_of_another_rank_or_without_a_site_has_no_place() -> None:
    aggregator = aggregator_of(Aggregation.svd, 8, site_ranks=(2, 8))
    total = aggregator.begin(1, aggregator.start(adapter_of(8, 0, is_new=True)))
    assert [total.expected(site).shapes[0][0] for site in (0, 1)] == [2, 8]
    for site in (None, 2):
        with pytest.raises(ValueError, match=rf"partition-id must be in \[0, 2\) for project\.site_ranks, got {site}"):
            total.expected(site)
    spoilt = adapter_of(2, 5)
    next(iter(spoilt.values()))[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"lora_A\.weight must be finite"):
        total.fold(PackedAdapter.pack(spoilt, total.expected(0)), 0, 1)


def test_a_stack_beyond_its_room_ends_the_run_instead_of_losing_a_part() -> None:
    with pytest.raises(Fault, match=r"project\.residual_rank must be at least 12 to stack .* got 11"):
        rounds_of(Aggregation.stack, (4, 4, 4), 1, residual_rank=11)


@pytest.mark.parametrize("rule", [Aggregation.stack, Aggregation.svd])
def test_a_checkpoint_goes_on_with_the_same_bytes(rule: Aggregation) -> None:
    def go(aggregator, sent, rounds):  # type: ignore[no-untyped-def]
        for server_round in rounds:
            sent = folded(aggregator, server_round, sent, replies_to(sent.unpack(), rule, server_round, (4, 4)))
        return sent

    first = aggregator_of(rule, 4, residual_rank=24)
    half = go(first, first.start(adapter_of(4, 0, is_new=True)), (1, 2))
    state, adapter = first.state(), half.unpack()
    whole = go(first, half, (3,))
    other = aggregator_of(rule, 4, residual_rank=24)
    other.load_state(state)
    again = go(other, other.start(adapter), (3,))
    assert again.array.tobytes() == whole.array.tobytes()
    assert other.state() == first.state()
