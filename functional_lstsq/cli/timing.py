"""What is timed, and what is not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import Solution, SparseMatrix, SparsePattern, solve


def gradient(A: SparseMatrix, b: Tensor, solver: Any) -> None:
    """Of the sum of the solution, by A and by b; the solution with it."""
    torch.func.grad(lambda A, b: solve(A, b, solver=solver).x.sum().real, argnums=(0, 1))(A, b)


def solved(A: Any, b: Tensor, settings: dict[str, Any], *, gradient: bool) -> tuple[Solution, Any]:
    """(what `solve` gives, the gradient of the sum of x by A if that is asked for)"""
    if not gradient:
        return solve(A, b, **settings), None

    def sum_of_x(A: Any) -> tuple[Tensor, Solution]:
        solution = solve(A, b, **settings)
        return solution.x.sum().real, solution

    by_A, solution = torch.func.grad(sum_of_x, has_aux=True)(A)
    return solution, by_A


def warm_up(solver: Any, *, derivatives: bool = True, robust: Any = None) -> None:
    """Have the process load what it loads at its first solve, or gradient, which takes up to seconds."""
    pattern = SparsePattern(torch.tensor([[0, 1], [0, 0]]), (2, 1))
    A, b = SparseMatrix(torch.ones(2, dtype=torch.float64), pattern), torch.ones(2, dtype=torch.float64)
    if derivatives:
        gradient(A, b, solver)
    else:
        solve(A, b, solver=solver, robust=robust)
