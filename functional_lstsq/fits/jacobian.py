"""The Jacobian of a residual: formed whole, on a pattern by few directional derivatives, or by a function."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..sparse.coloring import jacobian_values
from ..sparse.matrix import SparseMatrix
from ..sparse.numerics import noise
from ..sparse.pattern import SparsePattern
from ..torch_func.closures import close, plain
from ..torch_func.forward_mode import jacobian as jacobian_of
from ..torch_func.forward_mode import jvp

_ENTRIES = 10**7  # of a Jacobian that is formed whole
_SAME = 1e-4  # relative difference between a given Jacobian and the residual's that may be rounding in single precision


@lru_cache(maxsize=8)
def _full(m: int, n: int, device: torch.device) -> SparsePattern:
    entries = torch.arange(m * n, device=device)
    return SparsePattern(torch.stack([entries // n, entries % n]), (m, n))


def slopes_of(
    residual: Callable[..., Tensor], jacobian: Any, rebuild: Callable, m: int, n: int, x0: Tensor, given: list[Tensor]
) -> tuple[SparsePattern, Callable[..., Tensor]]:
    """(pattern, (x, *tensors) -> values on it), tried at x0."""
    if jacobian is None:
        if m * n > _ENTRIES:
            raise ValueError(
                f"jacobian=None forms all entries of the Jacobian, {m} x {n}: pass its SparsePattern, or a function "
                "that gives a SparseMatrix"
            )
        pattern = _full(m, n, x0.device)
        return pattern, lambda x, *t: jacobian_of(lambda x: residual(x, *t), x).flatten()
    point = plain(x0).to(torch.float64)
    plainly = [plain(tensor) for tensor in given]
    if isinstance(jacobian, SparsePattern):
        pattern = jacobian

        def values(x: Tensor, *t: Tensor) -> Tensor:
            return jacobian_values(lambda x: residual(x, *t), x, pattern)

    else:
        closed, J = close(lambda x, *t: jacobian(x, *rebuild(t)), "jacobian", "args", point, *plainly)
        if not isinstance(J, SparseMatrix):
            raise TypeError(f"jacobian must give a SparseMatrix, got {type(J).__name__}")
        pattern = J.pattern

        def values(x: Tensor, *t: Tensor) -> Tensor:
            J = closed(x, *t)
            if J.pattern is not pattern and J.pattern != pattern:
                raise ValueError("jacobian must give a SparseMatrix on the same pattern, always")
            return J.values.to(torch.float64)

    if pattern.shape != (m, n):
        raise ValueError(f"jacobian must have shape ({m}, {n}), got {tuple(pattern.shape)}")
    if pattern.device != x0.device:
        raise ValueError(f"jacobian is on {pattern.device}, x0 is on {x0.device}")
    v = noise(point)
    got = SparseMatrix(values(point, *plainly), pattern) @ v
    want: Any = jvp(lambda x: residual(x, *plainly), (point,), (v,))[1]
    off = float((got - want).norm() / torch.maximum(got.norm(), want.norm()).clamp_min(1e-300))
    if not off <= _SAME:
        raise ValueError(
            f"jacobian must be that of residual, got a relative difference of {off:.1e} between their products with a "
            "random vector at x0; compare it with torch.func.jacfwd"
        )
    return pattern, values
