"""The augmented system as solvers see it: plain tensors in double precision, its columns scaled.

    K s = t      K = [ I    A    ]     s = [ r ]     t = [ b ]
                     [ A^H  -d^2 ]         [ x ]         [ c ]

Columns of [A; d I] are scaled to norms of about 1 by powers of two (`scaling`), and right-hand sides to size about 1:
y = D x, A D^-1, c D^-1. With weights, W and T stand in it as `Weighting` tells.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..sparse.base import Products
from ..sparse.lazy import lazy
from ..sparse.numerics import EPS, ldexp, noise
from .exact_residuals import ExactResiduals
from .scaling import Scaling

_EVEN = 1e-3  # ratio of roots of weights, down to which dividing by one costs three digits at most


class Weighting(NamedTuple):
    """W (P, m), at most 4, in units of 4^half, half (P, 1), and T (P, m), at most 1, or None for ones.

    A row of weight W / T is the equation T r + A x = b in which W r is its multiplier; with T = 0 it is a constraint.
    """

    weights: Tensor
    half: Tensor
    slack: Tensor | None


class System:
    """The scaled augmented system of P matrices on one pattern.

    Args:
        operator: A, in double precision.
        damp: d (P, 1), or (P, n) for one of each unknown, or None for none.
        precision: machine epsilon of the user's dtype, which decides what counts as rank.
        extended: refine with residuals in twice the working precision, whether or not that is needed.
        exact: the values are the user's own. Otherwise they carry rounding errors, and an answer cannot be more
            accurate than those allow.
        weighting: W and T of `Weighting`, or None for ones. What is factored and iterated with, `A`, is then W^(1/2) A,
            rounded; right-hand sides, solutions and residuals are those of the system with W and T in it.
        tolerance: the fraction of the largest below which singular values are zero; None to go by `precision`.
    """

    weights: Tensor | None = None
    slack: Tensor | None = None  # T (P, m, 1)
    half: Tensor  # (P, 1): c and the multipliers are in units of 4^half

    def __init__(
        self,
        operator: Products,
        damp: Tensor | None,
        precision: float,
        *,
        extended: bool = False,
        exact: bool = True,
        weighting: Weighting | None = None,
        tolerance: float | None = None,
    ):
        self.precision, self.extended, self.exact = precision, extended, exact and operator.has_exact_products
        self.m, self.n, self.copies, self.unscaled = operator.m, operator.n, operator.copies, operator
        if weighting is not None:
            self.weights, self.half, slack = weighting
            self.root, self.slack = self.weights.sqrt(), None if slack is None else slack[:, :, None]
        self.weighed = operator if weighting is None else operator.weighted(self.root)  # W^(1/2) A, unscaled
        damp = None if damp is None else damp.abs()
        self.scaling = Scaling(self.weighed, damp)
        self.scale, self.norms = self.scaling.D, self.scaling.N
        self.empty, self.frobenius = self.scaling.empty, self.scaling.frobenius
        self.weight = self.scale.amin(1, keepdim=True) / self.scale  # D^-1 in units of its largest entry: at most 1
        self.A = self.weighed.scaled(self.scale)
        self.tolerance_given = tolerance is not None
        self.tolerance = tolerance or tolerance_of(max(precision, self.A.unit), operator.height, operator.n)
        self.damp = None if damp is None else damp[:, :, None] / self.scale  # d D^-1
        self.d2 = None if self.damp is None else self.damp.square()

    @lazy
    def size(self) -> Tensor:
        """The Frobenius norm of A alone, without damping (P, 1)."""
        return self.A.frobenius()

    @lazy
    def lost(self) -> Tensor:
        """Which matrices (P, 1) have entries that became zero beside a damping or others of their columns."""
        return self.weighed.vanished(self.scale)

    @lazy
    def exact_residuals(self) -> ExactResiduals:
        """As `residuals`, in twice the working precision."""
        return ExactResiduals(self.plain, self.damp, self.weights, self.slack)

    @lazy
    def plain(self) -> Products:
        """A itself, columns scaled, where `A` has weights in it."""
        return self.A if self.weights is None else self.unscaled.scaled(self.scale)

    @lazy
    def even(self) -> bool:
        """Whether weights are of about one size, so that W^(1/2) r may be divided by W^(1/2)."""
        largest = self.A.largest(self.root[:, :, None])
        return bool(self.A.everywhere((self.root > _EVEN * largest).all()))

    def weigh(self, f: Tensor) -> Tensor:
        """W^(1/2) f"""
        return f if self.weights is None else self.root[:, :, None] * f

    def row_norm(self, r: Tensor) -> Tensor:
        """|W^(1/2) r|, the norm of right-hand sides b and of residuals r: (P, m, k) -> (P, k)."""
        return self.A.norm(r if self.weights is None else self.root[:, :, None] * r)

    def multiplied(self, r: Tensor, e: Tensor | None) -> Tensor:
        """4^half (W r + e)"""
        assert self.weights is not None
        s = self.weights[:, :, None] * r
        return ldexp(s if e is None else s + e, 2 * self.half[:, :, None])

    def slackened(self, r: Tensor) -> Tensor:
        """T r"""
        return r if self.slack is None else self.slack * r

    def damped(self, y: Tensor) -> Tensor | float:
        """d^2 y"""
        return 0.0 if self.d2 is None else self.d2 * y

    def normal(self, y: Tensor) -> Tensor:
        """(A^H A + d^2) y"""
        product = self.A.adjoint(self.A.matmul(y))
        return product if self.d2 is None else product.add_(self.d2 * y)

    def gradient(self, r: Tensor, y: Tensor, c: Tensor) -> Tensor:
        """A^H r - d^2 y - c, the negative gradient of the (extended) normal equations, for an r that is weighed."""
        return self.A.adjoint(r) - self.damped(y) - c

    def residuals(self, b: Tensor, c: Tensor, r: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(b - T r - A y, c - A^H W r + d^2 y)"""
        reached = self.plain.matmul(y).add_(self.slackened(r))
        return torch.sub(b, reached, out=reached), -self.gradient(self.weigh(r), y, c)

    def rounding(self, b: Tensor, c: Tensor, r: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Two samples, side by side, of errors as large as the rounding errors in `residuals`, entry by entry.

        In directions that damping alone determines, by a d^2 of 1e-20, say, the rounding error of A^H times the first
        of them, unit^2 in all, is more than that of the second, since r is as small as d^2 there.
        """
        size, unit = (r.abs(), y.abs()), self.A.unit
        first = unit * (b.abs() + size[0] + self.plain.absolute_matmul(size[1]))
        of_r = self.A.absolute_adjoint(self.weigh(size[0] + first))
        second = unit * (c.abs() + of_r + self.damped(size[1]))
        first, second = (torch.cat([s, s], 2) for s in (first, second))
        return (first * noise(first)).to(b.dtype), (second * noise(second)).to(b.dtype)


def tolerance_of(precision: float, m: int, n: int) -> float:
    """The fraction of the largest below which singular values are zero: noise in the data, and of computing them."""
    return 4 * (precision + EPS * max(m, n, 1) ** 0.5)


def check_number(name: str, value: object, *, optional: bool = False, below: float = float("inf")) -> None:
    """Refuse a setting that is not a positive number below `below` (or None, where it is optional)."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 < value < below:
        raise ValueError(f"{name} must be above 0 and below {below:g}, got {value!r}")
