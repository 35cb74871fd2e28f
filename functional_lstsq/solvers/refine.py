"""Iterative refinement on the augmented system, and the estimate of the forward error that decides acceptance.

Refinement in fixed precision of both r and x is what makes an answer that rests on a Cholesky factor of A^H A as
accurate as one from a backward stable method (Björck, BIT 7, 1967; Numerical Methods for Least Squares Problems, SIAM
1996, sections 2.9 and 6.6). What the last correction still moves is an estimate of the error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..result import CONVERGED, INACCURATE, ITERATION_LIMIT, Report
from .system import EPS, Run, System, norm


class Refined(NamedTuple):
    """A solution of the scaled system, the absolute errors of r and x (P, k) and the iterations spent."""

    r: Tensor
    y: Tensor
    residual_error: Tensor
    solution_error: Tensor
    iterations: Tensor


def refine(
    system: System,
    b: Tensor,
    c: Tensor,
    correct: Callable[[Tensor, Tensor], Run],
    *,
    target: float,
    probe: bool,
    limit: int = 20,
) -> Refined:
    """Solve K (r, y) = (b, c) by corrections until they reach `target` or stop shrinking, each column on its own.

    Args:
        correct: an approximate solution of K d = f, right to some digits.
        target: size of a correction, relative to what it corrects, that is small enough.
        probe: one solve more, with the rounding errors of the residuals as right-hand side, is added to the estimate.
            Without it the estimate is the size of the last correction alone.
    """
    r, y, gamma, iterations = correct(b, c)
    errors = [torch.full_like(gamma, torch.inf)] * 2
    previous = torch.full_like(gamma, torch.inf)
    active = torch.ones_like(gamma, dtype=torch.bool)
    for _ in range(limit):
        moved = correct(*system.residuals(b, c, r, y))
        iterations = iterations + torch.where(active, moved.iterations, 0)
        sizes = norm(moved.r), norm(moved.y / system.scale)
        wholes = norm(r), norm(y / system.scale)
        relative = torch.maximum(*(_ratio(size, whole) for size, whole in zip(sizes, wholes, strict=True)))
        better = active & (relative < previous)
        r = torch.where(better[:, None], r + moved.r, r)
        y = torch.where(better[:, None], y + moved.y, y)
        errors = [torch.where(active, size, old) for size, old in zip(sizes, errors, strict=True)]
        active = better & (relative > target) & (relative < previous / 4)
        previous = torch.minimum(relative, previous)
        if not bool(active.any()):
            break
    if probe:
        blurred = correct(*system.rounding(b, c, r, y))
        errors = [errors[0] + norm(blurred.r), errors[1] + norm(blurred.y / system.scale)]
    return Refined(r, y, *errors, iterations)


def report(
    system: System,
    b: Tensor,
    c: Tensor,
    refined: Refined,
    *,
    method: int,
    largest: Tensor,
    smallest: Tensor,
    rank: Tensor,
    limited: Tensor | None = None,
) -> Report:
    """Judge a solution; `largest` and `smallest` are singular values (P, 1), `limited` marks columns that ran out.

    An error is small relative to the solution, or to `accept` times the largest solution that data of this size
    have. Without the second a right-hand side orthogonal to the range, whose solution is zero, could never be solved.
    """
    r, y, error_r, error_x, iterations = refined
    x, g = y / system.scale, system.gradient(r, y, c)
    reach_r = norm(b) + norm(c) / largest
    reach_x = reach_r / largest * (1 / system.scale).square().mean(1).sqrt()
    relative = _ratio(error_r, norm(r)), _ratio(error_x, norm(x))
    accepted = torch.ones_like(iterations, dtype=torch.bool)
    for error, size, reach in ((error_r, norm(r), reach_r), (error_x, norm(x), reach_x)):
        accepted &= error <= system.accept * torch.maximum(size, system.accept * reach)
    failed = INACCURATE if limited is None else torch.where(limited, ITERATION_LIMIT, INACCURATE)
    ones = torch.ones_like(iterations)
    slack = EPS * (norm(b) + largest * norm(y))
    return Report(
        status=torch.where(accepted, CONVERGED, failed) * ones,
        method=method * ones,
        iterations=iterations,
        optimality=_ratio(norm(g), largest * torch.maximum(norm(r), slack) + norm(c)),
        residual_error=relative[0] + system.precision / 2,
        solution_error=relative[1] + system.precision / 2,
        condition=largest / smallest * ones,
        rank=rank * ones,
    )


def _ratio(size: Tensor, whole: Tensor) -> Tensor:
    return torch.where(size > 0, size / whole, 0.0)
