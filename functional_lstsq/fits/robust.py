"""Robust linear fits, `robust=` of `lstsq` and `solve`: iteratively reweighted least squares, then Newton's steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..solvers.system import EPS
from ..sparse.products import multiply
from .losses import loss_of
from .objective import Objective
from .report import FitReport, scale_of
from .scale import minimum_with_scale

_ITERATIONS = 200


def fit_robustly(problem: Any, robust: Any, start: Tensor, throw: bool) -> tuple[Tensor, FitReport, Tensor]:
    """(x (n, k), report of shape (k,), scales (k,)) of a posed problem, from `start` (n, k).

    Every column has weights of its own, so that k columns are k problems.
    """
    pattern, (m, n) = problem.A.pattern, problem.shape
    indices, settings = pattern.indices, problem.settings
    loss, threshold = loss_of(robust, problem.b.device)
    b = problem.b[None] if problem.b.ndim == 1 else problem.b.T
    weights = torch.ones_like(b[0]) if problem.weights is None else problem.weights

    def residual(x: Tensor, values: Tensor, b: Tensor) -> Tensor:
        return b - multiply(values[None], x[None, :, None], indices, m, n)[0, :, 0]

    def pull(x: Tensor, values: Tensor, b: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        def pulled(y: Tensor) -> Tensor:
            return -multiply(values[None], y[None, :, None], indices, m, n, adjoint=True, exact=True)[0, :, 0]

        return residual(x, values, b), pulled

    def jacobian(x: Tensor, values: Tensor, b: Tensor) -> Tensor:
        return -values

    objective = Objective(
        residual=residual,
        pull=pull,
        jacobian=jacobian,
        pattern=pattern,
        loss=loss,
        settings=replace(settings, exact=False, extended=False),
        precision=settings.precision,
        arithmetic=EPS,
        max_iterations=_ITERATIONS,
        on_failure="raise" if throw else "nan",
        linear=True,
        name="the robust fit",
        start="b - A x must be finite at x0",
        point="x0",
    )
    damp = torch.zeros_like(threshold) if problem.damp is None else problem.damp
    k = b.shape[0]
    threshold, damp, weights, values = (t.expand(k, *t.shape) for t in (threshold, damp, weights, problem.A.values))
    leaves = (threshold, damp, weights, values, b)
    x, report, _, _, threshold = minimum_with_scale(objective, robust.scale, start.detach().T, *leaves)
    return x.T, FitReport.unpacked(report), scale_of(robust, threshold)
