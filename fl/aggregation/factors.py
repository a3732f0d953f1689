"""Sums of products B A, held as factors: the sum of K products of rank R is one product of rank K R, without loss.

Shapes: O outputs and I inputs of a linear layer, R the rank of a sum, K the rank that is kept. All in float64.
Knows nothing about adapters.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Factors:
    """A product B A of one module."""

    B_OR: Tensor
    A_RI: Tensor

    @classmethod
    def weighted_sum(cls, parts: Iterable[tuple[Tensor | float, Tensor, Tensor]]) -> Self:
        """sum(B diag(w) A) over the parts (w, B, A); w is one number or one for each row of A. Rows without weight or
        value are left out."""
        Bs, As = [], []
        for weights, B, A in parts:
            B_OR, A_RI = B.to(torch.float64) * weights, A.to(torch.float64)
            used = B_OR.any(dim=0)
            Bs.append(B_OR[:, used])
            As.append(A_RI[used])
        return cls(torch.cat(Bs, dim=1), torch.cat(As))

    @property
    def rank(self) -> int:
        """Number of rows of A: at least the rank of the product."""
        return self.A_RI.shape[0]

    def no_larger_than_dense(self) -> "Factors":
        """The same product with at most min(O, I) rows: beyond that, the product and the identity are smaller."""
        outputs, inputs = self.B_OR.shape[0], self.A_RI.shape[1]
        if self.rank <= min(outputs, inputs):
            return self
        product, identity = self.B_OR @ self.A_RI, torch.eye(min(outputs, inputs), dtype=torch.float64)
        return Factors(product, identity) if inputs <= outputs else Factors(identity, product)

    def decomposed(self) -> "Decomposition":
        """The singular value decomposition of B A, without ever forming it: QR of both factors, SVD of the R x R core.

        O((O + I) R^2 + R^3) operations in place of O(O I min(O, I)). (Golub and Van Loan, Matrix Computations, 5.4.)
        """
        Q_OR, left_RR = torch.linalg.qr(self.B_OR)
        Q_IR, right_RR = torch.linalg.qr(self.A_RI.T)
        U, S, Vh = torch.linalg.svd(left_RR @ right_RR.T, full_matrices=False)
        return Decomposition(Q_OR, U, S, Vh, Q_IR)


@dataclass(frozen=True)
class Decomposition:
    """Q_O U diag(S) Vh Q_I^T, singular values in falling order."""

    Q_OR: Tensor
    U_RR: Tensor
    S_R: Tensor
    Vh_RR: Tensor
    Q_IR: Tensor

    @property
    def numerical_rank(self) -> int:
        """Singular values that are not mere rounding: above the largest times the machine's epsilon and the size."""
        if not len(self.S_R):
            return 0
        size = max(self.Q_OR.shape[0], self.Q_IR.shape[0])
        least = self.S_R[0] * size * torch.finfo(torch.float64).eps
        return int(torch.count_nonzero(least < self.S_R))

    def best(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """(U [O, K], S [K], Vh [K, I]) of the nearest product of at most this rank (Eckart and Young, 1936)."""
        return (
            self.Q_OR @ self.U_RR[:, :rank],
            self.S_R[:rank],
            self.Vh_RR[:rank] @ self.Q_IR.T,
        )
