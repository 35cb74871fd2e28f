"""CGLS stopped after k steps, as a regularisation: iterates take in strong directions first, and noise last.

    g = A^H r - d^2 y,   z = M g,   gamma = <g, z>,   p = z + (gamma / gamma_before) p
    q = A p,   alpha = gamma / (|q|^2 + d^2 |p|^2),   y = y + alpha p,   r = r - alpha q

Björck, Elfving, Strakos, SIAM J. Matrix Anal. Appl. 19(3), 1998; on stopping early, Hansen, Rank-Deficient and Discrete
Ill-Posed Problems, SIAM 1998, chapter 6. Which iterates these are depends on M, unlike the solution: without a
preconditioner they are those of the unscaled unknowns, M = D^2 for y = D x.

Nothing is certified, so no product is spent on it: k with A and k with A^H in all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..result import OUT_OF_RANGE, STOPPED, Report, method_code
from ..sparse.base import dot, norm
from ..sparse.numerics import power_of_two
from .base import Factors
from .system import System


class Stopped(Factors):
    """The k-th iterate for every right-hand side."""

    def __init__(
        self,
        system: System,
        steps: int,
        apply: Callable[[Tensor], Tensor] | None,
        callback: Callable[[int, float], object] | None,
        accept: float,
    ):
        self.system, self.steps, self.callback, self.accept = system, steps, callback, accept
        squares = (system.scale / system.scale.amax(1, keepdim=True)).square()
        self.apply = apply or (lambda g: squares * g)

    def solve(
        self, b: Tensor, c: Tensor, start: Tensor | None = None, *, judged: bool = True
    ) -> tuple[Tensor, Tensor, Report]:
        """The k-th iterate for K (r, y) = (b, 0), and its residual, from `start` or from zero."""
        system, weighed = self.system, self.system.weigh(b)
        r = weighed.clone() if start is None else weighed - system.A.matmul(start)
        r, y, taken, left = self._run(r, torch.zeros_like(c) if start is None else start.clone())
        finite = torch.isfinite(system.A.largest(r)) & torch.isfinite(y.sum(1)) & torch.isfinite(left)
        if system.weights is not None:  # of a row of weight 0 nothing but a product tells the residual
            r = b - system.plain.matmul(y)
        nothing, unknown = torch.zeros_like(taken), torch.full_like(taken, torch.nan)
        report = Report(
            status=torch.where(finite, float(STOPPED), float(OUT_OF_RANGE)),
            method=nothing + method_code("cgls"),
            iterations=taken,
            optimality=unknown,
            residual_error=nothing + torch.inf,
            weighted_error=nothing + torch.inf,
            solution_error=nothing + torch.inf,
            condition=unknown,
            rank=nothing - 1,
            norm=unknown,
            tried=nothing,
            rounding=nothing + system.precision / 2,
        )
        return r, y, report

    def _run(self, r: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(r, y, steps, gamma) after `steps` of them, or fewer for a column of which nothing is left."""
        system = self.system
        g = system.A.adjoint(r) - system.damped(y)
        z = self.apply(g)
        unit = _unit(z.abs().amax(1))  # of an operator that is not scaled, squares might leave the range
        g, z = g / unit, z / unit
        gamma, p, taken, size = dot(g, z), z, torch.zeros_like(norm(r)), None
        for step in range(1, self.steps + 1):
            if not bool((gamma > 0).any()):
                break
            q = system.A.matmul(p)
            damped = None if system.damp is None else system.damp * p
            if size is None:
                size = _unit(system.A.largest(q))
                size = size if damped is None else torch.maximum(size, _unit(damped.abs().amax(1)))
            q = q / size
            curvature = system.A.dot(q, q)
            curvature = curvature if damped is None else curvature + norm(damped / size).square()
            moving = (gamma > 0) & (curvature > 0)
            alpha = torch.where(moving, gamma / torch.where(moving, curvature, 1.0), 0.0)[:, None] * (unit / size)
            y, r, taken = y + alpha / size * p, r - alpha * q, taken + moving
            if self.callback is not None:
                self.callback(step, float((unit[:, 0] * norm(g)).max()))
            if step == self.steps:
                break
            g = (system.A.adjoint(r) - system.damped(y)) / unit
            z = self.apply(g)
            new = dot(g, z)
            p = z + torch.where(moving, new / torch.where(moving, gamma, 1.0), 0.0)[:, None] * p
            gamma = torch.where(moving, new, gamma - gamma)  # which stays NaN
        return r, y, taken, gamma


def _unit(largest: Tensor) -> Tensor:
    """(P, 1, k): powers of two about as large as `largest` (P, k); 1 for zeros."""
    return power_of_two(torch.frexp(torch.where(largest > 0, largest, 1.0)).exponent)[:, None]
