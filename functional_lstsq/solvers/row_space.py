"""Projections on the row space and the null space of A without full rank, by the columns that span all others.

    A D^-1 = Q T,    F = D^-1 T_11^-1 T D      A = A_pivots F:   all columns by those of the pivots
    F^H (F F^H)^-1 F x                         the part of x in the row space
    N (N^H N)^-1 N^H x,    N = I - F           the part in the null space; columns of N are those of no pivot

Where columns have very different norms, what a light column has of the first part may be 1e15 times smaller than x, and
a heavy one of the second. The entries of F and of N are right each in units of its own column, and no part is what a
difference leaves. Pivots are the columns that have most left of them outside of the span of earlier ones (Businger,
Golub, Numer. Math. 7, 1965), so that entries of F are moderate. Rows may be scaled, which changes neither F nor N.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..sparse.double_double import EPS_EXTENDED, Pair
from ..sparse.numerics import ldexp, noise
from .null_space import NullSpace
from .system import EPS

_ROUNDINGS = 4  # errors of T in units of eps times the norm of a column
_PASSES = 4  # corrections in extended precision, each smaller than the last by about eps times cond^2


class Triangles(NamedTuple):
    """Of the matrices without full rank: R (P', n, n), with A = Q R 2^(scaled + shift) but for a scaling of rows.

    Attributes:
        scaled, shift: (P', n), the first of which gives the columns of the system norms of about 1, both those of R.
        rank: of R (P',)
        known: the rank of A in its own units (P',). Where that is another one, all errors are infinite.
        which: the numbers of these matrices in the batch (P',).
    """

    R: Tensor
    scaled: Tensor
    shift: Tensor
    rank: Tensor
    known: Tensor
    which: Tensor


class RowSpace(NullSpace):
    """Of those matrices of a batch that have not full rank.

    Args:
        tolerance: norms of columns of R that are nothing but rounding.
        gradient: A^H A N in extended precision, for the scaled A (P', n, n) with rows as R has them and N (P', n, q);
            None where rounding errors of R do no harm, or A has some itself.
    """

    def __init__(self, of: Triangles, tolerance: float, gradient: Callable[[Pair], Tensor] | None):
        R, self.which = of.R, of.which
        T, S, free = _pivoted(R, of.scaled + of.shift, of.rank, tolerance)
        lost = torch.diag_embed((S == 0).all(1).to(T.dtype))  # behind the rank of a matrix
        first = T @ S + lost
        count = free.sum(1)
        behind = torch.arange(int(count.max()), device=T.device) >= count[:, None]
        order = torch.argsort(free.to(torch.int8), dim=1, descending=True, stable=True)[:, : behind.shape[1]]
        own = torch.where(behind[:, None], 0.0, torch.eye(R.shape[2], dtype=T.dtype, device=T.device)[order].mT)
        T = T @ own
        F = torch.linalg.solve_triangular(first, T, upper=True)
        size = _ROUNDINGS * EPS * (1 + F.abs().sum(1, keepdim=True)).expand_as(F)
        slip = torch.linalg.solve_triangular(first, (size * noise(size)).to(T.dtype), upper=True)
        # Exponents of each pivot, and of each column that is none: F is in units of these.
        pivots, others = ((t.real.mT.double() @ of.shift[:, :, None].double()).int() for t in (S, own))
        F, slip = (ldexp(t, others.mT - pivots) for t in (F, slip))
        if gradient is not None:
            F, slip = _refined(Pair.of(F), slip, first, S, own, of.shift, gradient)
        self.unclear = (((S != 0).any(1).sum(1) < of.rank) | (of.rank != of.known))[:, None, None]
        self.scaled = own - S @ F
        pivots, others = ((t.real.mT.double() @ of.scaled[:, :, None].double()).int() for t in (S, own))
        F, slip = (ldexp(t, others.mT - pivots) for t in (F, slip))
        self.null, self.F, self.slip = own - S @ F, S.mH + F @ own.mH, slip @ own.mH
        self.of_F = torch.linalg.cholesky(self.F @ self.F.mH + lost)
        self.of_null = torch.linalg.cholesky(self.null.mH @ self.null + torch.diag_embed(behind.to(T.dtype)))

    def project(self, x: Tensor) -> Tensor:
        """The part of x (P, n, k) in the row space."""
        return x.index_copy(0, self.which, self.F.mH @ self._seen(x[self.which]))

    def outside(self, x: Tensor) -> Tensor:
        """The part of x in the null space."""
        found = self.null @ torch.cholesky_solve(self.null.mH @ x[self.which], self.of_null)
        return torch.zeros_like(x).index_copy(0, self.which, found)

    def errors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Estimates of the errors of `project` (in the row space, in the null space)."""
        nothing, x = torch.zeros_like(x), x[self.which]
        seen = self._seen(x)
        size = EPS * (self.F.abs() @ x.abs())
        moved = self.slip @ (x - self.F.mH @ seen) + size * noise(size)
        inside = self.F.mH @ torch.cholesky_solve(moved, self.of_F)
        size = EPS * (self.F.abs().mT @ seen.abs())
        beyond = self.slip.mH @ seen + size * noise(size)
        both = (torch.where(self.unclear & (x != 0).any(1, keepdim=True), torch.inf, t) for t in (inside, beyond))
        return tuple(nothing.index_copy(0, self.which, t) for t in both)  # type: ignore[return-value]

    def _seen(self, x: Tensor) -> Tensor:
        """(F F^H)^-1 F x"""
        return torch.cholesky_solve(self.F @ x, self.of_F)

    def basis(self, scale: Tensor) -> Tensor:
        """A basis of the null space of the scaled A (P, n, q), zeros where a matrix has less."""
        none = self.scaled.new_zeros((len(scale), *self.scaled.shape[1:]))
        return none.index_copy(0, self.which, self.scaled)


def _refined(
    F: Pair,
    slip: Tensor,
    first: Tensor,
    S: Tensor,
    own: Tensor,
    shift: Tensor,
    gradient: Callable[[Pair], Tensor],
) -> tuple[Tensor, Tensor]:
    """(F, its errors), corrected as long as that makes the corrections smaller: those of N = I - F are all that A N is.

    A light column may take part in a dependence of heavy ones with less than rounding leaves of these.
    """
    pivots = (S.real.mT.double() @ shift[:, :, None].double()).int()
    cut = EPS_EXTENDED * noise(slip.real)  # where exact products cut off their slices of N
    moved = torch.full_like(slip.abs().amax(1, keepdim=True), torch.inf)
    for _ in range(_PASSES):
        g = ldexp(S.mH @ gradient(Pair(own - S @ F.high, -S @ F.low)), -pivots)
        step = torch.linalg.solve_triangular(first.mH, g, upper=False)
        step = ldexp(torch.linalg.solve_triangular(first, step, upper=True), -pivots)
        size = step.abs().amax(1, keepdim=True)
        better = size < moved / 2
        F, slip = F.plus(torch.where(better, step, 0.0)), torch.where(better, step, slip)
        moved = torch.where(better, size, moved)
        if not bool((better & (size > EPS_EXTENDED)).any()):
            break
    return F.high, slip + cut + EPS * F.high * noise(slip.real)


def _pivoted(R: Tensor, exponents: Tensor, rank: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """(T (P, q, n), which columns are its pivots (P, n, q), which are none (P, n)), by modified Gram-Schmidt."""
    n, left = R.shape[2], R
    free = none = torch.ones_like(exponents, dtype=torch.bool)
    rows, pivots = [R.new_zeros((len(R), 0, n))], [R.new_zeros((len(R), n, 0))]
    for step in range(int(rank.max())):
        size = torch.linalg.vector_norm(left, dim=1)
        free = free & (size > tolerance)
        order = torch.where(free, size.log2() + exponents, -torch.inf)
        pivot = torch.nn.functional.one_hot(order.argmax(1), n).bool() & free & (step < rank)[:, None]
        chosen = torch.where(pivot[:, None], left, 0.0).sum(2, keepdim=True)
        length = torch.linalg.vector_norm(chosen, dim=1, keepdim=True)
        q = chosen / torch.where(length > 0, length, 1.0)
        row = torch.where(free[:, None], q.mH @ left, 0.0)
        left = left - q @ row
        free, none = free & ~pivot, none & ~pivot
        rows.append(row)
        pivots.append(pivot[:, :, None].to(R.dtype))
    return torch.cat(rows, 1), torch.cat(pivots, 2), none
