"""The primitives `Minimum` and `SolveCurvature`: a minimum as a function of what it is the minimum of.

At a minimum g(x, leaves) = 0, which defines x(leaves) where the curvature H = dg/dx is positive definite:

    Minimum         x:  g(x, leaves) = 0       JVP  dx = -H^-1 (dg/dleaves dleaves)
                                               VJP  leaves_bar = -(dg/dleaves)^T H^-1 x_bar
    SolveCurvature  H(x, leaves) s = c         JVP  ds = H^-1 (dc - dH s)
                                               VJP  c_bar = H^-1 s_bar,  (x, leaves)_bar = -(d(H s))^T c_bar

(Griewank and Walther, Evaluating Derivatives, SIAM 2008, chapter 15.) The rules call these primitives and torch.func,
so that derivatives of every order and mix follow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .curvature import solve_curvature
from .descent import minimise
from .fits import FitReport
from .objective import each
from .transforms import Primitive, join_columns, join_matrices, of_some, split_columns, split_matrices


class Minimum(Primitive):
    """(objective, x0 (P, n), *leaves (P, ...)) -> x (P, n), report (P, fields), token"""

    constants = (1, 2)

    @classmethod
    def forward(cls, objective, x0, *leaves):
        return minimise(objective, x0, leaves)

    @classmethod
    def vjp_rule(cls, objective, inputs, outputs, cotangents, needed):
        _, *leaves = inputs
        x, report, token = outputs
        x_bar = cotangents[0]
        bars: list[Tensor | None] = [None] * len(leaves)
        which = [i for i in range(len(leaves)) if needed[1 + i]]
        if x_bar is None or not which:
            return None, *bars
        s = SolveCurvature.apply(objective, x_bar[:, :, None], x, token, *leaves)[:, :, 0]
        moved, chosen = of_some(which, leaves, lambda *every: each(objective.gradient, x, *every))
        pull: Any = torch.func.vjp(moved, *chosen)[1]
        for i, bar in zip(which, pull(-s), strict=True):
            bars[i] = _where_found(bar, report)
        return None, *bars

    @classmethod
    def jvp_rule(cls, objective, inputs, outputs, tangents):
        _, *leaves = inputs
        x, report, token = outputs
        dots = tangents[1:]
        which = [i for i, dot in enumerate(dots) if dot is not None]
        if not which:
            return torch.zeros_like(x), None, None
        moved, chosen = of_some(which, leaves, lambda *every: each(objective.gradient, x, *every))
        g_dot: Any = torch.func.jvp(moved, chosen, tuple(dots[i] for i in which))[1]
        x_dot = SolveCurvature.apply(objective, -g_dot[:, :, None], x, token, *leaves)[:, :, 0]
        return _where_found(x_dot, report), None, None

    @classmethod
    def vmap(cls, info, in_dims, objective, *tensors):
        size = info.batch_size
        joined = (join_matrices(tensor, dim, size) for tensor, dim in zip(tensors, in_dims[1:], strict=True))
        x, report, token = cls.apply(objective, *joined)
        return (split_matrices(x, size), split_matrices(report, size), token), (0, 0, None)


class SolveCurvature(Primitive):
    """(objective, c (P, n, k), x (P, n), token, *leaves) -> s (P, n, k)"""

    @classmethod
    def forward(cls, objective, c, x, token, *leaves):
        return solve_curvature(objective, c, x, token, leaves)

    @classmethod
    def vjp_rule(cls, objective, inputs, outputs, cotangents, needed):
        _, x, token, *leaves = inputs
        (s,), (s_bar,) = outputs, cotangents
        if s_bar is None:
            return (None,) * len(inputs)
        c_bar = cls.apply(objective, s_bar, x, token, *leaves)
        which = [i for i, need in enumerate((needed[1], *needed[3:])) if need]
        bars: list[Tensor | None] = [None] * (1 + len(leaves))
        if which:
            moved, chosen = of_some(which, [x, *leaves], lambda *every: each(objective.curvature, s, *every))
            pull: Any = torch.func.vjp(moved, *chosen)[1]
            for i, bar in zip(which, pull(-c_bar), strict=True):
                bars[i] = bar
        return c_bar if needed[0] else None, bars[0], None, *bars[1:]

    @classmethod
    def jvp_rule(cls, objective, inputs, outputs, tangents):
        _, x, token, *leaves = inputs
        (s,), (c_dot, x_dot, _, *dots) = outputs, tangents
        dots = [x_dot, *dots]
        which = [i for i, dot in enumerate(dots) if dot is not None]
        if which:
            moved, chosen = of_some(which, [x, *leaves], lambda *every: each(objective.curvature, s, *every))
            h_dot: Any = torch.func.jvp(moved, chosen, tuple(dots[i] for i in which))[1]
            c_dot = -h_dot if c_dot is None else c_dot - h_dot
        if c_dot is None:
            return torch.zeros_like(s)
        return cls.apply(objective, c_dot, x, token, *leaves)

    @classmethod
    def vmap(cls, info, in_dims, objective, c, x, token, *leaves):
        _, of_c, of_x, _, *of_leaves = in_dims
        size = info.batch_size
        if of_x is None and all(dim is None for dim in of_leaves):
            return split_columns(cls.apply(objective, join_columns(c, of_c, size), x, token, *leaves), size), 2
        c, x = join_matrices(c, of_c, size), join_matrices(x, of_x, size)
        every = (join_matrices(leaf, dim, size) for leaf, dim in zip(leaves, of_leaves, strict=True))
        return split_matrices(cls.apply(objective, c, x, token, *every), size), 0


def _where_found(derivative: Tensor, report: Tensor) -> Tensor:
    """What failed under throw=False has NaN for a derivative (P, ...)."""
    factor = torch.where(report[:, FitReport._fields.index("status")] == 0, 1.0, torch.nan)
    return factor.view(-1, *[1] * (derivative.ndim - 1)) * derivative  # a product, whose own derivatives are NaN too
