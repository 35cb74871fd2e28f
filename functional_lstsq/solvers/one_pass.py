"""Conjugate gradients for one column with one pass over A an iteration, where the condition number is moderate.

What is updated is the gradient g and not the residual r, so that rounding moves g away from the true gradient by
eps cond^2 of what that was when it was last computed. So it is computed anew before it has shrunk so far that this
matters, and in the end (van der Vorst and Ye, SIAM J. Sci. Comput. 22(3), 2000).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..sparse.base import dot
from ..torch_func.cores import settle
from .conjugate_gradients import Normal, Run
from .watching import is_watched, tell

CONDITION = 3000.0  # largest condition number: of a gradient of 1, eps cond^2 = 2e-9 is wrong
_WRONG = 1e-3  # of a gradient, after which it is computed anew
_EPS = 2.0**-52
_STRIDE = 4  # iterations after which an iterate is shown


class Goal(NamedTuple):
    """A run ends once sqrt(gamma) <= max(limit |weight (start + y)|, slope |r| + floor).

    Attributes:
        limit, slope, floor: numbers.
        weight, start: (1, n, 1), start None for zero.
    """

    limit: float
    slope: float
    floor: float
    weight: Tensor
    start: Tensor | None

    def far(self, y: Tensor) -> float:
        """limit |weight (start + y)|"""
        whole = y if self.start is None else self.start + y
        return self.limit * float(torch.linalg.vector_norm(self.weight * whole))


def iterate(
    system: Normal,
    b: Tensor | None,
    c: Tensor,
    inverse: Tensor,
    goal: Goal,
    condition: float,
    limit: int,
    *,
    callback: Callable[[int, float], object] | None,
    show: Callable[[Tensor, Tensor], object] | None,
) -> Run:
    """At most `limit` iterations with the preconditioner `inverse` (1, n, 1), up to a condition number of `CONDITION`.

    Args:
        b: None for zero.
        callback: as of `cgls`.
        show: called with (start + y, the number of the column) every few iterations.
    """
    b = None if b is None or not bool(b.any()) else b
    y, A, shift = torch.zeros_like(c, memory_format=torch.contiguous_format), system.A, bool(c.any())
    steps = A.normal_iteration(inverse, system.d2, goal.weight, goal.start, y)
    r, count, before, one_by_one = b, 0, math.inf, callback is not None or is_watched()
    portion = 1 if one_by_one else limit if show is None else _STRIDE
    share = (_EPS * condition**2 / _WRONG) ** 2  # of gamma, down to which it is right
    column = torch.zeros(1, dtype=torch.int64, device=c.device)
    while True:
        g = -c if r is None else A.adjoint(r)
        if system.d2 is not None and count:
            g.sub_(system.d2 * y)
        if shift and r is not None:
            g.sub_(c)
        gamma, slope = max(float(dot(g, inverse * g)), 0.0), 0.0 if r is None else goal.slope * float(A.norm(r))
        floor, far = slope + goal.floor, goal.far(y)
        if gamma <= max(far, floor) ** 2 or count >= limit or not gamma < before:
            break
        before = gamma / 4  # what is left after a part that does not take away as much is rounding
        steps.begin(g, gamma)
        done, goes_on = 1, True
        while goes_on and done and count < limit:
            settle()
            done, goes_on = steps.advance(goal.limit, floor, before * share, min(portion, limit - count))
            count += done
            if show is not None:
                show(y if goal.start is None else goal.start + y, column)
            if callback is not None and done:
                callback(count, math.sqrt(steps.gamma))
            if one_by_one and done:
                tell(math.sqrt(steps.gamma))
        r, gamma = A.matmul(y), steps.gamma
        r = r.neg_() if b is None else torch.sub(b, r, out=r)
        if gamma <= goal.far(y) ** 2:  # and not by the floor, of which less may be left by now
            break
    if r is None:
        r = torch.zeros((1, A.m, 1), dtype=c.dtype, device=c.device)
    return Run(r, y, *(torch.full((1, 1), number, dtype=c.real.dtype, device=c.device) for number in (gamma, count)))
