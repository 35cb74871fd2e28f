"""What rounding a solution to double precision has left out of it, for derivatives that nothing else is left of.

A tangent of x puts dA^H s into the second equation, a derivative by damp takes <l_x, x>: sums that cancel where dA, or
x_bar, lies in a weak direction, until rounding of s or x to double precision is all there is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .products import Operator
from .solvers.extended import Pair
from .solvers.numerics import ldexp
from .solvers.system import EPS, System, norm

_SMALL_ERROR = 1e-10  # of tangents, relative to what they are made of, that low parts would take away
Weighted = tuple[Tensor, Tensor | None]


def low_parts(
    system: System, factors: Any, b: Tensor, c: Tensor, known: Tensor, weighted: Weighted | None, *, always: bool
) -> tuple[Tensor, Tensor]:
    """(W r, x) of what is left of (b, e, c) by the solution (r, x) in `known`: what rounding has left out of it.

    Zeros where a tangent does not need it: rounding errors of s are magnified by the square of the condition number.
    """
    r, x, condition = known.split((system.m, system.n, 1), 1)
    none = torch.zeros_like(condition.real).int()
    y = system.rescaled(x, none, 1)
    e = None if weighted is None else weighted[1]
    beside = norm(system.weigh(r)) / norm(y).clamp_min(torch.finfo(torch.float64).tiny)
    needed = EPS * condition.real[:, 0].square() * (1 + beside) > _SMALL_ERROR
    needed = (needed | always) & r.isfinite().all(1) & y.isfinite().all(1)
    if not (isinstance(system.A, Operator) and bool(needed.any())):
        return torch.zeros_like(r), torch.zeros_like(x)
    whole_r, whole_y, c = Pair.of(r), Pair.of(y), system.rescaled(c, none, -1)
    for _ in range(2):  # rounding of the first residuals is magnified as that of the solution was
        left = system.exact_residuals(b, c, whole_r, whole_y, e)
        more_r, more_y, _ = factors.solve(*(torch.where(needed[:, None] & f.isfinite(), f, 0.0) for f in left))
        whole_r, whole_y = whole_r.plus(more_r), whole_y.plus(more_y)
    low_r, low_y = (whole.high - t + whole.low for whole, t in ((whole_r, r), (whole_y, y)))
    if weighted is not None:
        assert system.weights is not None
        low_r = ldexp(system.weights[:, :, None] * low_r, 2 * weighted[0])
    low_x = system.rescaled(low_y, none, -1)
    low_r, low_x = (torch.where(part.isfinite(), part, 0.0) for part in (low_r, low_x))
    return low_r.contiguous(), low_x.contiguous()
