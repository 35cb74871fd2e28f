"""`lstsq` and `solve`: from A, b, damp and weights to the augmented system, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .augmented import solve_augmented
from .errors import SCALE, ConvergenceError
from .matrix import SparseMatrix
from .matrix_free import solve_matrix_free
from .operator import LinearOperator
from .precision import convert
from .problem import Problem, pose
from .products import sample
from .result import Report, Solution, SolveInfo, method_code
from .robust import fit_robustly
from .transforms import concrete, is_traced


def lstsq(
    A: SparseMatrix | LinearOperator | Tensor,
    b: Tensor,
    *,
    damp: float | Tensor | None = None,
    weights: Tensor | None = None,
    robust: Any = None,
    solver: Any = None,
    rank_deficient: str = "raise",
    refine: str = "auto",
    x0: Tensor | None = None,
) -> Tensor:
    """The least-squares solution of A x = b for a sparse A, differentiable to any order by everything it is given.

    Minimises sum_i weights_i |b - A x|_i^2 + damp^2 |x|^2 over x. Where A has fewer rows than columns and there is no
    damping, x is the solution of least norm. Composes with every transformation of torch.func: gradients with
    respect to A are values at its stored entries only.

    Args:
        A: (m, n) SparseMatrix, or torch sparse COO (coalesced or not), CSR or CSC tensor, of full rank; or a
            LinearOperator, which is solved by `CGLS`, with unscaled columns and rank_deficient="raise".
        b: (m,) or (m, k); every column is a problem of its own. Dtypes of A and b are promoted as in A @ b.
        damp: non-negative number or 0-d real tensor, in units of A; None for no damping.
        weights: (m,) non-negative real tensor, in units of 1 / variance of b; None for ones. A row of weight 0 is left
            out, and has an ordinary derivative by its weight. (A wide A that loses a row has no full rank, see
            rank_deficient, and its derivative by a weight of 0 is NaN.)
        robust: `Huber()` or `Cauchy()`, of loss rho: minimises sum_i 2 rho(sqrt(weights_i) (b - A x)_i) + damp^2 |x|^2,
            for each column of b, by iteratively reweighted least squares (at most 200 steps) from x0, or from the
            solution for squares. For a real SparseMatrix, or sparse tensor, with m >= n.
        solver: `Dense()`, `Direct()`, `CGLS()`, or another solver object; None is `Auto()`, which chooses by predicted
            cost and moves on where a method has no answer that is accepted.
        rank_deficient: "raise", or "minimum_norm" for A^+ b, with the derivatives for changes that keep the rank.
        refine: "auto" takes residuals in about twice double precision where rounding would make errors above 1e-11
            (1e-9 with `CGLS`); "extended" always does. Errors then are of the size of rounding x itself while the
            condition number is below about 1e13. (Of a wide A, or a LinearOperator, weights are multiplied in as square
            roots, and the rounding of that stays.)
        x0: (n,) or (n, k) as x, where iterating starts: the last solution of a training loop, say. It saves time and
            changes neither what is accepted nor any derivative; none flows through it. Only `CGLS` makes use of it,
            for m >= n.

    Returns:
        x: (n,) or (n, k).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or with NaN or infinity in it.
        RankDeficientError: A has no full rank (a `torch.linalg.LinAlgError`).
        ConvergenceError: the estimated forward error of x, or of the residual, is above eps^(1/3) of the dtype, or that
            of a gradient by A is (a `torch.linalg.LinAlgError`). Errors are relative, except where the whole of x is
            below eps^(1/3) |b| / |A|, columns scaled, as for b orthogonal to the range: there an error of
            eps^(2/3) |b| / |A| is accepted. Also where a result or a derivative leaves the range of its dtype: where it
            overflows, or is spoilt by numbers that are below the smallest, and hence zero.
        TooLarge: the memory that it takes is not available (a `torch.linalg.LinAlgError` and a `MemoryError`).

    Cost: one solve, factorisation included; each derivative costs one further solve that reuses the factorisation, up
    to six where rank_deficient="minimum_norm". A tangent by A, and any derivative by damp, costs up to two more for
    each of the solutions in it, where condition numbers above 1e3 ask for what rounding has left out of them. With
    `robust` a factorisation for each iteration and column of b. All arithmetic of a solve is in double precision;
    results are rounded to the dtype of the input.

    Source: the augmented system (Björck, Numerical Methods for Least Squares Problems, SIAM 1996, section 2.1);
    derivatives of the pseudoinverse by Golub and Pereyra, SIAM J. Numer. Anal. 10(2), 1973.

    >>> import functional_lstsq as fl
    >>> pattern = fl.SparsePattern(torch.tensor([[0, 1, 2, 2], [0, 1, 0, 1]]), (3, 2))
    >>> values = torch.tensor([1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    >>> b = torch.tensor([1.0, 2.0, 3.5], dtype=torch.float64)
    >>> fl.lstsq(fl.SparseMatrix(values, pattern), b)
    tensor([0.1667, 2.8333], dtype=torch.float64)
    >>> torch.func.jacrev(lambda b: fl.lstsq(fl.SparseMatrix(values, pattern), b))(b)
    tensor([[ 0.6667,  0.3333, -0.3333],
            [ 0.3333,  0.6667,  0.3333]], dtype=torch.float64)
    """
    problem = pose(A, b, damp, weights, robust, solver, rank_deficient, refine, x0)
    if robust is not None and problem.b.numel():
        return _run_robust(problem, robust, True)[0]
    r, x, _ = run(problem, "raise")
    return rounded(shaped(r if problem.wide else x, problem), problem, "x")


def solve(
    A: SparseMatrix | LinearOperator | Tensor,
    b: Tensor,
    *,
    damp: float | Tensor | None = None,
    weights: Tensor | None = None,
    robust: Any = None,
    solver: Any = None,
    rank_deficient: str = "raise",
    refine: str = "auto",
    x0: Tensor | None = None,
    throw: bool = True,
) -> Solution:
    """Like `lstsq`, with the residual and with what is known of the solution.

    Args:
        throw: False returns what was reached instead of raising; `info.status` tells. Where there is no solution (rank
            deficient) x is NaN, and so are derivatives through a column that failed. Where `CGLS` failed before it
            solved anything x is zero, with an infinite `info.forward_error`. `TooLarge` is raised all the same.
        The others are those of `lstsq`.

    Returns:
        `Solution(x, residual, info)`: x (n,) or (n, k), residual b - A x (m,) or (m, k), both differentiable, and a
        `SolveInfo`, which is not.

    Raises, cost and source: as `lstsq`; the residual is free where m >= n and there are no weights.

    >>> import functional_lstsq as fl
    >>> A = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]], dtype=torch.float64).to_sparse_csr()
    >>> solution = fl.solve(A, torch.tensor([1.0, 2.0, 3.5], dtype=torch.float64))
    >>> solution.residual
    tensor([ 0.8333, -0.8333,  0.8333], dtype=torch.float64)
    >>> solution.info.status, bool(solution.info.forward_error < 1e-14)
    ('converged', True)
    """
    problem = pose(A, b, damp, weights, robust, solver, rank_deficient, refine, x0, throw=throw)
    if robust is not None and problem.b.numel():
        return Solution(*_run_robust(problem, robust, throw))
    r, x, numbers = run(problem, "raise" if throw else "return")
    report = Report(*(shaped(numbers[:, i, None], problem, 0) for i in range(len(Report._fields))))
    info = SolveInfo(
        status_code=report.status.to(torch.int64),
        method_code=report.method.to(torch.int64),
        iterations=report.iterations.to(torch.int64),
        optimality=report.optimality,
        forward_error=report.residual_error if problem.wide else report.solution_error,
        condition=report.condition,
        rank=report.rank.to(torch.int64),
        norm=report.norm,
        tried_code=report.tried.to(torch.int64),
        ticket=report.ticket.to(torch.int64),
    )
    solution = shaped(r if problem.wide else x, problem)
    is_residual = not problem.wide and (problem.weights is None or isinstance(problem.A, SparseMatrix))
    residual = shaped(r, problem) if is_residual else problem.b - problem.A.matmul(solution)
    if throw and not is_residual:
        _require_in_range("the residual b - A x", residual)
    return Solution(rounded(solution, problem, "x"), rounded(residual, problem, "the residual"), info)


def run(problem: Problem, on_failure: str, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(r, x, report) of K (r, x) = (b, c); of A^H in A's place and (0, b) where A is wide: there r is the solution."""
    A, (m, n), b, damp, weights, settings, _, x0, _ = problem
    columns = b[None] if b.ndim == 2 else b[None, :, None]
    damp = None if damp is None else damp[None]
    start = None if x0 is None or problem.wide else x0[None] if x0.ndim == 2 else x0[None, :, None]
    if isinstance(A, LinearOperator):
        if weights is not None:
            root = weights.sqrt()
            A, columns = A.weighted(root), root.to(columns.dtype)[None, :, None] * columns
        return solve_matrix_free(A, m, n, damp, columns, start, settings, on_failure)
    pattern, values = A.pattern, A.values
    if not problem.wide:
        indices, of_rows = pattern.indices, None if weights is None else weights[None]
        return solve_augmented(values[None], damp, columns, c, indices, m, n, settings, on_failure, start, of_rows)
    if weights is not None:
        root = weights.sqrt().to(values.dtype)[None, :, None]
        ones = values.new_ones((1, pattern.shape[1], 1))
        of_entries = sample(root, ones, pattern.indices, *pattern.shape)[0]  # root[i_k]
        values = _weighted("A", values, of_entries)
        columns = _weighted("b", columns, root)
    if values.is_complex():  # conj_physical has no rule for vmap
        values = torch.complex(values.real, -values.imag)
    return solve_augmented(values[None], damp, None, columns, pattern.T.indices, n, m, settings, on_failure)


def _weighted(name: str, numbers: Tensor, root: Tensor) -> Tensor:
    """Their product, refused where it overflows or becomes so small that it loses digits."""
    product = root * numbers
    smallest = torch.finfo(torch.float64).smallest_normal
    lost = (product.abs() < smallest) & (product.abs() < numbers.abs()) & (root != 0)
    _require_in_range(f"the product of {name} with the square roots of weights", product, lost)
    return product


def _require_in_range(name: str, result: Tensor, lost: Tensor | None = None) -> None:
    if is_traced(result):
        return
    gone = not bool(concrete(result).isfinite().all()) or (lost is not None and bool(concrete(lost).any()))
    if gone:
        raise ConvergenceError(f"{name} leaves the range of double precision", SCALE)


def _run_robust(problem: Problem, robust: Any, throw: bool) -> tuple[Tensor, Tensor, SolveInfo]:
    """(x, b - A x, info) of a robust fit."""
    x, report = fit_robustly(problem, robust, _start(problem, throw), throw)

    def of_columns(field: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        return (field[0] if problem.b.ndim == 1 else field).to(dtype)

    code = torch.full_like(report.status, method_code("IRLS"))
    info = SolveInfo(
        status_code=of_columns(report.status, torch.int64),
        method_code=of_columns(code, torch.int64),
        iterations=of_columns(report.iterations, torch.int64),
        optimality=of_columns(report.optimality),
        forward_error=of_columns(report.forward_error),
        condition=of_columns(report.condition),
        rank=of_columns(report.rank, torch.int64),
        norm=of_columns(report.norm),
        tried_code=of_columns(code, torch.int64),
        ticket=of_columns(torch.zeros_like(code), torch.int64),
    )
    x = x[:, 0] if problem.b.ndim == 1 else x
    residual = problem.b - problem.A.matmul(x)
    return rounded(x, problem, "x"), rounded(residual, problem, "the residual"), info


def _start(problem: Problem, throw: bool) -> Tensor:
    """(n, k) where a robust fit starts: what is given, or the solution for squares; zero where there is none."""
    if problem.x0 is not None:
        return problem.x0.reshape(problem.shape[1], -1)
    x = run(problem, "raise" if throw else "return")[1][0].detach()
    return torch.where(x.isfinite(), x, 0.0)


def rounded(result: Tensor, problem: Problem, name: str) -> Tensor:
    """A result in the user's precision, which its derivatives are judged by."""
    return convert(result, problem.dtype, f"the derivative of {name}", problem.on_failure)


def shaped(columns: Tensor, problem: Problem, single_dims: int = 1) -> Tensor:
    """(1, rows, k) -> (rows, k) or (rows,); (1, 1, k) -> (k,) or () for numbers of columns."""
    columns = columns[0]
    if problem.b.ndim == 1:
        columns = columns[:, 0]
    return columns if single_dims else columns[0]
