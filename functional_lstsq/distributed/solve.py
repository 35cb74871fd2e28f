"""What `lstsq` and `solve` are asked of a sharded matrix, checked on all ranks together, and answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..linear.arguments import Problem, in_vectors, pose
from ..linear.augmented import Solve
from ..linear.bounds import Posed, pose_bounds
from ..linear.matrix_free import static_of
from ..linear.settings import Settings, settings_of
from ..result import Report, Solution, info_of
from ..solvers import CGLS, Auto, Dense
from ..sparse.matrix import SparseMatrix
from ..sparse.operator import LinearOperator
from ..sparse.precision import convert
from .bounds import solve_bounded_together
from .matrix import ShardedMatrix
from .operator_rows import SolveOverRanks, over_ranks
from .sparse_rows import ShardedRows


def solve_sharded(
    A: ShardedMatrix, b, damp, weights, robust, solver, rank_deficient, refine, x0, rank_tolerance, bounds,
    *, throw: bool,
) -> Solution:  # fmt: skip
    """`solve` for a sharded matrix; arguments are checked on all ranks together, before any work."""
    rows = A.rows
    if isinstance(rows, LinearOperator) and rows.trees is not None:
        of_x, of_b = rows.trees
        of_trees = rows, b, damp, weights, x0, bounds
        given = A.ranks.checked(lambda: (in_vectors(*of_trees), {}), A.device)
        rows, b, damp, weights, x0, bounds = given
        of_vectors = ShardedMatrix(rows, A.ranks, A.height)
        others = robust, solver, rank_deficient, refine, x0, rank_tolerance, bounds
        x, residual, info = solve_sharded(of_vectors, b, damp, weights, *others, throw=throw)
        return Solution(of_x.tree(x), of_b.tree(residual), info)

    def checked() -> tuple[tuple[Problem, Settings, Posed | None], Mapping[str, object]]:
        _refuse(A, damp, robust, solver, rank_deficient, bounds)
        given = pose(
            rows, b, damp, weights, None, solver, rank_deficient, refine, x0,
            rank_tolerance=rank_tolerance, throw=throw, part=True,
        )  # fmt: skip
        # A rank may have fewer rows than columns, without the matrix being wide.
        settings = replace(settings_of(given.settings), wide=False, exact=True)
        facts = {
            "the dtype of the solution": given.dtype,
            "solver, refine, rank_deficient and rank_tolerance": settings,
            "the columns of b": tuple(b.shape[1:]),
            "the shape of damp": None if given.damp is None else tuple(given.damp.shape),
            "whether there are weights": weights is not None,
            "whether there is x0": x0 is not None,
            "throw": throw,
        }
        posed = None if bounds is None else pose_bounds(given._replace(settings=settings), bounds, robust)
        return (given, settings, posed), facts

    problem, settings, posed = A.ranks.checked(checked, A.device)
    if posed is not None:
        found = solve_bounded_together(posed, "raise" if throw else "return", A.height, A.ranks)
        solution = _told(problem, *found[:3])
        return solution._replace(info=found.told(solution.info, problem.b.ndim == 1))
    columns, of_rows = problem.b, None if problem.weights is None else problem.weights[None]
    columns = columns[None] if columns.ndim == 2 else columns[None, :, None]
    start = None if problem.x0 is None else problem.x0.reshape(1, problem.x0.shape[0], columns.shape[2])
    damps = None if problem.damp is None else problem.damp.reshape(1, -1)
    r, x, numbers = _solution(A, problem, settings, "raise" if throw else "return", of_rows, damps, columns, start)
    return _told(problem, r, x, numbers)


def _told(problem: Problem, r: Tensor, x: Tensor, numbers: Tensor) -> Solution:
    """What users get of (r, x, report)."""
    single = problem.b.ndim == 1
    info = info_of(Report.unpacked(numbers), wide=False, single=single)

    def rounded(t: Tensor, name: str) -> Tensor:
        t = t[0, :, 0] if single else t[0]
        return convert(t, problem.dtype, f"the derivative of {name}", problem.on_failure)

    return Solution(rounded(x, "x"), rounded(r, "the residual"), info)


def _solution(
    A: ShardedMatrix, problem: Problem, settings: Settings, how: str, weights, damp, b: Tensor, start
) -> tuple[Tensor, Tensor, Tensor]:
    """(r, x, report)"""
    if isinstance(problem.A, SparseMatrix):
        pattern = problem.A.pattern
        static = ShardedRows(*pattern.shape, settings, how, A.height, A.ranks)
        given = problem.A.values[None], weights, damp, b, None, None, start, None, pattern.indices, None
        found = Solve.apply(static, *given)
    else:
        of_rows, leaves = static_of(problem.A, *problem.shape, settings, how)
        of_all = over_ranks(of_rows, A.height, A.ranks)
        every = (leaf[None] for leaf in leaves)
        found = SolveOverRanks.apply(of_all, damp, weights, b, None, None, start, None, *every)
    return found[0], found[2], found[3]


def _refuse(A: ShardedMatrix, damp: Any, robust: Any, solver: Any, rank_deficient: Any, bounds: Any) -> None:
    """What a sharded matrix cannot do."""
    if robust is not None:
        raise ValueError(f"a sharded matrix allows no robust, got {robust!r}")
    if bounds is not None and isinstance(A.rows, LinearOperator):
        raise ValueError("a sharded matrix of operators allows no bounds")
    if solver is not None and not isinstance(solver, (Auto, Dense, CGLS)):
        raise TypeError(f"solver must be Auto(), Dense(), CGLS() or None for a sharded matrix, got {solver!r}")
    iterating = solver.cgls if isinstance(solver, Auto) else solver
    for name in ("preconditioner", "callback"):
        if getattr(iterating, name, None) is not None:
            raise ValueError(f"a sharded matrix allows no {name} of CGLS, got {getattr(iterating, name)!r}")
    if A.height < A.shape[1] and damp is None and bounds is None and rank_deficient == "raise":
        raise ValueError(
            "a sharded matrix with fewer rows than columns needs damp, or rank_deficient='minimum_norm', got shape "
            f"{A.shape}"
        )
