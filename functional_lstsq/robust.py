"""Robust linear fits, `robust=` of `lstsq` and `solve`: iteratively reweighted least squares, then Newton's steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fits import FitReport
from .holder import by_name, name_of
from .implicit import Minimum
from .losses import loss_of
from .matrix import SparseMatrix
from .objective import Objective
from .products import multiply, sample

_ITERATIONS = 200


def fit_robustly(problem: Any, robust: Any, start: Tensor, throw: bool) -> tuple[Tensor, FitReport]:
    """(x (n, k), report of shape (k,)) of a posed problem, from `start` (n, k).

    Every column has weights of its own, so that k columns are k problems.
    """
    pattern, (m, n) = problem.A.pattern, problem.shape
    indices, settings = pattern.indices, by_name(problem.settings)
    loss, threshold = loss_of(robust, problem.b.device)
    b = problem.b.reshape(m, -1).T
    values = problem.A.values
    if problem.weights is not None:
        root = problem.weights.sqrt()
        values = values * sample(root[None, :, None], values.new_ones((1, n, 1)), indices, m, n)[0]
        b = root * b

    def residual(x: Tensor, values: Tensor, b: Tensor) -> Tensor:
        return b - multiply(values[None], x[None, :, None], indices, m, n, False)[0, :, 0]

    objective = Objective(
        residual=residual,
        jacobian=lambda x, values, b: -values,
        pattern=pattern,
        loss=loss,
        settings=name_of(settings.solver, minimum_norm=False, precision=settings.precision, exact=False),
        precision=settings.precision,
        max_iterations=_ITERATIONS,
        on_failure="raise" if throw else "nan",
        linear=True,
        name="the robust fit",
        start="b - A x must be finite at x0",
        point="x0",
    )
    damp = torch.zeros_like(threshold) if problem.damp is None else problem.damp
    k = b.shape[0]
    leaves = (t.expand(k, *t.shape) for t in (threshold, damp, values))
    x, report, _ = Minimum.apply(objective, start.detach().T, *leaves, b)
    return x.T, FitReport(*report.unbind(1))


def check_robust(A: Any, b: Any, m: int, n: int, rank_deficient: str, refine: str) -> None:
    """Refuse what a robust fit cannot do, before any work."""
    if torch.compiler.is_compiling():
        raise TypeError("torch.compile cannot take robust=; compile what makes the arguments")
    if not isinstance(A, SparseMatrix):
        raise TypeError(f"robust needs the entries of A, got {type(A).__name__}")
    if A.dtype.is_complex or b.is_complex():
        raise TypeError(f"robust needs real A and b, got {A.dtype} and {b.dtype}")
    if m < n:
        raise ValueError(f"robust needs A with at least as many rows as columns, got shape ({m}, {n})")
    if rank_deficient != "raise" or refine != "auto":
        got = f"refine={refine!r}" if refine != "auto" else f"rank_deficient={rank_deficient!r}"
        raise ValueError(f"robust allows no {got}")
