"""What studies of a least-squares solution ask for: leverage, covariance, residuals of left-out rows.

They are made of solves, so they are differentiable to any order by A, b and weights, and compose
with torch.func. None forms a matrix of n x n or m x m: columns are solved for in blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .distributed.studies import covariance_together, is_sharded, leverage_together
from .hat_matrix import BLOCK, NONE, Options, hat_diagonal, options_of, posed, solved, with_factors
from .linear.factorization import Factorization
from .linear.posed import rounded, run, shaped
from .result import Report
from .sandwich import sandwich
from .solvers.watching import Step, in_blocks, watchable
from .sparse.matrix import DTYPES, SparseMatrix
from .sparse.numerics import noise
from .torch_func.tracing import concrete, is_traced, sparse_beside_graph

_ALONE = 1e-3  # 1 - h, taken as a difference, has lost three digits there


@watchable
@sparse_beside_graph
def leverage(
    A: SparseMatrix | Factorization | Tensor,
    weights: Tensor | None = None,
    *,
    solver: Any = None,
    samples: int | None = None,
    seed: int = 0,
    rank_deficient: str = "raise",
    rank_tolerance: float | None = None,
    progress: bool | Callable[[Step], object] = False,
) -> Tensor:
    """The diagonal of the hat matrix H = A (A^H W A)^-1 A^H W: how much each row decides its own fit, from 0 to 1.

    Args:
        A: (m, n) SparseMatrix or torch sparse tensor, m >= n, of full rank; or what `factorize` gives; or what
            `distributed.shard_rows` does, with the leverages of a rank's rows, and without samples.
        weights: (m,) as in `lstsq`, or None.
        solver, rank_tolerance, progress: as in `lstsq`.
        rank_deficient: "raise", or "minimum_norm" for an A without full rank, as two-way dummies are, of which one is
            always too many: A^+ takes the place of the inverse, and leverages are unique all the same.
        samples: None for exact leverages; or how many random signs z to average z (H z) over, elementwise, whose
            standard error is about sqrt(h (1 - h) / samples).
        seed: of the samples: the same numbers every time.

    Returns:
        (m,), real; exact ones sum to the rank of A.

    Raises: as `lstsq`; ValueError where A is wide or `samples` is not positive.

    Cost: one factorisation and n + 1 solves, in blocks of 256 columns, for condition numbers up to 1e4; m + 1 solves
    for larger ones, and in a graph that is being compiled; or `samples` solves.

    Source: Hoaglin and Welsch, The American Statistician 32(1), 1978; Bekas, Kokiopoulou, Saad, Appl. Numer. Math.
    57(11), 2007, for the estimate.

    >>> import torch, functional_lstsq as fl
    >>> A = fl.SparseMatrix.from_torch(torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0]], dtype=torch.float64).to_sparse())
    >>> fl.leverage(A)
    tensor([0.5000, 0.5000, 1.0000], dtype=torch.float64)
    """
    if is_sharded(A):
        if samples is not None:
            raise ValueError("a sharded matrix allows no samples")
        return leverage_together(A, weights, solver, rank_deficient, rank_tolerance)
    options = options_of(weights, solver, rank_deficient, rank_tolerance)
    if samples is None:
        return hat_diagonal(with_factors(_tall(A), options))[0]
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be a positive integer or None, got {samples!r}")
    A = _tall(A)
    z = noise(torch.empty(A.shape[0], samples, device=A.device), seed).sign().to(A.dtype)
    return (z * A.matmul(solved(A, z, options)[0])).mean(1).real


@watchable
@sparse_beside_graph
def leave_one_out(
    A: SparseMatrix | Factorization | Tensor,
    b: Tensor,
    weights: Tensor | None = None,
    *,
    solver: Any = None,
    rank_deficient: str = "raise",
    rank_tolerance: float | None = None,
    progress: bool | Callable[[Step], object] = False,
) -> Tensor:
    """Each row's residual b_i - a_i x for the x that all other rows give: r_i / (1 - h_i), without solving m problems.

    Args:
        A, weights, solver, rank_deficient, rank_tolerance, progress: as in `leverage`.
        b: (m,).

    Returns:
        (m,); NaN, of derivative 0, for a row that no other row controls (leverage 1), without which A has no full rank:
        where the estimated error of the residual of its unit vector, (1 - H) e_i, is above eps^(1/3).

    Raises: as `lstsq`; ValueError where A is wide.

    Cost: as `leverage`, exact. Rows of leverage above 0.999, which are at most n / 0.999, are solved for once more, in
    extended precision, with a factorisation for each block.

    Source: Allen, Technometrics 16(1), 1974 (PRESS).

    >>> import torch, functional_lstsq as fl
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
    options = options_of(weights, solver, rank_deficient, rank_tolerance)
    kept = with_factors(A, options)
    others, residual = hat_diagonal(kept)[1], solved(kept, b, NONE)[1]
    alone = _nearly_alone(others, A.shape[1])
    left_out = residual / others.scatter(0, alone, 1.0)
    if not alone.numel():
        return left_out
    found = [_left_out(A, b, rows, options) for rows in in_blocks(alone, BLOCK)]
    return left_out.scatter(0, alone, torch.cat(found))


@watchable
@sparse_beside_graph
def covariance(
    A: SparseMatrix | Factorization | Tensor,
    columns: Tensor | list[int],
    weights: Tensor | None = None,
    *,
    b: Tensor | None = None,
    kind: str | None = None,
    groups: Tensor | list[int] | None = None,
    solver: Any = None,
    rank_deficient: str = "raise",
    rank_tolerance: float | None = None,
    progress: bool | Callable[[Step], object] = False,
) -> Tensor:
    """Columns of (A^H W A)^-1: the covariance of x where the rows' errors have the variances 1 / weights.

    For errors of one unknown variance, multiply by its estimate, |r|^2 / (m - n). With b it is the sandwich, which
    takes the variances from the residuals: consistent whatever these are.

    Args:
        A, weights, solver, rank_tolerance, progress: as in `leverage`.
        columns: which, (k,) integers.
        rank_deficient: "raise", or "minimum_norm" for (A^H W A)^+ where A has no full rank: the covariance of the
            solution of least norm, and so that of what A determines, its estimable functions.
        b: (m,), the right-hand side, for a sandwich.
        kind: "HC0", "HC1", "HC2" or "HC3", of independent errors with b; the last is the one for small samples.
        groups: (m,) integers, in place of `kind`: errors of rows with the same number are dependent, others are not.

    Returns:
        (n, k).

    Raises: as `lstsq`; ValueError where A is wide or a column lies outside of it, where kind or groups are not as above
        or come without b, where there is one group only, and for HC2 and HC3 where a row has leverage 1.

    Cost: one factorisation and k solves; 2 k + 1 with b, and those of `leave_one_out` for HC2 and HC3.

    Source: sandwich.py, with the factors; the numbers are those of statsmodels' `cov_type="HC0"` and so on, "cluster".

    >>> import torch, functional_lstsq as fl
    >>> A = fl.SparseMatrix.from_torch(torch.tensor([[2.0, 0], [0, 1.0], [0, 1.0]], dtype=torch.float64).to_sparse())
    >>> fl.covariance(A, [1])
    tensor([[0.0000],
            [0.5000]], dtype=torch.float64)
    >>> fl.covariance(A, [1], b=torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64), kind="HC1")
    tensor([[0.0000],
            [1.5000]], dtype=torch.float64)
    """
    if is_sharded(A) and b is None and kind is None and groups is None:
        return covariance_together(A, columns, weights, solver, rank_deficient, rank_tolerance)
    A = _tall(A)
    options = options_of(weights, solver, rank_deficient, rank_tolerance)
    columns = checked_columns(columns, A.shape[1], A.device)
    if b is not None or kind is not None or groups is not None:
        return sandwich(with_factors(A, options), b, kind, groups, leave_one_out).columns(columns)
    return _covariance(A, columns, options)


def checked_columns(columns: Any, n: int, device: torch.device) -> Tensor:
    """The numbers of columns among n."""
    columns = torch.as_tensor(columns, device=device)
    if columns.ndim != 1 or columns.is_floating_point() or columns.dtype == torch.bool:
        raise ValueError(f"columns must be integers of shape (k,), got {columns.dtype}, shape {tuple(columns.shape)}")
    if columns.numel() and not is_traced(columns):
        first, last = int(columns.min()), int(columns.max())
        if not 0 <= first <= last < n:
            raise ValueError(f"columns must lie between 0 and {n - 1}, got {first} to {last}")
    return columns


def _covariance(A: SparseMatrix | Factorization, columns: Tensor, options: Options) -> Tensor:
    m, n = A.shape
    problem = posed(A, A.values.new_zeros((m, len(columns))), options)
    # K (r, x) = (0, c) means x = -(A^H W A)^-1 c
    c = -torch.nn.functional.one_hot(columns, n).T.to(problem.b.dtype)
    return rounded(shaped(run(problem, "raise", c[None])[1], problem), problem, "the covariance")


@watchable
@sparse_beside_graph
def covariance_diagonal(
    A: SparseMatrix | Factorization | Tensor,
    weights: Tensor | None = None,
    *,
    b: Tensor | None = None,
    kind: str | None = None,
    groups: Tensor | list[int] | None = None,
    solver: Any = None,
    rank_deficient: str = "raise",
    rank_tolerance: float | None = None,
    progress: bool | Callable[[Step], object] = False,
) -> Tensor:
    """The diagonal of (A^H W A)^-1: the variance of each unknown.

    Args, errors and source: as `covariance`.

    Returns:
        (n,), real.

    Cost: one factorisation and n solves, in blocks of 256 columns; as many and one more with b, and those of
        `leave_one_out` for HC2 and HC3.

    >>> import torch, functional_lstsq as fl
    >>> A = fl.SparseMatrix.from_torch(torch.tensor([[2.0, 0], [0, 1.0], [0, 1.0]], dtype=torch.float64).to_sparse())
    >>> fl.covariance_diagonal(A)
    tensor([0.2500, 0.5000], dtype=torch.float64)
    """
    if is_sharded(A) and b is None and kind is None and groups is None:
        return covariance_together(A, None, weights, solver, rank_deficient, rank_tolerance)
    A = _tall(A)
    kept = with_factors(A, options_of(weights, solver, rank_deficient, rank_tolerance))
    if b is not None or kind is not None or groups is not None:
        return sandwich(kept, b, kind, groups, leave_one_out).diagonal()
    blocks = in_blocks(torch.arange(A.shape[1], device=A.device), BLOCK)
    found = [_covariance(kept, block, NONE)[block].diagonal().real for block in blocks]
    return torch.cat(found) if found else A.values.real.new_zeros(0)


def _tall(A: SparseMatrix | Factorization | Tensor) -> SparseMatrix | Factorization:
    if isinstance(A, Tensor):
        A = SparseMatrix.from_torch(A)
    if is_sharded(A):
        raise TypeError(
            "A must be a SparseMatrix or a torch sparse tensor, got a ShardedMatrix, of which there are leverages, and "
            "covariances without b, kind and groups"
        )
    if not isinstance(A, (SparseMatrix, Factorization)):
        raise TypeError(f"A must be a SparseMatrix or a torch sparse tensor, got {type(A).__name__}")
    if A.shape[0] < A.shape[1]:
        raise ValueError(f"A must have at least as many rows as columns, got shape {A.shape}")
    return A


def _nearly_alone(others: Tensor, n: int) -> Tensor:
    """The rows of which 1 - h cancels: those that decide their own fit nearly alone (of a batch, as many of each)."""
    # Leverages sum to n, which bounds how many may be near 1; a compiler must know the number beforehand.
    most = min(len(others), math.floor(n / (1 - _ALONE)))
    count = most if is_traced(others) else min(most, int((concrete(others) < _ALONE).sum()))
    return others.detach().topk(count, largest=False).indices


def _left_out(A: SparseMatrix | Factorization, b: Tensor, rows: Tensor, options: Options) -> Tensor:
    """r_i / (1 - h_i) for `rows` i, by sums that do not cancel as 1 - h_i and r_i do where h_i is near 1.

    K (q, y) = (e_i, 0) gives q = (1 - H) e_i, and H H = H, H^H W = W H, so q^H W q = w_i (1 - h_i), q^H W r = w_i r_i.
    """
    unit = (torch.arange(len(b), device=A.device)[:, None] == rows).to(b.dtype)
    problem = posed(A, torch.cat([unit, b[:, None]], 1), options, "extended")
    found, _, report = run(problem, "raise")
    (q, r), w = found[0].split((len(rows), 1), 1), problem.weights
    weighted = q.conj() if w is None else q.conj() * (w / w.detach().amax())[:, None]
    size = (weighted * q).sum(0).real
    # Where A without the row has no full rank, q is zero but for its errors.
    error = Report.unpacked(report).residual_error[0, : len(rows)]
    known = (error <= torch.finfo(problem.dtype).eps ** (1 / 3)) & (size > 0)
    left_out = (weighted * r).sum(0) / torch.where(known, size, 1.0)
    return rounded(torch.where(known, left_out, torch.nan), problem, "the left-out residual")
