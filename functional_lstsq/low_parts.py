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
    system: System,
    factors: Any,
    b: Tensor,
    c: Tensor,
    known: Tensor,
    weighted: Weighted | None,
    *,
    minimum_norm: bool,
) -> tuple[Tensor, Tensor]:
    """(W r, x) of what is left of (b, e, c) by the solution (r, x) in `known`: what rounding has left out of it.

    Zeros where a tangent does not need it: rounding errors of s are magnified by the square of the condition number.
    For solutions of least norm without damping, in the place of x, c - A^H s: the part of c that A does not reach.
    """
    r, x, condition = known.split((system.m, system.n, 1), 1)
    none = torch.zeros_like(condition.real).int()
    y = system.rescaled(x, none, 1)
    e = None if weighted is None else weighted[1]
    beside = norm(system.weigh(r)) / norm(y).clamp_min(torch.finfo(torch.float64).tiny)
    needed = EPS * condition.real[:, 0].square() * (1 + beside) > _SMALL_ERROR
    needed = (needed | minimum_norm) & r.isfinite().all(1) & y.isfinite().all(1)
    if not (isinstance(system.A, Operator) and bool(needed.any())):
        return torch.zeros_like(r), torch.zeros_like(x)
    whole_r, whole_y, c = Pair.of(r), Pair.of(y), system.rescaled(c, none, -1)
    null, beyond = getattr(factors, "null", None), None
    for _ in range(
        2 if null is None else 3
    ):  # rounding of the first residuals is magnified as that of the solution was
        first, second = system.exact_residuals(b, c, whole_r, whole_y, e)
        if null is not None:
            # The part of c that A does not reach stays: taken off by projecting, its rounding errors would be new ones
            # each time.
            if beyond is None:
                beyond = system.rescaled(null @ (null.mH @ system.rescaled(second, none, 1)), none, -1)
            second = second - beyond
        left = (torch.where(needed[:, None] & f.isfinite(), f, 0.0) for f in (first, second))
        more_r, more_y, _ = factors.solve(*left)
        whole_r, whole_y = whole_r.plus(more_r), whole_y.plus(more_y)
    low_r, low_y = (whole.high - t + whole.low for whole, t in ((whole_r, r), (whole_y, y)))
    if weighted is not None:
        assert system.weights is not None
        low_r = ldexp(system.weights[:, :, None] * low_r, 2 * weighted[0])
    if minimum_norm and system.d2 is None:
        # Of pairs: rounded to double precision, s would leave more than that in columns that are far larger.
        low_x = system.rescaled(system.exact_residuals(b, c, whole_r, whole_y, e)[1], none, 1)
        low_x = low_x if weighted is None else ldexp(low_x, 2 * weighted[0])
    else:
        low_x = system.rescaled(low_y, none, -1)
    low_r, low_x = (torch.where(part.isfinite(), part, 0.0) for part in (low_r, low_x))
    return low_r.contiguous(), low_x.contiguous()
