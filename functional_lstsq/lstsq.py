"""`lstsq` and `solve`: from A, b, damp and weights to the augmented system, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .distributed.matrix import ShardedMatrix
from .distributed.solve import solve_sharded
from .distributed.studies import is_sharded
from .fits.report import RobustInfo
from .fits.robust import fit_robustly
from .linear.arguments import Problem, in_vectors, pose
from .linear.bounds import pose_bounds, solve_bounded
from .linear.factorization import Factorization
from .linear.operator_graph import solve_in_graph
from .linear.posed import finished, rounded, run, shaped
from .linear.settings import settings_of
from .result import Report, Solution, info_of, method_code
from .solvers.watching import Step, watchable
from .sparse.matrix import SparseMatrix
from .sparse.operator import LinearOperator
from .torch_func.tracing import beside_graph, is_watched, is_whole_graph


@watchable
def lstsq(
    A: SparseMatrix | LinearOperator | Factorization | ShardedMatrix | Tensor,
    b: Tensor,
    *,
    damp: float | Tensor | None = None,
    weights: Tensor | None = None,
    bounds: Any = None,
    robust: Any = None,
    solver: Any = None,
    rank_deficient: str = "raise",
    rank_tolerance: float | None = None,
    refine: str = "auto",
    x0: Tensor | None = None,
    progress: bool | Callable[[Step], object] = False,
) -> Tensor:
    """The least-squares solution of A x = b for a sparse A, differentiable to any order by everything it is given.

    Minimises sum_i weights_i |b - A x|_i^2 + sum_j damp_j^2 |x_j|^2 over x. Where A has fewer rows than columns and
    there is no damping, x is the solution of least norm. Composes with every transformation of torch.func: gradients
    with respect to A are values at its stored entries only.

    Args:
        A: (m, n) SparseMatrix, or torch sparse COO (coalesced or not), CSR or CSC tensor, of full rank; or a
            LinearOperator, which is solved by `CGLS`, with unscaled columns, for pytrees b and x if it is given an
            example of x; or what `factorize` gives, whose factors
            are used; or what `distributed.shard_rows` gives, with rows on many ranks.
        b: (m,) or (m, k); every column is a problem of its own. Dtypes of A and b are promoted as in A @ b.
        damp: non-negative number or 0-d real tensor, in units of A; or (n,), one for each unknown, of which zeros do
            nothing and infinity pins an unknown at zero; None for no damping.
        weights: (m,) non-negative real tensor, in units of 1 / variance of b; None for ones. A row of weight 0 is left
            out, and has an ordinary derivative by its weight. A row of infinite weight is a constraint, an equation
            that is met exactly; A needs full rank only together with these, and they must be linearly independent.
            (Of a wide A without damping a derivative by a weight of 0 is NaN, one that loses a row has no full rank,
            and weights are finite. In a compiled graph, or with one damping for all below 1e-6 of the largest entry of
            A, a derivative of a wide A by a weight of 0 is not to be had: reverse mode gives NaN, forward mode raises.)
        bounds: (lower, upper), with x between them: each a number, which may be infinite, or a real tensor of shape
            (), (n,) or, for b (m, k), (n, k), of which x has derivatives too. Equal ones pin an unknown, with the
            derivative by the one that it is pressed against. For a real A, in pytrees if x is one; a wide A too, where
            the bounds leave full rank to the unknowns between them. x has no derivative where strict
            complementarity fails: one by an unknown that touches its bound and is not pressed against it, to the errors
            of either, is refused. Not within torch.compile.
        robust: a loss rho, as `Huber()` (see there) or `Tukey(0.1)`: minimises sum_i 2 rho(sqrt(weights_i)
            (b - A x)_i) + damp^2 |x|^2, for each column of b, by iteratively reweighted least squares (at most 200
            steps) from x0, or from the solution for squares. For a real SparseMatrix, or sparse tensor, with m >= n.
        solver: `Dense()`, `Direct()`, `CGLS()`, or another solver object; None is `Auto()`, which chooses by predicted
            cost and moves on where a method has no answer that is accepted.
        rank_deficient: "raise", or "minimum_norm" for A^+ b, with the derivatives for changes that keep the rank.
        rank_tolerance: fraction of the largest singular value, columns scaled to norm 1, below which others count as
            zero, less than 1e-6; None for 4 (eps + 2.2e-16 sqrt(max(m, n))), with which a small A whose rank depends on
            the units of its equations is refused. For designs that lack rank but for errors.
        refine: "auto" takes residuals in about twice double precision where rounding would make errors above 1e-11
            (1e-9 with `CGLS`); "extended" always does. Errors then are of the size of rounding x itself while the
            condition number is below about 1e13. (Of a wide A, or a LinearOperator, weights are multiplied in as square
            roots, and the rounding of that stays.)
        x0: (n,) or (n, k) as x, where iterating starts: the last solution of a training loop, say. It saves time and
            changes neither what is accepted nor any derivative; none flows through it. Only `CGLS` makes use of it,
            for m >= n.
        progress: True shows how far it has come, a function is told; as `progress` does, which sees derivatives too.

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
    `robust` a factorisation for each iteration and column of b. With `bounds` one for each pass and column of b, 3 to
    10 as a rule; up to 4 n where one unknown after the other must be freed. All arithmetic of a solve is in double
    precision; results are rounded to the dtype of the input.

    Source: the augmented system (Björck, Numerical Methods for Least Squares Problems, SIAM 1996, section 2.1);
    derivatives of the pseudoinverse by Golub and Pereyra, SIAM J. Numer. Anal. 10(2), 1973; bounds by block principal
    pivoting (Portugal, Judice, Vicente, Math. Comp. 63, 1994; Kim and Park, SIAM J. Sci. Comput. 33(6), 2011).

    >>> import torch, functional_lstsq as fl
    >>> pattern = fl.SparsePattern(torch.tensor([[0, 1, 2, 2], [0, 1, 0, 1]]), (3, 2))
    >>> values = torch.tensor([1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    >>> b = torch.tensor([1.0, 2.0, 3.5], dtype=torch.float64)
    >>> fl.lstsq(fl.SparseMatrix(values, pattern), b)
    tensor([0.1667, 2.8333], dtype=torch.float64)
    >>> torch.func.jacrev(lambda b: fl.lstsq(fl.SparseMatrix(values, pattern), b))(b)
    tensor([[ 0.6667,  0.3333, -0.3333],
            [ 0.3333,  0.6667,  0.3333]], dtype=torch.float64)
    >>> fl.lstsq(fl.SparseMatrix(values, pattern), b, bounds=(0.5, float("inf")))
    tensor([0.5000, 3.0000], dtype=torch.float64)
    """
    if is_beside(A, robust, bounds):
        return _lstsq_beside(A, b, damp, weights, robust, solver, rank_deficient, rank_tolerance, refine, x0, bounds)
    return _lstsq(A, b, damp, weights, robust, solver, rank_deficient, rank_tolerance, refine, x0, bounds)


def _lstsq(A, b, damp, weights, robust, solver, rank_deficient, rank_tolerance, refine, x0, bounds) -> Tensor:
    if isinstance(A, LinearOperator) and A.trees is not None:
        return _solve(A, b, damp, weights, robust, solver, rank_deficient, rank_tolerance, refine, x0, bounds, True).x
    given = A, b, damp, weights, robust, solver, rank_deficient, refine, x0
    if isinstance(A, LinearOperator) and torch.compiler.is_dynamo_compiling():
        return solve_in_graph(*given, rank_tolerance, throw=True).x
    if is_sharded(A):
        return solve_sharded(*given, rank_tolerance, bounds, throw=True).x
    problem = pose(*given, rank_tolerance=rank_tolerance, bounds=bounds)
    if bounds is not None:
        posed = pose_bounds(problem, bounds, robust)
        return rounded(shaped(solve_bounded(posed, "raise").x, posed.problem), posed.problem, "x")
    if robust is not None and problem.b.numel():
        return _run_robust(problem, robust, throw=True)[0]
    r, x, _ = run(problem, "raise")
    return rounded(shaped(r if problem.wide else x, problem), problem, "x")


@watchable
def solve(
    A: SparseMatrix | LinearOperator | Factorization | ShardedMatrix | Tensor,
    b: Tensor,
    *,
    damp: float | Tensor | None = None,
    weights: Tensor | None = None,
    bounds: Any = None,
    robust: Any = None,
    solver: Any = None,
    rank_deficient: str = "raise",
    rank_tolerance: float | None = None,
    refine: str = "auto",
    x0: Tensor | None = None,
    throw: bool = True,
    progress: bool | Callable[[Step], object] = False,
) -> Solution:
    """Like `lstsq`, with the residual and with what is known of the solution.

    Args:
        throw: False returns what was reached instead of raising; `info.status`, the worst of the columns, tells. x is
            accepted where that is "converged", or "zero but for rounding"; as good as `info.forward_error` says where
            it is "inaccurate" or "iteration limit reached"; spoilt where it is "out of range"; NaN where it is "rank
            deficient"; of robust fits the point that was reached. Derivatives through a column that failed are NaN,
            but zero where nothing depends on it: one that `torch.where` masks in a batch does no harm.
            Where `CGLS` failed before it knew what to trust, x is the iterate after `max_iterations` (or sooner, where
            its gradient is small), with an infinite `info.forward_error`. `TooLarge` is raised all the same. With
            bounds, derivatives where strict complementarity fails are NaN.
        The others are those of `lstsq`.

    Returns:
        `Solution(x, residual, info)`: x (n,) or (n, k), residual b - A x (m,) or (m, k), both differentiable, and a
        `SolveInfo`, which is not; of a robust fit a `RobustInfo`, which has its `scale`; with bounds a `BoundedInfo`,
        which has `active`, -1 for an unknown at its lower bound and 1 at its upper one, `multipliers`, and `weak`,
        where strict complementarity fails. The residual is solved for, as accurate as x, and so are its derivatives;
        those of b - A @ lstsq(A, b), which is what rounding leaves of a difference, are not.

    Raises, cost and source: as `lstsq`; the residual is free where m >= n (a product, for a weighted LinearOperator).

    >>> import torch, functional_lstsq as fl
    >>> A = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]], dtype=torch.float64).to_sparse_csr()
    >>> solution = fl.solve(A, torch.tensor([1.0, 2.0, 3.5], dtype=torch.float64))
    >>> solution.residual
    tensor([ 0.8333, -0.8333,  0.8333], dtype=torch.float64)
    >>> solution.info.status, bool(solution.info.forward_error < 1e-14)
    ('converged', True)
    """
    if is_beside(A, robust, bounds):
        return _solve_beside(
            A, b, damp, weights, robust, solver, rank_deficient, rank_tolerance, refine, x0, bounds, throw
        )
    return _solve(A, b, damp, weights, robust, solver, rank_deficient, rank_tolerance, refine, x0, bounds, throw)


def _solve(A, b, damp, weights, robust, solver, rank_deficient, rank_tolerance, refine, x0, bounds, throw) -> Solution:
    if isinstance(A, LinearOperator) and A.trees is not None:
        of_x, of_b = A.trees
        A, b, damp, weights, x0, bounds = in_vectors(A, b, damp, weights, x0, bounds)
        every = A, b, damp, weights, robust, solver, rank_deficient, rank_tolerance, refine, x0, bounds, throw
        x, residual, info = _solve(*every)
        return Solution(of_x.tree(x), of_b.tree(residual), info)
    given, found = (A, b, damp, weights, robust, solver, rank_deficient, refine, x0), None
    if isinstance(A, LinearOperator) and torch.compiler.is_dynamo_compiling():
        return solve_in_graph(*given, rank_tolerance, throw=throw)
    if is_sharded(A):
        return solve_sharded(*given, rank_tolerance, bounds, throw=throw)
    problem = pose(*given, rank_tolerance=rank_tolerance, throw=throw, bounds=bounds)
    if bounds is not None:
        posed = pose_bounds(problem, bounds, robust)
        problem, found = posed.problem, solve_bounded(posed, "raise" if throw else "return")
    if robust is not None and problem.b.numel():
        return Solution(*_run_robust(problem, robust, throw=throw))
    how = "raise" if throw else "return"
    solution = finished(problem, *(run(problem, how) if found is None else found[:3]), throw=throw)
    return solution if found is None else solution._replace(info=found.told(solution.info, problem.b.ndim == 1))


_NO_GRAPH = (
    "torch.compile cannot take bounds=, robust=, x and b that are pytrees, a sharded matrix of operators or with "
    "factors that are kept, or a torch sparse tensor; compile what makes the arguments, for a sparse tensor "
    "SparseMatrix.from_torch"
)
_lstsq_beside, _solve_beside = beside_graph(_lstsq, _NO_GRAPH), beside_graph(_solve, _NO_GRAPH)


def is_beside(A: Any, robust: Any, bounds: Any = None) -> bool:
    """Whether Dynamo is tracing what it cannot take, or would try to, function by function."""
    beyond = robust is not None or bounds is not None
    in_whole = isinstance(A, LinearOperator) and A.trees is None
    in_whole = in_whole or (isinstance(A, ShardedMatrix) and isinstance(A.rows, SparseMatrix))
    if torch.compiler.is_dynamo_compiling() and in_whole and not beyond:
        return not is_whole_graph()
    beyond = beyond or isinstance(A, (LinearOperator, Tensor)) or is_sharded(A)
    return beyond and (torch.compiler.is_dynamo_compiling() or is_watched())


def _run_robust(problem: Problem, robust: Any, *, throw: bool) -> tuple[Tensor, Tensor, RobustInfo]:
    """(x, b - A x, info) of a robust fit."""
    x, fit, scale = fit_robustly(problem, robust, _start(problem, throw), throw)
    unknown = torch.full_like(fit.status, torch.nan)
    report = Report(
        status=fit.status,
        method=torch.full_like(fit.status, method_code("IRLS")),
        iterations=fit.iterations,
        optimality=fit.optimality,
        residual_error=unknown,
        weighted_error=unknown,
        solution_error=fit.forward_error,
        condition=fit.condition,
        rank=fit.rank,
        norm=fit.norm,
        tried=torch.zeros_like(fit.status),
        rounding=unknown,
    )
    told = info_of(Report(*(field[None] for field in report)), wide=False, single=problem.b.ndim == 1)
    info = RobustInfo(told, shaped(scale[None, None], problem)[0])
    if settings_of(problem.settings).minimum_norm:
        # The fit moves along no null vector, but A^+ does where the null space of A turns.
        x = run(problem._replace(b=problem.A.matmul(x), damp=None, weights=None), "raise" if throw else "return")[1][0]
    x = shaped(x[None], problem)
    residual = problem.b - problem.A.matmul(x)
    return rounded(x, problem, "x"), rounded(residual, problem, "the residual"), info


def _start(problem: Problem, throw: bool) -> Tensor:
    """(n, k) where a robust fit starts: what is given, or the solution for squares; zero where there is none."""
    if problem.x0 is not None:
        return problem.x0[:, None] if problem.x0.ndim == 1 else problem.x0
    x = run(problem, "raise" if throw else "return")[1][0].detach()
    return torch.where(x.isfinite(), x, 0.0)
