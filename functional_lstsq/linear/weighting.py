"""Weights as solvers take them: in a unit in which they are about 1, and capped where they make constraints.

    T rho + A x = b          A^H (V rho + e) - d^2 x = c          V = min(W, cap),  T = V / W

is the augmented system with the multiplier s = V rho + e in the place of r = T rho. A row of infinite weight has T = 0
and is met exactly. A factor with V for the weights, and corrections, are the method of multipliers (Bertsekas,
Constrained Optimization and Lagrange Multiplier Methods, Academic Press 1982, chapter 2): where the heavy rows are
linearly independent an error shrinks by about the ratio of the other rows to the cap, whatever the weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import RankDeficientError
from ..solvers import Dense, Direct
from ..solvers.system import EPS, System, Weighting
from ..sparse.numerics import ldexp, power_of_two
from ..sparse.pattern import SparsePattern
from ..sparse.plain_products import Operator

_CAP = 2.0**27  # of what a row contributes to A^H W A, columns scaled, in units of what others do
_FEW_LARGE = 2.0**-20  # of the row that contributes most, where most others do less: a cap is 2^7 times that at least
_DEPENDENT = 2.0**10  # condition number of heavy rows from which they are no longer carried by their multipliers
_LARGEST = 2.0**16
_LIGHT = 2.0**-40  # of the largest weight: below it a row is left to the second equation
_SMALL = 500  # rows that are factored densely


class AllRows:
    """What weighing asks of all rows of A, which are here; a subclass knows of others, with the same answers there."""

    def any(self, flags: Tensor) -> bool:
        """Whether any flag of a row holds."""
        return bool(flags.any())

    def median(self, t: Tensor) -> Tensor:
        """About the median (P, 1) of the numbers of rows (P, m) that are none of NaN; 1 where there are none."""
        return t.nanmedian(1, keepdim=True).values.nan_to_num(nan=1.0)

    def largest(self, t: Tensor) -> Tensor:
        """The largest (P, 1) of numbers (P, m), or 0, none of which is negative."""
        return t.amax(1, keepdim=True) if t.shape[1] else t.new_zeros((len(t), 1))

    def largest_of_each(self, t: Tensor) -> Tensor:
        """The largest of what the places have of each number, none of which is negative."""
        return t

    def gathered(self, pattern: SparsePattern, values: Tensor, which: Tensor) -> HeavyRows:
        """The rows that `which` (P, m) holds for; of others as many as there are."""
        return HeavyRows(pattern, values, which, None)


class HeavyRows(NamedTuple):
    """Some rows of A: their pattern, values (P, nnz), which are heavy (P, rows), and their numbers if others."""

    pattern: SparsePattern
    values: Tensor
    heavy: Tensor
    numbers: Tensor | None


def weigh(pattern: SparsePattern, values: Tensor, weights: Tensor, rows_of: AllRows | None = None) -> Weighting:
    """How to weigh the rows of A, `values` (P, nnz), by weights (P, m), which may be zero or infinite.

    Raises:
        RankDeficientError: rows of infinite weight are linearly dependent.
    """
    every = rows_of or AllRows()
    counted = weights.isfinite() & (weights > 0)
    median = every.median(torch.where(counted, weights, torch.nan))
    heavy = weights > _CAP * median
    if not every.any(heavy):
        return _in_units(weights, None, every)
    rows, columns = (part.expand(len(values), -1) for part in pattern.indices)
    moderate = torch.minimum(weights, median)
    sizes = values.abs() * moderate.sqrt().gather(1, rows)
    norms = sizes.new_zeros((len(values), pattern.shape[1])).scatter_reduce(1, columns, sizes, "amax")
    norms = every.largest_of_each(norms)
    sizes = sizes / torch.where(norms > 0, norms, 1.0).gather(1, columns)
    # What rows contribute with the weight `moderate`.
    shares = torch.zeros_like(weights).scatter_add(1, rows, sizes.square())
    usual = every.median(torch.where(counted & ~heavy, shares, torch.nan))
    largest = every.largest(torch.where(counted & ~heavy, shares, 0.0))
    usual = torch.maximum(usual, _FEW_LARGE * largest)
    usual = torch.where(usual > 0, usual, 1.0)
    condition = _condition(every.gathered(pattern, sizes * values.sgn(), heavy))
    constraints = weights.isinf()
    if every.any(heavy & ~constraints) and bool((condition > _DEPENDENT).any()):
        # Rows that are as heavy as each other, and too many to be met, are an ordinary problem by themselves.
        spoilt = condition > _DEPENDENT
        heavy = heavy & (constraints | ~spoilt)
        most = torch.where(weights.isfinite(), shares * weights / torch.where(moderate > 0, moderate, 1.0), 0.0)
        usual = torch.where(spoilt, every.largest(most), usual)
        condition = torch.where(spoilt, 1.0, condition)
        if every.any(constraints & spoilt):
            condition = _condition(every.gathered(pattern, sizes * values.sgn(), heavy))
    if bool(condition.isinf().any()):
        heavy_rows = every.gathered(pattern, sizes * values.sgn(), heavy)
        _refuse_dependent(heavy_rows, int(condition.isinf()[:, 0].nonzero()[0]))
    # Rows of size 1 that are nearly dependent are met as well as those that are not if they are as much heavier.
    factor = _CAP * usual * condition.square().clamp(max=_LARGEST)
    cap = moderate * factor / torch.where(shares > 0, shares, 1.0)
    cap = power_of_two(torch.frexp(cap).exponent)
    capped = torch.where(heavy, torch.minimum(weights, cap), weights)
    return _in_units(capped, torch.where(heavy, capped / weights, 1.0), every)


def _in_units(capped: Tensor, slack: Tensor | None, every: AllRows) -> Weighting:
    """With the largest weight about 4^half."""
    largest = every.largest(capped)
    half = torch.where(largest > 0, torch.frexp(largest).exponent // 2, 0)
    return Weighting(ldexp(capped, -2 * half), half, slack)


def _condition(rows: HeavyRows) -> Tensor:
    """(P, 1): the condition number of the rows that are heavy, each scaled to size 1; infinite if dependent."""
    pattern, values, heavy, _ = rows
    too_many = heavy.sum(1, keepdim=True) > pattern.shape[1]
    heavy = heavy & ~too_many
    if not bool(heavy.any()):
        return torch.where(too_many, torch.inf, 1.0).double()
    factors = _factor_rows(pattern, values, heavy)
    full = (factors.rank >= factors.system.n) & ~too_many
    return torch.where(full, factors.largest / factors.smallest, torch.inf)


def _factor_rows(pattern: SparsePattern, values: Tensor, heavy: Tensor):
    """The factors of the matrix that has the heavy rows for its columns."""
    any_heavy = heavy.any(0)
    which = any_heavy.nonzero()[:, 0]
    place = torch.cumsum(any_heavy, 0) - 1
    rows, columns = pattern.indices
    kept = any_heavy[rows]
    rows, columns = rows[kept], columns[kept]
    # Rows that are heavy in other matrices of the batch stand by themselves.
    entries = torch.where(heavy[:, rows], values[:, kept], 0.0)
    alone = torch.where(heavy[:, which], 0.0, 1.0)
    part = SparsePattern(torch.stack([columns, place[rows]]), (pattern.shape[1], len(which)))
    system = System(Operator(part, entries), alone if bool(alone.any()) else None, EPS)
    return (Dense() if len(which) <= _SMALL else Direct()).prepare(system, minimum_norm=True)


def _refuse_dependent(rows: HeavyRows, p: int) -> None:
    pattern, values, heavy, numbers = rows
    which, count = heavy.any(0).nonzero()[:, 0], int(heavy[p].sum())
    rank, named = f"more than the {pattern.shape[1]} unknowns", ""
    if count <= pattern.shape[1]:
        factors = _factor_rows(pattern, values, heavy)
        known = int(factors.rank[p]) - int((~heavy[p, which]).sum())
        rank, found = f"of rank {known}", sorted(int(which[i]) for i in factors.dependent(p))
        found = found if numbers is None else [int(numbers[i]) for i in found]
        one = len(found) == 1
        named = f" (row{'' if one else 's'} {', '.join(map(str, found))} take{'s' if one else ''} part in a dependence)"
        named = named if found else ""
    raise RankDeficientError(
        "rows of infinite weight are constraints, which must be linearly independent and neither contradict each other "
        f"nor follow from each other, got {count}, {rank}{named}",
        "remove the dependent rows",
        "finite weights for them",
    )


def enter(
    system: System, b: Tensor, e: Tensor | None, c: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | float]:
    """(b, e, c, shift) in the units of a weighted system; e is what b and c do not hold of it, b of r + shift."""
    assert system.weights is not None
    unit = -2 * system.half[:, :, None]
    c = ldexp(c, unit)
    if e is None:
        return b, None, c, 0.0
    e = ldexp(e, unit)
    # What is already weighted goes to b, divided by the weights; where those are nothing beside others, to c.
    light = (system.weights <= _LIGHT)[:, :, None]
    shift = system.slackened(torch.where(light, 0.0, e / torch.where(light, 1.0, system.weights[:, :, None])))
    e = torch.where(light, e, 0.0)
    return b + shift, e, c - system.unscaled.adjoint(e), shift
