"""The diagonal of the hat matrix H = A (A^H W A + D)^-1 A^H W, which leverage and left-out residuals are made of.

Column by column of A where that is accurate, n solves:

    B = A (A^H W A + D)^-1 from K (-B, S) = (0, -I),    h_i = w_i sum_j B_ij conj(A_ij)

whose terms may be as large as the condition number beside their sum, which is at most 1. Otherwise row by row, m
solves: columns of H^H, whose unit vectors pass through the adjoint. Where A has no full rank and least norm is asked
for, the same solves have the pseudoinverse in the place of the inverse.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .distributed.studies import FACTOR
from .linear.arguments import Problem, pose
from .linear.factorization import Factorization, unprepared
from .linear.posed import rounded, run, shaped
from .linear.settings import check_solver
from .result import Report
from .solvers.watching import in_blocks
from .sparse.matrix import SparseMatrix
from .torch_func.tracing import concrete, is_traced

BLOCK = 256  # columns that are solved for together, at most
_NUMBERS = 2**23  # of a block of columns of height m, at most
_CONDITION = 1e4  # at which B leaves an absolute error of 1e-12 in h


class Options(NamedTuple):
    """What studies hand on to a solve."""

    weights: Tensor | None
    solver: Any
    rank_deficient: str
    rank_tolerance: float | None


NONE = Options(None, None, "raise", None)  # beside a Factorization, which has its own


def options_of(weights: Tensor | None, solver: Any, rank_deficient: str, rank_tolerance: float | None) -> Options:
    """Options for a study, which needs solutions."""
    check_solver(solver, "a study")
    return Options(weights, solver, rank_deficient, rank_tolerance)


def posed(A: SparseMatrix | Factorization, b: Tensor, options: Options, refine: str = "auto") -> Problem:
    """A x = b for a study, whose messages offer what studies take."""
    weights, solver, rank_deficient, tolerance = options
    given = A, b, None, weights, None, solver, rank_deficient, refine, None
    return pose(*given, rank_tolerance=tolerance, of="study")


def solved(A: SparseMatrix | Factorization, b: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """(x, residual)"""
    problem = posed(A, b, options)
    r, x, _ = run(problem, "raise")
    return rounded(shaped(x, problem), problem, "x"), rounded(shaped(r, problem), problem, "the residual")


def with_factors(A: SparseMatrix | Factorization, options: Options) -> Factorization:
    """A with factors for many solves, which the first of them makes."""
    weights, solver, rank_deficient, tolerance = options
    if isinstance(A, Factorization):
        A.require_alone(rank_deficient, weights=weights, solver=solver, rank_tolerance=tolerance)
        return A
    return unprepared(A, None, weights, FACTOR if solver is None else solver, rank_deficient, tolerance)


def hat_diagonal(A: Factorization) -> tuple[Tensor, Tensor]:
    """The diagonals of H and of 1 - H, each (m,) and real."""
    found = None if is_traced(A.values) else _by_columns(A)
    return _by_rows(A) if found is None else found


def _by_columns(A: Factorization) -> tuple[Tensor, Tensor] | None:
    """As `hat_diagonal`, or None where the condition number is too large for that."""
    (m, n), weights = A.shape, A.weights
    total = None
    for block in in_blocks(torch.arange(n, device=A.device), max(1, min(BLOCK, _NUMBERS // max(m, 1)))):
        unit = torch.nn.functional.one_hot(block, n).T
        problem = posed(A, A.values.new_zeros((m, len(block))), NONE)
        B, _, report = run(problem, "raise", -unit.to(problem.b.dtype)[None])
        if total is None and bool((concrete(Report.unpacked(report).condition) > _CONDITION).any()):
            return None
        part = -(B[0] * problem.A.matmul(unit.to(problem.b.dtype)).conj()).sum(1).real
        total = part if total is None else total + part
    if total is None:
        total = A.values.real.new_zeros(m)
    if weights is not None:  # a constraint is met exactly, whatever the others say
        infinite = weights.isinf()
        total = torch.where(infinite, 1.0, torch.where(infinite, 0.0, weights) * total)
    return total.to(A.values.real.dtype), (1 - total).to(A.values.real.dtype)


def _by_rows(A: Factorization) -> tuple[Tensor, Tensor]:
    """As `hat_diagonal`: columns of H^H are adjoint solves, which share the factors of one."""
    m, fits, rests = A.shape[0], [], []

    def fitted(b: Tensor) -> Tensor:
        return A.matmul(solved(A, b, NONE)[0])

    pulled: Any = torch.func.vjp(fitted, A.values.new_zeros(m))
    fit, back = pulled
    for rows in in_blocks(torch.arange(m, device=A.device), BLOCK):
        unit = torch.nn.functional.one_hot(rows, m).T.to(fit.dtype)
        column = torch.vmap(back, 1, 1)(unit)[0]
        fits.append(column[rows].diagonal().real)
        rests.append((unit - column)[rows].diagonal().real)
    none = [A.values.real.new_zeros(0)]
    return torch.cat(fits or none), torch.cat(rests or none)
