"""Solutions of posed problems: the augmented system of A, or of A^H where A is wide, and what users get of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..result import Report, Solution, info_of
from ..sparse.operator import LinearOperator
from ..sparse.precision import convert
from ..sparse.products import sample
from .arguments import Problem
from .augmented import solve_augmented
from .matrix_free import solve_matrix_free
from .refusals import product_in_range, require_in_range


def run(problem: Problem, on_failure: str, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(r, x, report) of K (r, x) = (b, c); of A^H in A's place and (0, b) where A is wide: there r is the solution."""
    A, (m, n), b, damp, weights, settings, _, x0, _, _, kept = problem
    columns = b[None] if b.ndim == 2 else b.reshape(1, b.shape[0], 1)
    damp = None if damp is None else damp.reshape(1, -1)
    start = None if x0 is None or problem.wide else x0[None] if x0.ndim == 2 else x0[None, :, None]
    if isinstance(A, LinearOperator):
        of_rows = None if weights is None else weights[None]
        if problem.wide and weights is not None:
            root, of_rows = weights.sqrt(), None
            A, columns = A.weighted(root), root.to(columns.dtype)[None, :, None] * columns
        return solve_matrix_free(A, m, n, problem.wide, damp, of_rows, columns, start, settings, on_failure)
    pattern, values = A.pattern, A.values
    if not problem.wide:
        indices, of_rows = pattern.indices, None if weights is None else weights[None]
        return solve_augmented(
            values[None], damp, columns, c, indices, m, n, settings, on_failure, start, of_rows, kept
        )
    if weights is not None and damp is not None:
        # x = A^H s and A x + d^2 W^-1 s = b: each row has a damping of its own, infinite where the weight is zero.
        # What neither a weight nor a damping determines, 0 / 0, is marked by the other infinity.
        unweighted = torch.where(damp > 0, torch.inf, -torch.inf).to(damp.dtype)
        # Of no derivative by that weight torch.where makes zero in forward mode: this adds zero, whose tangent is none.
        unweighted = unweighted + weights * 1e200 * 1e200
        damp = torch.where(weights > 0, damp * weights.rsqrt(), unweighted)
    elif weights is not None:
        root = weights.sqrt().to(values.dtype)[None, :, None]
        ones = values.new_ones((1, pattern.shape[1], 1))
        of_entries = sample(root, ones, pattern.indices, *pattern.shape)[0]  # root[i_k]
        values = product_in_range("A", values, of_entries)
        columns = product_in_range("b", columns, root)
    if values.is_complex():  # conj_physical has no rule for vmap
        values = torch.complex(values.real, -values.imag)
    return solve_augmented(values[None], damp, None, columns, pattern.T.indices, n, m, settings, on_failure, kept=kept)


def finished(problem: Problem, r: Tensor, x: Tensor, numbers: Tensor, *, throw: bool) -> Solution:
    """What users see of what `run` gave."""
    info = info_of(Report.unpacked(numbers), wide=problem.wide, single=problem.b.ndim == 1)
    solution = shaped(r if problem.wide else x, problem)
    residual = problem.b - problem.A.matmul(solution) if problem.wide else shaped(r, problem)
    if throw and problem.wide:
        require_in_range("the residual b - A x", residual)
    return Solution(rounded(solution, problem, "x"), rounded(residual, problem, "the residual"), info)


def rounded(result: Tensor, problem: Problem, name: str) -> Tensor:
    """A result in the user's precision, which its derivatives are judged by."""
    return convert(result, problem.dtype, f"the derivative of {name}", problem.on_failure)


def shaped(columns: Tensor, problem: Problem) -> Tensor:
    """(1, rows, k) -> (rows, k), or (rows,) where b has one dimension."""
    return columns.flatten() if problem.b.ndim == 1 else columns.squeeze(0)
