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
    """A solution of the scaled system; absolute errors of r and x, and what they are measured against, all (P, k)."""

    r: Tensor
    y: Tensor
    errors: tuple[Tensor, Tensor]
    sizes: tuple[Tensor, Tensor]
    iterations: Tensor


def refine(
    system: System,
    b: Tensor,
    c: Tensor,
    correct: Callable[[Tensor, Tensor], Run],
    *,
    largest: Tensor,
    target: float,
    probe: bool,
    limit: int = 20,
) -> Refined:
    """Solve K (r, y) = (b, c) by corrections until they reach `target` or stop shrinking, each column on its own.

    Args:
        correct: an approximate solution of K d = f, right to some digits.
        largest: largest singular value (P, 1).
        target: size of a correction, relative to what it corrects, that is small enough.
        probe: one solve more, with the rounding errors of the residuals as right-hand side, is added to the estimate.
            Without it the estimate is the size of the last correction alone.
    """
    # A solution is measured against itself, or against `accept` times the largest one that data of this size have:
    # noise around a solution that is zero (b orthogonal to the range, a consistent system's residual) is no error.
    reach = norm(b) + norm(c) / largest
    floors = reach, reach / largest * (1 / system.scale).square().mean(1).sqrt()

    def measure(r: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        sizes = norm(r), norm(y / system.scale)
        return torch.maximum(sizes[0], system.accept * floors[0]), torch.maximum(sizes[1], system.accept * floors[1])

    r, y, gamma, iterations = correct(b, c)
    errors = (torch.full_like(gamma, torch.inf),) * 2
    previous, active = errors[0], torch.ones_like(gamma, dtype=torch.bool)
    for _ in range(limit):
        moved = correct(*system.residuals(b, c, r, y))
        iterations = iterations + torch.where(active, moved.iterations, 0)
        moves, sizes = (norm(moved.r), norm(moved.y / system.scale)), measure(r, y)
        relative = torch.maximum(_ratio(moves[0], sizes[0]), _ratio(moves[1], sizes[1]))
        better = active & (relative < previous)
        r = torch.where(better[:, None], r + moved.r, r)
        y = torch.where(better[:, None], y + moved.y, y)
        errors = (torch.where(active, moves[0], errors[0]), torch.where(active, moves[1], errors[1]))
        active = better & (relative > target) & (relative < previous / 4)
        previous = torch.minimum(relative, previous)
        if not bool(active.any()):
            break
    if probe:
        blurred = correct(*system.rounding(b, c, r, y))
        errors = errors[0] + norm(blurred.r), errors[1] + norm(blurred.y / system.scale)
    return Refined(r, y, errors, measure(r, y), iterations)


def report(
    system: System,
    b: Tensor,
    c: Tensor,
    refined: Refined,
    *,
    method: int | Tensor,
    largest: Tensor,
    smallest: Tensor,
    rank: int | Tensor,
    limited: Tensor | None = None,
) -> Report:
    """Judge a solution; `largest` and `smallest` are singular values (P, 1), `limited` marks columns that ran out."""
    r, y, errors, sizes, iterations = refined
    accepted = (errors[0] <= system.accept * sizes[0]) & (errors[1] <= system.accept * sizes[1])
    failed = INACCURATE if limited is None else torch.where(limited, ITERATION_LIMIT, INACCURATE)
    ones = torch.ones_like(iterations)
    slack = EPS * (norm(b) + largest * norm(y))
    gradient = norm(system.gradient(r, y, c))
    return Report(
        status=torch.where(accepted, CONVERGED, failed) * ones,
        method=method * ones,
        iterations=iterations,
        optimality=_ratio(gradient, largest * torch.maximum(norm(r), slack) + norm(c)),
        residual_error=_ratio(errors[0], norm(r)) + system.precision / 2,
        solution_error=_ratio(errors[1], norm(y / system.scale)) + system.precision / 2,
        condition=largest / smallest * ones,
        rank=rank * ones,
    )


def _ratio(size: Tensor, whole: Tensor) -> Tensor:
    return torch.where(size > 0, size / whole, 0.0)
