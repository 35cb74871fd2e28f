"""The primitives `Minimum` and `SolveCurvature`: a minimum as a function of what it is the minimum of.

At a minimum g(x, leaves) = 0, which defines x(leaves) where the curvature H = dg/dx is positive definite; so does an
equation for a derivative of it define its solution s:

    Minimum         x:  g(x, leaves) = 0             g = J^T psi + d^2 x
    SolveCurvature  s:  H(x, leaves) s + J^T u + c = 0

The rules are those of a function that is defined by F(s, leaves) = 0 (Griewank and Walther, Evaluating Derivatives,
SIAM 2008, chapter 15), and solve equations with the same H:

    JVP   H ds + (dF/dleaves) dleaves = 0            VJP   H l + s_bar = 0,   leaves_bar = (dF/dleaves)^T l

Both F have the form J^T y + z, so that the first is H ds + J^T u + c = 0, u = dy, c = (dJ)^T y + dz: u stays by itself,
for J^T u may be small beside its rounding errors (see objective.py). The rules call these primitives and torch.func, so
that derivatives of every order and mix follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..linear.factor_cache import no_token
from ..torch_func.forward_mode import jvp
from ..torch_func.primitive import (
    Primitive,
    beside,
    extent,
    join_columns,
    join_matrices,
    of_some,
    split_columns,
    split_matrices,
)
from .attempts import minimise
from .hessian import solve_curvature
from .objective import each
from .report import FitReport


class Minimum(Primitive):
    """(objective, x0 (P, n), *leaves (P, ...)) -> x (P, n), report (P, fields), blur (P, n), token"""

    constants = (1, 2, 3)

    @classmethod
    def forward(cls, objective, x0, *leaves):
        if not len(x0):  # of an empty batch
            return (
                x0.clone(),
                x0.new_empty((0, len(FitReport._fields))),
                x0.clone(),
                no_token(),
            )
        return minimise(objective, x0, leaves)

    @classmethod
    def vjp_rule(cls, objective, inputs, outputs, cotangents, needed):
        _, *leaves = inputs
        x, report, blur, token = outputs
        x_bar = cotangents[0]
        if x_bar is None:
            return (None,) * len(inputs)
        l = _adjoint(objective, x_bar[:, :, None], x, blur, token, leaves)[:, :, 0]  # noqa: E741
        bars = pull_back(lambda *leaves: each(objective.gradient, x, *leaves), leaves, needed[1:], l)
        return None, *(None if bar is None else _where_found(bar, report, x_bar) for bar in bars)

    @classmethod
    def jvp_rule(cls, objective, inputs, outputs, tangents):
        _, *leaves = inputs
        x, report, blur, token = outputs
        if all(dot is None for dot in tangents[1:]):
            return torch.zeros_like(x), None, None, None

        def parts(x, *leaves):
            influence = lambda *leaves: each(objective.influence, x, *leaves)  # noqa: E731
            pulled = lambda y, *leaves: each(objective.pulled, y, x, *leaves)  # noqa: E731
            return (part[:, :, None] for part in _split(influence, pulled, leaves, tangents[1:]))

        constants = [(x + blur).detach(), *objective.nearby(tuple(leaf.detach() for leaf in leaves))]
        near = beside([*parts(*constants)], 1)
        if objective.further is not None:
            further = lambda x, t, d, w, *given: each(objective.further, x, *given)  # noqa: E731
            near = beside([near, along(further, constants, [None, *tangents[1:]])[1][:, :, None]], 1)
        x_dot = SolveCurvature.apply(objective, *parts(x, *leaves), near, x, blur, token, *leaves)[:, :, 0]
        return _where_found(x_dot, report), None, None, None

    @classmethod
    def vmap(cls, info, in_dims, objective, *tensors):
        size = info.batch_size
        joined = (join_matrices(tensor, dim, size) for tensor, dim in zip(tensors, in_dims[1:], strict=True))
        *outputs, token = cls.apply(objective, *joined)
        copies = extent(tensors[:1], in_dims[1:2], 0)
        return (*(split_matrices(output, size, copies) for output in outputs), token), (0, 0, 0, None)


class SolveCurvature(Primitive):
    """(objective, u (P, m, k), c (P, n, k), near, x (P, n), blur (P, n), token, *leaves) -> s (P, n, k)

    near (P, m + n, k) or None, and blur: as `solve_curvature` has them; no derivative flows through these.
    """

    @classmethod
    def forward(cls, objective, u, c, near, x, blur, token, *leaves):
        with objective.rows.steady():
            return solve_curvature(objective, u, c, near, x, blur, token, leaves) if len(c) else c.clone()

    @classmethod
    def vjp_rule(cls, objective, inputs, outputs, cotangents, needed):
        u, c, _, x, blur, token, *leaves = inputs
        (s,), (s_bar,) = outputs, cotangents
        if s_bar is None:
            return (None,) * len(inputs)
        l = _adjoint(objective, s_bar, x, blur, token, leaves)  # noqa: E741
        needed = (*needed[:2], needed[3], *needed[6:])
        equation = lambda *every: each(objective.equation, s, *every)  # noqa: E731
        u_bar, c_bar, x_bar, *bars = pull_back(equation, [u, c, x, *leaves], needed, l)
        return u_bar, c_bar, None, x_bar, None, None, *bars

    @classmethod
    def jvp_rule(cls, objective, inputs, outputs, tangents):
        u, c, _, x, blur, token, *leaves = inputs
        (s,), (u_dot, c_dot, _, x_dot, _, _, *dots) = outputs, tangents
        dots = [u_dot, c_dot, x_dot, *dots]
        if all(dot is None for dot in dots):
            return torch.zeros_like(s)

        def parts(s, u, c, x, *leaves):
            influence = lambda u, c, *every: each(objective.influence_along, s, u, *every)  # noqa: E731
            pulled = lambda y, u, c, *every: each(objective.pulled_along, y, s, c, *every)  # noqa: E731
            return _split(influence, pulled, [u, c, x, *leaves], dots)

        constants = (s, u, c, x + blur, *objective.nearby(tuple(leaves)))
        near = beside(parts(*(t.detach() for t in constants)), 1)
        return cls.apply(objective, *parts(s, u, c, x, *leaves), near, x, blur, token, *leaves)

    @classmethod
    def vmap(cls, info, in_dims, objective, u, c, near, x, blur, token, *leaves):
        _, of_u, of_c, of_near, of_x, of_blur, _, *of_leaves = in_dims
        size, columns = info.batch_size, ((u, of_u), (c, of_c), (near, of_near))
        if of_x is None and of_blur is None and all(dim is None for dim in of_leaves):
            joined = (join_columns(t, dim, size) for t, dim in columns)
            s = cls.apply(objective, *joined, x, blur, token, *leaves)
            return split_columns(s, size, extent([c], [of_c], 2)), 0
        joined = (join_matrices(t, dim, size) for t, dim in (*columns, (x, of_x), (blur, of_blur)))
        every = (join_matrices(leaf, dim, size) for leaf, dim in zip(leaves, of_leaves, strict=True))
        return split_matrices(cls.apply(objective, *joined, token, *every), size, extent([c], [of_c], 0)), 0


def _adjoint(objective: Any, s_bar: Tensor, x: Tensor, blur: Tensor, token: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """The solution l (P, n, k) of H l + s_bar = 0."""
    u = s_bar.new_zeros((len(s_bar), objective.pattern.shape[0], s_bar.shape[2]))
    return SolveCurvature.apply(objective, u, s_bar, None, x, blur, token, *leaves)


def pull_back(function: Callable, every: Sequence[Tensor], needed: Sequence[bool], l: Tensor) -> list[Tensor | None]:  # noqa: E741
    """The products of l with the derivative of `function` by each of the arguments that need one."""
    bars: list[Tensor | None] = [None] * len(every)
    which = [i for i in range(len(every)) if needed[i]]
    if which:
        moved, chosen = of_some(which, every, function)
        pull: Any = torch.func.vjp(moved, *chosen)[1]
        for i, bar in zip(which, pull(l), strict=True):
            bars[i] = bar
    return bars


def _split(
    inner: Callable, outer: Callable, every: Sequence[Tensor], dots: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """(dy, the tangent of outer(y, ...) for a y that stays) of y = inner(...)."""
    y, u = along(inner, every, dots)
    return u, along(lambda *every: outer(y, *every), every, dots)[1]


def along(function: Callable, every: Sequence[Tensor], dots: Sequence[Tensor | None]) -> Any:
    """(`function` of all, its tangent), where a tangent of None is zero."""
    which = [i for i, dot in enumerate(dots) if dot is not None]
    moved, chosen = of_some(which, every, function)
    return jvp(moved, chosen, tuple(dots[i] for i in which))


def _where_found(derivative: Tensor, report: Tensor, x_bar: Tensor | None = None) -> Tensor:
    """What failed under throw=False has NaN for a derivative (P, ...), unless nothing depends on it: x_bar is zero."""
    failed, dims = FitReport.unpacked(report).status != 0, [None] * (derivative.ndim - 1)
    factor = torch.where(failed, torch.nan, 1.0)
    derivative = factor[:, *dims] * derivative  # a product, whose own derivatives are NaN too
    if x_bar is None:
        return derivative
    return torch.where((failed & (x_bar == 0).all(1))[:, *dims], 0.0, derivative)
