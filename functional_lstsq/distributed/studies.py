"""Factors that are kept, leverage and covariance of a sharded matrix, as `kept_factors` and `diagnostics` have them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..linear.factorization import Factorization, unprepared
from ..linear.posed import rounded, shaped
from ..linear.settings import check_solver
from ..result import Report, info_of
from ..solvers import Auto
from ..sparse.matrix import SparseMatrix
from ..torch_func.tracing import concrete, is_traced
from .matrix import ShardedMatrix
from .solve import Together, pose_together

FACTOR = Auto(factor=True)
_BLOCK = 256  # columns that are solved for together, at most
_CONDITION = 1e4  # at which sums over columns leave an absolute error of 1e-12 in a leverage


def is_sharded(A: Any) -> bool:
    """Whether rows of A are on many ranks; its factors may be kept."""
    return isinstance(A, ShardedMatrix) or (isinstance(A, Factorization) and isinstance(A.A, ShardedMatrix))


def factorize_together(A: ShardedMatrix, damp, weights, solver, rank_deficient, rank_tolerance) -> Factorization:
    """`factorize` on all ranks together."""

    def checked() -> tuple[Factorization, dict[str, object]]:
        check_solver(solver, "factorize")
        if not isinstance(A.rows, SparseMatrix):
            raise TypeError("A must have entries, got a ShardedMatrix of operators")
        given: Any = A  # which stands for a matrix
        return unprepared(given, damp, weights, solver or FACTOR, rank_deficient, rank_tolerance), {}

    F = A.ranks.checked(checked, A.device)
    with torch.no_grad():
        b = A.matmul(A.values.new_ones(A.shape[1]))
        report = _posed(F, b, None, "raise", None, of="factorize").run("raise")[2]
    return F if is_traced(A.values) else replace(F, info=info_of(Report.unpacked(report), wide=False, single=True))


def _posed(A: Any, b: Tensor, weights, rank_deficient, rank_tolerance, solver=None, of: str = "study") -> Together:
    return pose_together(A, b, None, weights, None, solver, rank_deficient, "auto", None, rank_tolerance, None, of=of)


def _kept(A: Any, weights, solver, rank_deficient, rank_tolerance) -> Factorization:
    """A with factors for many solves."""
    matrix: Any = A.A if isinstance(A, Factorization) else A

    def checked() -> tuple[Factorization, dict[str, object]]:
        check_solver(solver, "a study")
        if not isinstance(matrix.rows, SparseMatrix):
            raise TypeError("A must have entries, got a ShardedMatrix of operators")
        if matrix.shape[0] < matrix.shape[1]:
            raise ValueError(f"A must have at least as many rows as columns, got shape {matrix.shape}")
        if isinstance(A, Factorization):
            A.require_alone(rank_deficient, weights=weights, solver=solver, rank_tolerance=rank_tolerance)
            return A, {}
        return unprepared(matrix, None, weights, solver or FACTOR, rank_deficient, rank_tolerance), {}

    return matrix.ranks.checked(checked, matrix.device)


def covariance_together(A: Any, columns: Any, weights, solver, rank_deficient, rank_tolerance) -> Tensor:
    """`covariance`; with None for `columns` its diagonal."""
    F = _kept(A, weights, solver, rank_deficient, rank_tolerance)
    matrix: Any = F.A
    n, device = matrix.shape[1], matrix.device

    def checked() -> tuple[Tensor, dict[str, object]]:
        found = torch.arange(n, device=device) if columns is None else torch.as_tensor(columns, device=device)
        if found.ndim != 1 or found.is_floating_point() or found.dtype == torch.bool:
            raise ValueError(f"columns must be integers of shape (k,), got {found.dtype}, shape {tuple(found.shape)}")
        if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < n:
            raise ValueError(f"columns must lie between 0 and {n - 1}, got {int(found.min())} to {int(found.max())}")
        return found, {"columns": None if columns is None else found.tolist()}

    parts = []
    for block in matrix.ranks.checked(checked, device).split(_BLOCK):
        together, unit = _of_units(F, block)
        # K (r, x) = (0, c) means x = -(A^H W A)^-1 c
        problem = together.problem
        part = rounded(shaped(together.run("raise", -unit[None])[1], problem), problem, "the covariance")
        parts.append(part if columns is not None else part[block].diagonal().real)
    none = matrix.values.new_zeros((n, 0) if columns is not None else 0)
    return torch.cat(parts, -1) if parts else none


def _of_units(F: Factorization, block: Tensor) -> tuple[Together, Tensor]:
    """(a problem of as many columns, the unit vectors (n, k) of the unknowns `block`)"""
    matrix: Any = F.A
    here = matrix.rows.pattern.shape[0]
    together = _posed(F, matrix.values.new_zeros((here, len(block))), None, "raise", None)
    unit = torch.nn.functional.one_hot(block, matrix.shape[1]).T.to(together.problem.b.dtype)
    return together, unit


def leverage_together(A: Any, weights, solver, rank_deficient, rank_tolerance) -> Tensor:
    """`leverage` of this rank's rows: by columns, and row by row where the condition number is too large for that."""
    F = _kept(A, weights, solver, rank_deficient, rank_tolerance)
    matrix: Any = F.A
    total = matrix.values.real.new_zeros(matrix.rows.pattern.shape[0])
    for first, block in enumerate(torch.arange(matrix.shape[1], device=matrix.device).split(_BLOCK)):
        together, unit = _of_units(F, block)
        B, _, report = together.run("raise", -unit[None])
        if not first and bool((concrete(Report.unpacked(report).condition) > _CONDITION).any()):
            return _by_rows(F)
        problem: Any = together.problem
        total = total - (B[0] * problem.A.matmul(unit).conj()).sum(1).real
    if F.weights is not None:
        infinite = F.weights.isinf()
        total = torch.where(infinite, 1.0, torch.where(infinite, 0.0, F.weights) * total)
    return total.to(matrix.values.real.dtype)


def _by_rows(F: Factorization) -> Tensor:
    """Columns of H^H are adjoint solves; those of the rows of one rank after the other."""
    matrix: Any = F.A
    here, ranks = matrix.rows.pattern.shape[0], matrix.ranks

    def fitted(b: Tensor) -> Tensor:
        together = _posed(F, b, None, "raise", None)
        x = rounded(shaped(together.run("raise")[1], together.problem), together.problem, "x")
        return matrix.matmul(x)

    pulled: Any = torch.func.vjp(fitted, matrix.values.new_zeros(here))
    fit, back = pulled
    counts = [int(count) for count in ranks.each(torch.tensor([here], device=matrix.device))]
    found = []
    for place, count in enumerate(counts):
        for rows in torch.arange(count, device=matrix.device).split(_BLOCK) if count else ():
            mine = place == ranks.place
            unit = fit.new_zeros((here, len(rows)))
            if mine:
                unit[rows, torch.arange(len(rows), device=rows.device)] = 1
            column = torch.vmap(back, 1, 1)(unit)[0]
            if mine:
                found.append(column[rows].diagonal().real)
    return torch.cat(found) if found else matrix.values.real.new_zeros(0)
