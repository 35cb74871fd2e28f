"""Columns scaled to norms of about 1, by powers of two, so that scaling itself makes no rounding error.

    y = D x,    [A; d] D^-1 with columns of norms N from 1/2 to 2,    c D^-1

Scaling by norms is within sqrt(n) of the best column scaling (van der Sluis, Numer. Math. 14, 1969).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..sparse.base import Products, norm
from ..sparse.lazy import lazy
from ..sparse.numerics import ldexp, power_of_two

_NONE = -(2**20)  # stands for the exponent of zero
_MODERATE = 400  # an exponent up to which numbers of about 1 may be scaled twice and stay far within 2^-1022 to 2^1023


class Scaling:
    """The scaling of [A; diag(damp)] for dampings (P, 1) or (P, n), or None for none.

    Attributes:
        D, N: (P, n, 1)
        empty: (P, n), which columns are zeros.
        frobenius: the Frobenius norm (P, 1) of [A; diag(damp)], unscaled.
    """

    def __init__(self, A: Products, damp: Tensor | None):
        size, squares = A.column_sizes(damp)  # norms are size sqrt(squares)
        self.empty = squares == 0
        exponents = torch.frexp(size).exponent + torch.frexp(squares.sqrt()).exponent - 1
        # What is asked of an unknown whose column is zeros must not make all others nothing beside it.
        most = torch.where(self.empty, _NONE, exponents).amax(1, keepdim=True)
        exponents = torch.where(self.empty, torch.where(most > _NONE, most, 0), exponents)
        D = power_of_two(exponents)
        N = torch.where(self.empty, 1.0, size / D * squares.sqrt())
        norms = torch.where(self.empty, 0.0, N * D)
        largest = norms.amax(1, keepdim=True)
        self.frobenius = largest * norm((norms / torch.where(largest > 0, largest, 1.0))[:, :, None])
        self.D, self.N = D[:, :, None], N[:, :, None]

    @lazy
    def exponents(self) -> Tensor:
        """D = 2^exponents, (P, n, 1)"""
        return torch.frexp(self.D).exponent - 1

    def rescaled(self, t: Tensor, size: Tensor, power: int) -> Tensor:
        """D^power t 2^size for t (P, n, k), a power of 1 or -1, size (P, 1, k); nothing leaves the range half way."""
        if self._moderate and bool((size.abs() <= _MODERATE).all()):
            return (t * self.D if power > 0 else t / self.D) * power_of_two(size)
        return ldexp(t, size + power * self.exponents)

    @lazy
    def _moderate(self) -> bool:
        return bool((self.exponents.abs() <= _MODERATE).all())
