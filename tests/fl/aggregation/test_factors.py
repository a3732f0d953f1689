import pytest
import torch

from fl.aggregation.factors import Factors


def random_factors(outputs: int, inputs: int, rank: int, seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(outputs, rank, generator=generator, dtype=torch.float64)
    return Factors(B * 2.0 ** -torch.arange(rank), torch.randn(rank, inputs, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize(
    ("outputs", "inputs", "rank"), [(30, 50, 7), (50, 30, 7), (12, 50, 20), (50, 12, 20), (9, 9, 40)]
)
def test_the_decomposition_is_that_of_the_dense_product(outputs: int, inputs: int, rank: int) -> None:
    """Also where the sum has more rows than the matrix."""
    factors = random_factors(outputs, inputs, rank)
    product = factors.B_OR @ factors.A_RI
    found, values = factors.decomposed(), torch.linalg.svdvals(product)
    count = min(outputs, inputs, rank)
    torch.testing.assert_close(found.S_R[:count], values[:count], rtol=1e-9, atol=1e-14)
    assert found.numerical_rank == count
    for rank_kept in (1, 5, count):
        U, S, Vh = found.best(rank_kept)
        error = float(torch.linalg.norm(product - U * S @ Vh))
        assert error == pytest.approx(float(values[rank_kept:].norm()), rel=1e-6, abs=1e-12)
        torch.testing.assert_close(U.T @ U, torch.eye(rank_kept, dtype=torch.float64))
        torch.testing.assert_close(Vh @ Vh.T, torch.eye(rank_kept, dtype=torch.float64))


def test_a_weighted_sum_stacks_and_leaves_out_what_adds_nothing() -> None:
    one, two = random_factors(6, 5, 3), random_factors(6, 5, 2, seed=1)
    row_weights = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    total = Factors.weighted_sum([(row_weights, one.B_OR, one.A_RI), (0.25, two.B_OR.float(), two.A_RI.float())])
    assert total.rank == 4
    dense = one.B_OR * row_weights @ one.A_RI + 0.25 * two.B_OR @ two.A_RI
    torch.testing.assert_close(total.B_OR @ total.A_RI, dense, rtol=1e-6, atol=1e-6)
    nothing = Factors.weighted_sum([(0.0, one.B_OR, one.A_RI)])
    assert (nothing.rank, nothing.decomposed().numerical_rank) == (0, 0)


@pytest.mark.parametrize(("outputs", "inputs"), [(8, 20), (20, 8)])
def test_a_sum_takes_no_more_rows_than_its_matrix(outputs: int, inputs: int) -> None:
    factors = random_factors(outputs, inputs, 30)
    small = factors.no_larger_than_dense()
    assert small.rank == 8
    torch.testing.assert_close(small.B_OR @ small.A_RI, factors.B_OR @ factors.A_RI, rtol=1e-12, atol=1e-12)
    few = random_factors(outputs, inputs, 8)
    assert few.no_larger_than_dense() is few
