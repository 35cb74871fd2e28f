"""Bounded least squares of an operator that is known by its products.

As `pivoting` and `bounds` have it, with A diag(f) in the place of A, f = 0 for an unknown at its bound: its column is
zero, and a damping as large as the other columns are keeps it to itself. Unknowns keep their units, as of every
operator; the search for the active set multiplies the roots of weights in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..result import RANK_DEFICIENT, ZERO, Report
from ..solvers.system import EPS
from ..sparse.numerics import noise
from ..sparse.operator import Product
from ..torch_func.primitive import Constant
from .active_set import check_bounds, find_active_set
from .matrix_free import SolveMatrixFree, and_one_more, solve_operator, weighted
from .operator_static import OperatorStatic
from .pivoting import Tried, at_bounds


@dataclass(frozen=True)
class _OnFree:
    """x -> A (f x) for params (those of A, f)."""

    matvec: Product

    def __call__(self, params: Any, x: Tensor) -> Tensor:
        return self.matvec(params[0], params[1].to(x.dtype) * x)


@dataclass(frozen=True)
class _FreeOf:
    """y -> f A^H y"""

    rmatvec: Product

    def __call__(self, params: Any, y: Tensor) -> Tensor:
        found = self.rmatvec(params[0], y)
        return params[1].to(found.dtype) * found


def on_free(static: OperatorStatic) -> OperatorStatic:
    """A diag(f), whose leaves are those of A and f."""
    return replace(
        static,
        matvec=_OnFree(static.matvec),
        rmatvec=None if static.rmatvec is None else _FreeOf(static.rmatvec),
        spec=and_one_more(static.spec),
    )


class BoundedByProducts(NamedTuple):
    """P bounded problems, as `pivoting.Bounded`; size (P, 1) is about the norm of a column."""

    static: OperatorStatic
    leaves: tuple[Tensor, ...]
    size: Tensor
    damp: Tensor
    b: Tensor
    lower: Tensor
    upper: Tensor

    @property
    def weights(self) -> None:
        return None

    @property
    def m(self) -> int:
        return self.static.m

    @property
    def n(self) -> int:
        return self.static.n

    def largest(self, t: Tensor) -> Tensor:
        """Of weights, which are multiplied in."""
        raise NotImplementedError

    def take(self, which: Tensor) -> BoundedByProducts:
        """The problems of these numbers, in this order, as often as they are named."""
        tensors = [t[which] for t in self[2:7]]
        return BoundedByProducts(self.static, tuple(leaf[which] for leaf in self.leaves), *tensors)

    def attempt(self, active: Tensor) -> Tried:
        """Solve with the unknowns pinned that are not 0 in `active` (P, n)."""
        static, leaves = replace(self.static, on_failure="return"), self.leaves
        bound = at_bounds(active, self.lower, self.upper)[:, :, None]
        right = self.b - static.plainly(leaves, bound, adjoint=False) if bool((bound != 0).any()) else self.b
        free = (active == 0).to(self.b.dtype)
        damp = torch.where(active != 0, self.size, self.damp)
        slots = None, right, None, None, None
        r, _, x, numbers, _ = solve_operator(on_free(static), damp, *slots, None, (*leaves, free))
        report = Report(*(field[:, 0] for field in Report.unpacked(numbers)))
        # What is zero but for rounding is as large as its error.
        of_x = torch.where(report.status == ZERO, 2.0, report.solution_error - report.rounding).clamp_min(0) + EPS
        of_r = (report.residual_error - report.rounding).clamp_min(0) + EPS
        sizes = [torch.linalg.vector_norm(t[:, :, 0], dim=1) for t in (x, r)]
        error, error_of_r = (
            torch.where(size > 0, of * size, 0.0).nan_to_num(nan=torch.inf)[:, None]
            for of, size in zip((of_x, of_r), sizes, strict=True)
        )
        x, shift = x[:, :, 0] + bound[:, :, 0], self.damp.square()
        g = static.plainly(leaves, r, adjoint=True)[:, :, 0] - shift * x
        # No column is longer than the whole of A, whose products have errors of their own.
        of_g = report.norm[:, None] * (error_of_r + 8 * static.unit * sizes[1][:, None]) + EPS * shift * x.abs()
        deficient = (report.status == RANK_DEFICIENT) | ~(x.isfinite().all(1) & g.isfinite().all(1))
        return Tried(x, g, error + EPS * x.abs(), of_g.nan_to_num(nan=torch.inf), deficient)


class _ActiveSet(Constant):
    """(active, weak, multipliers (P, n), status (P,), size (P, 1)) of (damp, b, lower, upper, *leaves)."""

    constants = (0, 1, 2, 3, 4)

    @classmethod
    def forward(cls, static: OperatorStatic, damp, b, lower, upper, *leaves):
        check_bounds(lower, upper, damp)
        v = noise(lower[:, :, None])
        image = static.plainly(leaves, v.to(b.dtype), adjoint=False)
        size = torch.linalg.vector_norm(image, dim=1) / torch.linalg.vector_norm(v, dim=1)
        size = torch.where(size > 0, size, 1.0)
        problems = BoundedByProducts(static, leaves, size, damp, b, lower, upper)
        return *find_active_set(problems, static.on_failure), size


def solve_each_by_products(
    static: OperatorStatic,
    leaves: Sequence[Tensor],
    weights: Tensor | None,
    damp: Tensor,
    b: Tensor,
    lower: Tensor,
    upper: Tensor,
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """As `bounds.solve_each`, for leaves (P, ...)."""
    of_search, every, right = static, tuple(leaves), b
    if weights is not None:
        root = weights.detach().sqrt()
        of_search, every, right = weighted(static), (*leaves, root), root[:, :, None] * b
    active, weak, multipliers, status, size = _ActiveSet.apply(of_search, damp, right, lower, upper, *every)
    bound = at_bounds(active, lower, upper)[:, :, None]
    right = b - static.product(leaves, bound, adjoint=False)
    free = (active == 0).to(b.dtype)
    damp = torch.where(active != 0, size, damp)
    slots = right, None, None, None, None
    r, _, y, report, _ = SolveMatrixFree.apply(on_free(static), damp, weights, *slots, *leaves, free)
    return (r, y + bound, status, active, multipliers, weak), y, report
