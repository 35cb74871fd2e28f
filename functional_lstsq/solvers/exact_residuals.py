"""Residuals of the augmented system in about twice the working precision."""

from __future__ import annotations

from torch import Tensor

from ..sparse.base import Products
from ..sparse.double_double import Pair, minus, scaled, two_product


class ExactResiduals:
    """(b - T r - A y, c - A^H (W r + e) + d^2 y) for r and y given as pairs."""

    def __init__(self, A: Products, damp: Tensor | None, weights: Tensor | None, slack: Tensor | None):
        self.matmul = A.exact(adjoint=False)
        self.adjoint = A.exact(adjoint=True)
        self.damp, self.weights, self.slack = damp, weights, slack

    def __call__(self, b: Tensor, c: Tensor, r: Pair, y: Pair, e: Tensor | None = None) -> tuple[Tensor, Tensor]:
        owed = r if self.slack is None else scaled(self.slack, r)
        first = minus(self.matmul(y)).plus(-owed.low).plus(-owed.high).plus(b)
        s = r if self.weights is None else scaled(self.weights[:, :, None], r)
        second = minus(self.adjoint(s if e is None else s.plus(e)))
        if self.damp is not None:
            squared = two_product(self.damp, self.damp)
            for d2 in squared:
                for part in y:
                    second = second.add(two_product(d2, part))
        return first.value, second.plus(c).value
