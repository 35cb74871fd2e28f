"""What `lstsq` and `solve` are asked of a sharded matrix, checked on all ranks together, and answered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..linear.arguments import Problem, in_vectors, pose
from ..linear.bounds import Posed, pose_bounds
from ..linear.factorization import Factorization
from ..linear.matrix_free import static_of
from ..linear.posed import rounded, shaped
from ..result import Report, Solution, info_of
from ..solvers import CGLS, Auto, Dense, Direct
from ..sparse.matrix import SparseMatrix
from ..sparse.operator import LinearOperator
from ..torch_func.tracing import is_dtensor, refuse_recording
from .bounds import solve_bounded_together
from .dtensors import like, rows_of
from .matrix import ShardedMatrix
from .operator_rows import SolveOverRanks, over_ranks
from .ranks import Ranks
from .sparse_rows import solve_rows


class Together(NamedTuple):
    """A problem of all ranks, checked by all of them; `problem` is that of the rows that are here."""

    problem: Problem
    height: int
    ranks: Ranks
    bounded: Posed | None

    def run(self, on_failure: str, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(r, x, report) of K (r, x) = (b, c), as `linear.posed.run`."""
        problem = self.problem
        b, weights = problem.b, None if problem.weights is None else problem.weights[None]
        b = b[None] if b.ndim == 2 else b[None, :, None]
        start = None if problem.x0 is None else problem.x0.reshape(1, problem.x0.shape[0], b.shape[2])
        damp = None if problem.damp is None else problem.damp.reshape(1, -1)
        if isinstance(problem.A, SparseMatrix):
            values, (m, n), indices = problem.A.values[None], problem.A.pattern.shape, problem.A.pattern.indices
            slots = weights, damp, b, c, start, problem.kept
            of_ranks = self.height, self.ranks.name, problem.settings, on_failure
            return solve_rows(values, *slots, indices, m, n, *of_ranks)
        of_rows, leaves = static_of(problem.A, *problem.shape, problem.settings, on_failure)
        of_all = over_ranks(of_rows, self.height, self.ranks)
        every = (leaf[None] for leaf in leaves)
        found = SolveOverRanks.apply(of_all, damp, weights, b, None, c, start, None, *every)
        return found[0], found[2], found[3]


def pose_together(
    A: ShardedMatrix | Factorization, b, damp, weights, robust, solver, rank_deficient, refine, x0, rank_tolerance,
    bounds, *, throw: bool = True, of: str | None = None,
) -> Together:  # fmt: skip
    """As `linear.arguments.pose`, on all ranks together, before any work."""
    matrix: ShardedMatrix = A.A if isinstance(A, Factorization) else A  # type: ignore[assignment]

    def checked() -> tuple[Together, Mapping[str, object]]:
        given = b, damp, weights, robust, solver, rank_deficient, refine, x0, rank_tolerance, bounds
        return _checked(A, matrix, *given, throw=throw, of=of)

    # In a graph nothing is known but shapes: the solve checks numbers, and ranks check each other, when it runs.
    if isinstance(matrix.rows, LinearOperator):
        refuse_recording("a sharded matrix of operators")
    return checked()[0] if torch.compiler.is_compiling() else matrix.ranks.checked(checked, matrix.device)


def _checked(
    A, matrix: ShardedMatrix, b, damp, weights, robust, solver, rank_deficient, refine, x0, rank_tolerance, bounds,
    *, throw: bool, of: str | None,
) -> tuple[Together, Mapping[str, object]]:  # fmt: skip
    kept = None
    if isinstance(A, Factorization):
        others = {"weights": weights, "solver": solver, "rank_tolerance": rank_tolerance}
        A.require_alone(rank_deficient, damp=damp, robust=robust, bounds=bounds, **others)
        _, damp, weights, solver, rank_deficient, rank_tolerance, kept = A.given
    refuse(matrix, damp, robust, solver, rank_deficient, bounds)
    problem = pose(
        matrix.rows, b, damp, weights, None, solver, rank_deficient, refine, x0,
        rank_tolerance=rank_tolerance, throw=throw, bounds=bounds, of=of, part=True,
    )  # fmt: skip
    problem = problem._replace(kept=kept)
    bounded = None if bounds is None else pose_bounds(problem, bounds, robust)
    facts = {
        "the dtype of the solution": problem.dtype,
        "solver, refine, rank_deficient and rank_tolerance": problem.settings,
        "the columns of b": tuple(b.shape[1:]),
        "the shape of damp": None if problem.damp is None else tuple(problem.damp.shape),
        "whether there are weights": weights is not None,
        "whether there is x0": x0 is not None,
        "throw": throw,
    }
    return Together(problem, matrix.height, matrix.ranks, bounded), facts


def solve_sharded(
    A: ShardedMatrix | Factorization, b, damp, weights, robust, solver, rank_deficient, refine, x0, rank_tolerance,
    bounds, *, throw: bool,
) -> Solution:  # fmt: skip
    """`solve` for a sharded matrix."""
    if is_dtensor(b) or is_dtensor(weights):
        matrix: ShardedMatrix = A.A if isinstance(A, Factorization) else A  # type: ignore[assignment]
        ranks = matrix.ranks
        here = ranks.checked(
            lambda: ((rows_of(b, "b", ranks), rows_of(weights, "weights", ranks)), {"DTensors": is_dtensor(b)}),
            matrix.device,
        )
        others = robust, solver, rank_deficient, refine, x0, rank_tolerance, bounds
        solution = solve_sharded(A, here[0], damp, here[1], *others, throw=throw)
        return solution._replace(residual=like(b, solution.residual))
    rows = None if isinstance(A, Factorization) else A.rows
    if isinstance(A, ShardedMatrix) and isinstance(rows, LinearOperator) and rows.trees is not None:
        of_x, of_b = rows.trees
        of_trees = rows, b, damp, weights, x0, bounds
        given = A.ranks.checked(lambda: (in_vectors(*of_trees), {}), A.device)
        rows, b, damp, weights, x0, bounds = given
        of_vectors = ShardedMatrix(rows, A.ranks, A.height)
        others = robust, solver, rank_deficient, refine, x0, rank_tolerance, bounds
        x, residual, info = solve_sharded(of_vectors, b, damp, weights, *others, throw=throw)
        return Solution(of_x.tree(x), of_b.tree(residual), info)
    options = b, damp, weights, robust, solver, rank_deficient, refine, x0, rank_tolerance, bounds
    together, how = pose_together(A, *options, throw=throw), "raise" if throw else "return"
    problem, found, single = together.problem, None, together.problem.b.ndim == 1
    if together.bounded is not None:
        found = solve_bounded_together(together.bounded, how, together.height, together.ranks)
    r, x, numbers = together.run(how) if found is None else found[:3]
    info = info_of(Report.unpacked(numbers), wide=False, single=single)
    x, r = (rounded(shaped(t, problem), problem, name) for t, name in ((x, "x"), (r, "the residual")))
    return Solution(x, r, info if found is None else found.told(info, single))


def refuse(A: ShardedMatrix, damp: Any, robust: Any, solver: Any, rank_deficient: Any, bounds: Any) -> None:
    """What a sharded matrix cannot do."""
    if robust is not None:
        raise ValueError(f"a sharded matrix allows no robust, got {robust!r}")
    if bounds is not None and isinstance(A.rows, LinearOperator):
        raise ValueError("a sharded matrix of operators allows no bounds")
    if solver is not None and not isinstance(solver, (Auto, Dense, Direct, CGLS)):
        of = "Auto(), Dense(), Direct(), CGLS() or None for a sharded matrix"
        raise TypeError(f"solver must be {of}, got {solver!r}")
    iterating = solver.cgls if isinstance(solver, Auto) else solver
    for name in ("preconditioner", "callback"):
        if getattr(iterating, name, None) is not None:
            raise ValueError(f"a sharded matrix allows no {name} of CGLS, got {getattr(iterating, name)!r}")
    if A.height < A.shape[1] and damp is None and bounds is None and rank_deficient == "raise":
        raise ValueError(
            "a sharded matrix with fewer rows than columns needs damp, or rank_deficient='minimum_norm', got shape "
            f"{A.shape}"
        )
