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


class Errors(NamedTuple):
    """Sizes of something in r, in y = D x, and (in units of the smallest scale) in x; each (P, k)."""

    r: Tensor
    y: Tensor
    x: Tensor


class Refined(NamedTuple):
    """A solution of the scaled system, the estimate of its absolute errors, and the iterations spent (P, k)."""

    r: Tensor
    y: Tensor
    errors: Errors
    iterations: Tensor


class Measure:
    """Relative errors of solutions to one pair of right-hand sides.

    A solution is measured against itself. Where it is zero but for rounding (b orthogonal to the range, the residual of
    a consistent system, a cotangent without effect) noise around it is no error, so below `accept` times the largest
    solution that data of this size have, it is measured against that: y then stands for x, whose columns may have any
    scale.
    """

    def __init__(self, system: System, b: Tensor, c: Tensor, largest: Tensor):
        self.weight = system.weight
        self.least_r = system.accept * (norm(b) + norm(c) / largest)
        self.least_y = self.least_r / largest

    def sizes(self, r: Tensor, y: Tensor) -> Errors:
        """Of a solution or of a correction to it."""
        return Errors(norm(r), norm(y), norm(self.weight * y))

    def relative(self, errors: Errors, whole: Errors) -> Tensor:
        """The larger of the relative errors of r and x."""
        of_r = _ratio(errors.r, torch.maximum(whole.r, self.least_r))
        of_zero = torch.where(whole.y > self.least_y, torch.inf, _ratio(errors.y, self.least_y))
        return torch.maximum(of_r, torch.minimum(_ratio(errors.x, whole.x), of_zero))


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
        probe: the larger of two solves more, with samples of the rounding errors of the residuals as right-hand
            sides, is added to the estimate. Without it the estimate is the size of the last correction alone.
    """
    measure = Measure(system, b, c, largest)
    r, y, gamma, iterations = correct(b, c)
    previous = torch.full_like(gamma, torch.inf)
    errors, active = Errors(previous, previous, previous), torch.ones_like(gamma, dtype=torch.bool)
    for _ in range(limit):
        moved = correct(*system.residuals(b, c, r, y))
        iterations = iterations + torch.where(active, moved.iterations, 0)
        moves = measure.sizes(moved.r, moved.y)
        relative = measure.relative(moves, measure.sizes(r, y))
        better = active & (relative < previous)
        r = torch.where(better[:, None], r + moved.r, r)
        y = torch.where(better[:, None], y + moved.y, y)
        errors = Errors(*(torch.where(active, move, old) for move, old in zip(moves, errors, strict=True)))
        active = better & (relative > target) & (relative < previous / 4)
        previous = torch.minimum(relative, previous)
        if not bool(active.any()):
            break
    if probe:
        blurred = correct(*system.rounding(b, c, r, y))
        samples = (size.unflatten(1, (2, -1)).amax(1) for size in measure.sizes(blurred.r, blurred.y))
        errors = Errors(*map(torch.add, errors, samples))
    return Refined(r, y, errors, iterations)


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
    given: Tensor | None = None,
) -> Report:
    """Judge a solution; `largest` and `smallest` are singular values (P, 1), `limited` marks columns that ran out.

    `given` is the c that was asked about, where c is a projection of it.
    """
    r, y, errors, iterations = refined
    measure = Measure(system, b, c if given is None else given, largest)
    whole = measure.sizes(r, y)
    accepted = measure.relative(errors, whole) <= system.accept
    failed = INACCURATE if limited is None else torch.where(limited, ITERATION_LIMIT, INACCURATE)
    ones = torch.ones_like(iterations)
    slack = EPS * (norm(b) + largest * whole.y)
    gradient = norm(system.gradient(r, y, c))

    def claim(error: Tensor, size: Tensor) -> Tensor:
        relative = torch.where(accepted & (size == 0), 0.0, _ratio(error, size))  # a zero that is one
        return relative + system.precision / 2

    return Report(
        status=torch.where(accepted, CONVERGED, failed) * ones,
        method=method * ones,
        iterations=iterations,
        optimality=_ratio(gradient, largest * torch.maximum(whole.r, slack) + norm(c)),
        residual_error=claim(errors.r, whole.r),
        solution_error=claim(errors.x, whole.x),
        condition=largest / smallest * ones,
        rank=rank * ones,
    )


def _ratio(size: Tensor, whole: Tensor) -> Tensor:
    return torch.where(size == 0, 0.0, size / whole)  # NaN stays NaN, which nothing accepts
