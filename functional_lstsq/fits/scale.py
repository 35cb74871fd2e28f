"""A robust fit whose scale is estimated with it: the primitive `Scale`, and the minimum beside it.

The scale s of the residuals and the minimum x(s) for thresholds of k s are one joint estimate (Huber, Robust
Statistics, Wiley 1981, section 6.7): s = G(s), with one of

    mad     G = median_i |z_i| / 0.6745                                 z_i = w_i^(1/2) r_i(x(s)), of weights w_i > 0
    huber   G^2 = sum_i min(z_i^2, (2.5 s)^2) / (gamma (m - n))         gamma = E min(Z^2, 2.5^2), Z standard normal

x(s) is `Minimum`, whose derivative by the threshold makes s a function of all leaves, and x of s:

    JVP   ds = dG / (1 - dG/ds)             VJP   leaves_bar = (dG/dleaves)^T s_bar / (1 - dG/ds)
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ConvergenceError
from ..torch_func.primitive import Primitive, extent, join_matrices, split_matrices
from ..torch_func.tracing import concrete
from .attempts import minimise
from .minimum import Minimum, along, pull_back
from .model import model_at
from .objective import Objective, each
from .rounding import errors_of_residual

_STEPS = 100
_CLOSE, _ACCEPTED = 1e-14, 1e-10  # relative differences between s and G(s) that end the iteration, and that will do
_MAD = 0.6744897501960817  # the median of the sizes of standard normal numbers
_ERRORS = 30.0  # in a residual, in units of the machine epsilon
_D = 2.5  # of proposal 2, as statsmodels has it
_GAMMA = math.erf(_D / 2**0.5) - 2 * _D * math.exp(-(_D**2) / 2) / (2 * math.pi) ** 0.5 + _D**2 * math.erfc(_D / 2**0.5)
_TIED = 1e-12  # relative difference of residuals that rounding may put into another order


def minimum_with_scale(
    objective: Objective, estimator: Any, x0: Tensor, k: Tensor, d: Tensor, w: Tensor, *given: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(x (P, n), report, blur, token, threshold (P,)), of thresholds k (P,), in units of the scale if one is estimated.

    Args:
        estimator: "mad" or "huber"; anything else estimates no scale.
    """
    if estimator in ("mad", "huber"):
        s, x0, _ = Scale.apply((objective, estimator), x0, k, d, w, *given)
        k = k * s
    return (*Minimum.apply(objective, x0, k, d, w, *_given(objective, k, given)), k)


def _given(objective: Objective, t: Tensor, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (t, *given[1:]) if objective.nested else given


def _estimate(estimator: str, s: Tensor, r: Tensor, w: Tensor, n: int) -> Tensor:
    """G (P,) for residuals r (P, m)."""
    if estimator == "huber":
        squares, most = w * r.square(), (_D * s).square()[:, None]
        free = ((w > 0).sum(1) - n).to(s.dtype)
        mean = torch.where(squares <= most, squares, torch.where(w > 0, most, 0.0)).sum(1) / (_GAMMA * free)
        return torch.where(mean > 0, torch.where(mean > 0, mean, 1.0).sqrt(), 0.0)
    order, below, above = _ranks(r, w)
    middle = torch.stack([order.gather(1, place[:, None])[:, 0] for place in (below, above)], 1)
    return (w.gather(1, middle).sqrt() * r.gather(1, middle).abs()).mean(1) / _MAD


def _ranks(r: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rows by the size of their residuals, those of weight zero last; the places of the two in the middle)"""
    counted = (w > 0).sum(1).clamp_min(1)
    return _sizes(r, w).argsort(1), (counted - 1) // 2, counted // 2


def _sizes(r: Tensor, w: Tensor) -> Tensor:
    return torch.where(w > 0, w.sqrt() * r.abs(), torch.inf).detach()


def _smooth(estimator: str, r: Tensor, w: Tensor) -> Tensor:
    """(P,) 1 where G has a derivative, NaN where residuals outside of the middle tie with it (those in it may)."""
    ones = torch.ones_like(r[:, 0])
    if estimator == "huber":
        return ones
    order, below, above = _ranks(r, w)
    sizes = torch.nn.functional.pad(_sizes(r, w).gather(1, order), (1, 1), value=torch.inf)
    sizes[:, 0] = -torch.inf
    before, low, high, after = (sizes.gather(1, at[:, None])[:, 0] for at in (below, below + 1, above + 1, above + 2))
    apart = (low - before > _TIED * high) & (after - high > _TIED * high)
    return torch.where(apart, ones, torch.nan)


class Scale(Primitive):
    """((objective, estimator), x0 (P, n), k (P,), d (P,), w (P, m), *given (P, ...)) -> s (P,), x (P, n), smooth (P,)

    x is the minimum for s, without a derivative, where a further `Minimum` may start. smooth is NaN where s has none,
    zero where s is the least that is used, which counts as a constant.
    """

    constants = (1, 2)

    @classmethod
    def forward(cls, static, x0, *leaves):
        if not len(x0):  # of an empty batch
            return x0.new_empty(0), x0.clone(), x0.new_empty(0)
        return _solve(static[0], static[1], x0, leaves)

    @classmethod
    def vjp_rule(cls, static, inputs, outputs, cotangents, needed):
        _, *leaves = inputs
        s, x, smooth = outputs
        if cotangents[0] is None:
            return (None,) * len(inputs)
        _require_smooth(static[0], smooth)
        G, every = _map(static[0], static[1], x), [s, *leaves]
        slope: Any = pull_back(G, every, [True] + [False] * len(leaves), torch.ones_like(s))[0]
        return None, *pull_back(G, every, [False, *needed[1:]], _of_scale(smooth, cotangents[0], slope))[1:]

    @classmethod
    def jvp_rule(cls, static, inputs, outputs, tangents):
        _, *leaves = inputs
        s, x, smooth = outputs
        if all(dot is None for dot in tangents[1:]):
            return torch.zeros_like(s), None, None
        _require_smooth(static[0], smooth)
        G, every = _map(static[0], static[1], x), [s, *leaves]
        slope = along(G, every, [torch.ones_like(s), *[None] * len(leaves)])[1]
        return _of_scale(smooth, along(G, every, [None, *tangents[1:]])[1], slope), None, None

    @classmethod
    def vmap(cls, info, in_dims, static, *tensors):
        size = info.batch_size
        joined = (join_matrices(tensor, dim, size) for tensor, dim in zip(tensors, in_dims[1:], strict=True))
        copies = extent(tensors[:1], in_dims[1:2], 0)
        return tuple(split_matrices(output, size, copies) for output in cls.apply(static, *joined)), (0, 0, 0)


def _of_scale(smooth: Tensor, derivative: Tensor, slope: Tensor) -> Tensor:
    """derivative / (1 - dG/ds); zero where rounding is all that the scale is made of."""
    return torch.where(smooth == 0, 0.0, smooth * derivative / (1 - slope))


def _map(objective: Objective, estimator: str, x0: Tensor) -> Any:
    """(s, k, d, w, *given) -> G"""

    def G(s: Tensor, k: Tensor, d: Tensor, w: Tensor, *given: Tensor) -> Tensor:
        given = _given(objective, k * s, given)
        x = Minimum.apply(objective, x0.detach(), k * s, d, w, *given)[0]
        return _estimate(estimator, s, each(objective.residual, x, *given), w, x0.shape[1] + objective.found_inside)

    return G


def _solve(
    objective: Objective, estimator: str, x: Tensor, leaves: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """(s, x, smooth): by s = G(s), which converges by itself, and by secants where they promise more."""
    k, d, w, *others = leaves
    given = tuple(others)
    trial = replace(objective, on_failure="nan")  # on the way a fit may fail
    r = each(objective.residual, x, *given)
    floor = _rounding(objective, x, r, leaves)
    s = torch.maximum(_estimate("mad", k, r, w, x.shape[1] + objective.found_inside), floor)
    before: tuple[Tensor, Tensor] | None = None
    best, off, idle = s, torch.full_like(s, torch.inf), torch.zeros_like(s)
    allowed = torch.full_like(s, _ACCEPTED)
    for _ in range(_STEPS):
        if not bool(s.isfinite().all()):
            off = torch.where(s.isfinite(), off, torch.inf)
            break
        given = _given(objective, k * s, given)
        x = minimise(trial, x, (k * s, d, w, *given))[0]
        r = each(objective.residual, x, *given)
        floor = _rounding(objective, x, r, leaves)
        new = torch.maximum(_estimate(estimator, s, r, w, x.shape[1] + objective.found_inside), floor)
        misfit = (new - s).abs() / s
        idle = torch.where(misfit < off / 2, 0.0, idle + 1)
        best, off = torch.where(misfit <= off, s, best), torch.minimum(off, misfit)
        # Residuals are no more accurate than data that are far larger than they.
        allowed = (floor / s).clamp_min(_ACCEPTED)
        if bool(((off <= _CLOSE) | ((off <= allowed) & (idle >= 3))).all()):
            break
        before, s = (s, new), _ahead(s, new, before, (misfit > _CLOSE) & (idle % 3 < 2))
    failed = ~(off <= allowed)
    if objective.on_failure == "raise" and bool(failed.any()):
        _refuse(objective, estimator, float(s[failed][0]), float(off[failed][0]))
    smooth = torch.where(best > floor * (1 + _ACCEPTED), _smooth(estimator, r, w), 0.0)
    return torch.where(failed, torch.nan, best), x, smooth


def _rounding(objective: Objective, x: Tensor, r: Tensor, leaves: tuple[Tensor, ...]) -> Tensor:
    """A scale (P,) below which residuals are rounding errors, as those of data without noise: the least that is used.

    Where everything is zero any number will do.
    """
    J = each(objective.slopes, x, *leaves)
    model = model_at(objective, J.where(J.isfinite(), 0.0), torch.ones_like(r), leaves)
    floor = _ERRORS * objective.arithmetic * (leaves[2].sqrt() * errors_of_residual(model, r, x)).amax(1)
    return torch.where(floor > 0, floor, 1.0)


def _ahead(s: Tensor, new: Tensor, before: tuple[Tensor, Tensor] | None, trusted: Tensor) -> Tensor:
    """Where to go from s with G(s) = new: to the root of the secant, within a factor of two, or to new."""
    if before is None:
        return new
    slope = (new - before[1]) / torch.where(s == before[0], torch.inf, s - before[0])
    secant = (s + (new - s) / (1 - slope)).clamp(s / 2, 2 * s)
    return torch.where(trusted & (slope > -10) & (slope < 0.99), secant, new)


def _refuse(objective: Objective, estimator: str, s: float, off: float) -> None:
    raise ConvergenceError(
        f"{objective.name} found no scale that is its own estimate, scale={estimator!r}: after {_STEPS} fits or less "
        f"one of {s:.3e} is off by {off:.1e}, relative",
        "a convex loss, Huber() or SoftL1(), or its solution as x0",
        "a scale that is given",
    )


def _require_smooth(objective: Objective, smooth: Tensor) -> None:
    if objective.on_failure == "raise" and bool(concrete(smooth).isnan().any()):
        raise ConvergenceError(
            f"a derivative through {objective.name} does not exist: residuals of the same size tie for the median that "
            "scale='mad' rests on",
            "scale='huber', which is smooth",
            "a scale that is given",
        )
