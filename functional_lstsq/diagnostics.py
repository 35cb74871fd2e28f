"""What studies of a least-squares solution ask for: leverage, covariance, residuals of left-out rows, condition.

All but `condition` are made of solves, so they are differentiable to any order by A, b and weights, and compose
with torch.func. None forms a matrix of n x n or m x m: columns are solved for in blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .lstsq import lstsq, rounded, run, shaped, solve
from .matrix import DTYPES, SparseMatrix
from .operator import JacobianOperator, LinearOperator
from .pattern import SparsePattern
from .problem import pose
from .solvers.numerics import noise

_BLOCK = 256  # columns that are solved for together


def leverage(
    A: SparseMatrix | Tensor,
    weights: Tensor | None = None,
    *,
    solver: Any = None,
    samples: int | None = None,
    seed: int = 0,
) -> Tensor:
    """The diagonal of the hat matrix H = A (A^H W A)^-1 A^H W: how much each row decides its own fit, from 0 to 1.

    Args:
        A: (m, n) SparseMatrix or torch sparse tensor, m >= n, of full rank.
        weights: (m,) as in `lstsq`, or None.
        solver: as in `lstsq`.
        samples: None for exact leverages; or how many random signs z to average z (H z) over, elementwise, whose
            standard error is about sqrt(h (1 - h) / samples).
        seed: of the samples: the same numbers every time.

    Returns:
        (m,), real; exact ones sum to n.

    Raises: as `lstsq`; ValueError where A is wide or `samples` is not positive.

    Cost: one factorisation and m + 1 solves, in blocks of 256 columns; or `samples` solves.

    Source: Hoaglin and Welsch, The American Statistician 32(1), 1978; Bekas, Kokiopoulou, Saad, Appl. Numer. Math.
    57(11), 2007, for the estimate.

    >>> import functional_lstsq as fl
    >>> A = fl.SparseMatrix.from_torch(torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0]], dtype=torch.float64).to_sparse())
    >>> fl.leverage(A)
    tensor([0.5000, 0.5000, 1.0000], dtype=torch.float64)
    """
    if samples is None:
        A = _tall(A)
        return _hat(A, A.values.new_zeros(A.shape[0]), weights, solver)[0]
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be a positive integer or None, got {samples!r}")
    A = _tall(A)
    z = noise(torch.empty(A.shape[0], samples, device=A.device), seed).sign().to(A.dtype)
    return (z * A.matmul(lstsq(A, z, weights=weights, solver=solver))).mean(1).real


def leave_one_out(A: SparseMatrix | Tensor, b: Tensor, weights: Tensor | None = None, *, solver: Any = None) -> Tensor:
    """Each row's residual b_i - a_i x for the x that all other rows give: r_i / (1 - h_i), without solving m problems.

    Args:
        A, weights, solver: as in `leverage`.
        b: (m,).

    Returns:
        (m,); NaN for a row that no other row controls (leverage 1), without which A has no full rank.

    Raises: as `lstsq`; ValueError where A is wide.

    Cost: as `leverage`, exact.

    Source: Allen, Technometrics 16(1), 1974 (PRESS).

    >>> import functional_lstsq as fl
    >>> A = fl.SparseMatrix.from_torch(torch.ones(3, 1, dtype=torch.float64).to_sparse())
    >>> fl.leave_one_out(A, torch.tensor([1.0, 2.0, 6.0]))
    tensor([-3.0000, -1.5000,  4.5000], dtype=torch.float64)
    """
    A = _tall(A)
    if not isinstance(b, Tensor) or b.shape != A.shape[:1]:
        got = f"shape {tuple(b.shape)}" if isinstance(b, Tensor) else type(b).__name__
        raise ValueError(f"b must be a tensor of shape ({A.shape[0]},), got {got}")
    if b.dtype in DTYPES or not b.is_floating_point():  # others are refused
        b = b.to(torch.promote_types(A.dtype, b.dtype))
    _, others, residual = _hat(A, b, weights, solver)
    return residual / torch.where(others > 1e-10, others, torch.nan)


def covariance(
    A: SparseMatrix | Tensor, columns: Tensor | list[int], weights: Tensor | None = None, *, solver: Any = None
) -> Tensor:
    """Columns of (A^H W A)^-1: the covariance of x where the rows' errors have the variances 1 / weights.

    For errors of one unknown variance, multiply by its estimate, |r|^2 / (m - n).

    Args:
        A, weights, solver: as in `leverage`.
        columns: which, (k,) integers.

    Returns:
        (n, k).

    Raises: as `lstsq`; ValueError where A is wide or a column lies outside of it.

    Cost: one factorisation and k solves.

    >>> import functional_lstsq as fl
    >>> A = fl.SparseMatrix.from_torch(torch.tensor([[2.0, 0], [0, 1.0], [0, 1.0]], dtype=torch.float64).to_sparse())
    >>> fl.covariance(A, [1])
    tensor([[0.0000],
            [0.5000]], dtype=torch.float64)
    """
    A = _tall(A)
    (m, n), columns = A.shape, torch.as_tensor(columns, device=A.device)
    if columns.ndim != 1 or columns.is_floating_point() or columns.dtype == torch.bool:
        raise ValueError(f"columns must be integers of shape (k,), got {columns.dtype}, shape {tuple(columns.shape)}")
    if columns.numel() and not 0 <= int(columns.min()) <= int(columns.max()) < n:
        raise ValueError(f"columns must lie between 0 and {n - 1}, got {int(columns.min())} to {int(columns.max())}")
    problem = pose(A, A.values.new_zeros((m, len(columns))), None, weights, None, solver, "raise", "auto", None)
    # K (r, x) = (0, c) means x = -(A^H W A)^-1 c
    c = -torch.nn.functional.one_hot(columns, n).T.to(problem.b.dtype)
    return rounded(shaped(run(problem, "raise", c[None])[1], problem), problem, "the covariance")


def covariance_diagonal(A: SparseMatrix | Tensor, weights: Tensor | None = None, *, solver: Any = None) -> Tensor:
    """The diagonal of (A^H W A)^-1: the variance of each unknown.

    Args, errors and source: as `covariance`.

    Returns:
        (n,), real.

    Cost: n solves, in blocks of 256 columns, with a factorisation for each block.

    >>> import functional_lstsq as fl
    >>> A = fl.SparseMatrix.from_torch(torch.tensor([[2.0, 0], [0, 1.0], [0, 1.0]], dtype=torch.float64).to_sparse())
    >>> fl.covariance_diagonal(A)
    tensor([0.2500, 0.5000], dtype=torch.float64)
    """
    A = _tall(A)
    blocks = torch.arange(A.shape[1], device=A.device).split(_BLOCK)
    found = [covariance(A, block, weights, solver=solver)[block].diagonal().real for block in blocks]
    return torch.cat(found) if found else A.values.real.new_zeros(0)


def condition(A: SparseMatrix | LinearOperator | Tensor, *, solver: Any = None) -> Tensor:
    """An estimate of the 2-norm condition number of A with its columns (rows, where it is wide) scaled to norm 1.

    Args:
        A: as in `lstsq`.
        solver: as in `lstsq`.

    Returns:
        0-d, infinite without full rank, a lower bound where `CGLS` ran out of iterations. It carries no derivative.

    Cost: one solve.

    >>> import functional_lstsq as fl
    >>> A = torch.tensor([[1.0, 1.0], [0, 1e-3], [0, 0]], dtype=torch.float64).to_sparse()
    >>> bool(abs(fl.condition(A) / 2e3 - 1) < 0.5)
    True
    """
    if isinstance(A, Tensor):
        A = SparseMatrix.from_torch(A)
    double = A.double(torch.promote_types(A.dtype, torch.float64)) if isinstance(A, LinearOperator) else A
    b = double.matmul(torch.ones(double.shape[1], dtype=A.dtype, device=A.device)).to(A.dtype)
    return solve(A, b, solver=solver, throw=False).info.condition


def jacobian_operator(A: SparseMatrix, b: Tensor, **options: Any) -> LinearOperator:
    """d x / d values for x = lstsq(A, b), as a LinearOperator that is never formed.

    Args:
        A: (m, n) SparseMatrix.
        b: (m,).
        options: those of `lstsq`.

    Returns:
        J of shape (n, nnz): `J @ v` for v (nnz,) or (nnz, k), `J.adjoint(y)` for y (n,) or (n, k), aligned to the
        pattern's indices.

    Cost: of a product, two solves with one factorisation, whatever the number of columns.

    >>> import functional_lstsq as fl
    >>> pattern = fl.SparsePattern(torch.tensor([[0, 1, 2, 2], [0, 1, 0, 1]]), (3, 2))
    >>> A = fl.SparseMatrix(torch.tensor([1.0, 1.0, -1.0, 1.0], dtype=torch.float64), pattern)
    >>> J = fl.jacobian_operator(A, torch.tensor([1.0, 2.0, 3.5], dtype=torch.float64))
    >>> J.shape
    (2, 4)
    >>> J.adjoint(torch.tensor([1.0, 0.0], dtype=torch.float64))
    tensor([ 0.4444, -1.2222,  0.6111,  1.2222], dtype=torch.float64)
    """
    if not isinstance(A, SparseMatrix):
        raise TypeError(f"A must be a SparseMatrix, got {type(A).__name__}")
    if not isinstance(b, Tensor) or b.shape != A.shape[:1]:
        got = f"shape {tuple(b.shape)}" if isinstance(b, Tensor) else type(b).__name__
        raise ValueError(f"b must be a tensor of shape ({A.shape[0]},), got {got}")
    return JacobianOperator(_OfValues(A.pattern, b, options), A.values)


@dataclass(frozen=True)
class _OfValues:
    """The solution as a function of the values, which can be pickled."""

    pattern: SparsePattern
    b: Tensor
    options: dict[str, Any]

    def __call__(self, values: Tensor) -> Tensor:
        return lstsq(SparseMatrix(values, self.pattern), self.b, **self.options)


def _tall(A: SparseMatrix | Tensor) -> SparseMatrix:
    if isinstance(A, Tensor):
        A = SparseMatrix.from_torch(A)
    if not isinstance(A, SparseMatrix):
        raise TypeError(f"A must be a SparseMatrix or a torch sparse tensor, got {type(A).__name__}")
    if A.shape[0] < A.shape[1]:
        raise ValueError(f"A must have at least as many rows as columns, got shape {A.shape}")
    return A


def _hat(A: SparseMatrix, b: Tensor, weights: Tensor | None, solver: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The diagonals of H and of 1 - H, and the residual of b, each (m,), the first two real.

    Columns of H^H are adjoint solves, which share the factors of the solve for b.
    """
    m, fits, rests = A.shape[0], [], []

    def fitted(b: Tensor) -> tuple[Tensor, Tensor]:
        solution = solve(A, b, weights=weights, solver=solver)
        # Its residual is more exact than b - A x where A is ill-conditioned.
        return A.matmul(solution.x), solution.residual

    pulled: Any = torch.func.vjp(fitted, b, has_aux=True)
    fit, back, residual = pulled
    for rows in torch.arange(m, device=A.device).split(_BLOCK):
        unit = torch.nn.functional.one_hot(rows, m).T.to(fit.dtype)
        column = torch.vmap(back, 1, 1)(unit)[0]
        fits.append(column[rows].diagonal().real)
        rests.append((unit - column)[rows].diagonal().real)
    none = [A.values.real.new_zeros(0)]
    return torch.cat(fits or none), torch.cat(rests or none), residual
