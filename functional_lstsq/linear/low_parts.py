"""What rounding a solution to double precision has left out of it, for derivatives that nothing else is left of.

A tangent of x puts dA^H s into the second equation, a derivative by damp takes <l_x, x>: sums that cancel where dA, or
x_bar, lies in a weak direction, until rounding of s or x to double precision is all there is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..result import Report
from ..solvers.base import Factors
from ..solvers.small import Small
from ..solvers.system import EPS, System
from ..sparse.base import norm
from ..sparse.double_double import Pair, scaled
from ..sparse.numerics import ldexp
from .factor_cache import no_token

LOW = "low"  # in the place of on_failure: what rounding has left out of a solution is asked for
_SMALL_ERROR = 1e-10  # of tangents, relative to what they are made of, that low parts would take away


def low_parts(
    system: System,
    factors: Factors,
    b: Tensor,
    e: Tensor | None,
    c: Tensor,
    known: Tensor,
    *,
    minimum_norm: bool,
) -> tuple[Tensor, Tensor]:
    """What rounding has left out of s and x for the right-hand sides (b, e, c).

    `known` holds (r, x, condition) without weights, (r, s, x, condition) with weights.

    Zeros where a tangent does not need it: rounding errors of s are magnified by the square of the condition number.
    For solutions of least norm without damping, in the place of x, c - A^H s: the part of c that A does not reach.
    """
    r, *of_s, x, condition = known.split((system.m,) * (1 if system.weights is None else 2) + (system.n, 1), 1)
    none = torch.zeros_like(condition.real).int()
    y, s = system.scaling.rescaled(x, none, 1), r
    if system.weights is not None:
        unit = -2 * system.half[:, :, None]
        e = torch.zeros_like(r) if e is None else ldexp(e, unit)
        c, s = ldexp(c, unit), ldexp(of_s[0], unit)
        if system.slack is not None:
            r = torch.where(system.slack < 1, (s - e) / system.weights[:, :, None], r)
    needed = _matter(condition, system.row_norm(r), norm(y))
    needed = (needed | minimum_norm) & system.A.everywhere(r.isfinite().all(1)) & y.isfinite().all(1)
    if not (system.A.has_exact_products and bool(needed.any())):
        return torch.zeros_like(r), torch.zeros_like(x)
    whole_r, whole_y, c = Pair.of(r), Pair.of(y), system.scaling.rescaled(c, none, -1)
    null, beyond = factors.null, None
    # Rounding of the first residuals is magnified as that of the solution was.
    for _ in range(2 if null is None else 3):
        first, second = system.exact_residuals(b, c, whole_r, whole_y, e)
        if null is not None:
            # The part of c that A does not reach stays: taken off by projecting, its rounding errors would be new ones
            # each time.
            if beyond is None:
                beyond = system.scaling.rescaled(null.outside(system.scaling.rescaled(second, none, 1)), none, -1)
            second = second - beyond
        left = (torch.where(needed[:, None] & f.isfinite(), f, 0.0) for f in (first, second))
        more_r, more_y, _ = factors.solve(*left)
        whole_r, whole_y = whole_r.plus(more_r), whole_y.plus(more_y)
    whole_s = whole_r if system.weights is None else scaled(system.weights[:, :, None], whole_r)
    if e is not None:
        whole_s = whole_s.plus(e)
    low_s, low_y = (whole.high - t + whole.low for whole, t in ((whole_s, s), (whole_y, y)))
    if system.weights is not None:
        low_s = ldexp(low_s, -unit)
    if minimum_norm and null is not None:
        # Of pairs: rounded to double precision, s would leave more than that in columns that are far larger.
        low_x = system.scaling.rescaled(system.exact_residuals(b, c, whole_r, whole_y, e)[1], none, 1)
        low_x = low_x if system.weights is None else ldexp(low_x, -unit)
    else:
        low_x = system.scaling.rescaled(low_y, none, -1)
    low_s, low_x = (torch.where(part.isfinite(), part, 0.0) for part in (low_s, low_x))
    return low_s.contiguous(), low_x.contiguous()


def told_as_solution(low_s: Tensor, low_x: Tensor, *, weighted: bool) -> tuple[Tensor, ...]:
    """(r, s, x, report, token), as a solve gives them, with low parts in the places of s and x."""
    copies, m, k = low_s.shape
    unjudged = torch.zeros(Report.shape(copies, k), dtype=torch.float64, device=low_s.device)
    return low_s, low_s.new_zeros((copies, m if weighted else 0, k)), low_x, unjudged, no_token()


def none_of_small(small: Small, known: Tensor) -> tuple[Tensor, Tensor] | None:
    """Zeros as low parts of s and x of a small system, where none matters; else None, and `low_parts` finds them."""
    m, n, weights = small.shape[0], small.shape[1], small.weights
    r, *_, x, condition = known.split((m,) * (1 if weights is None else 2) + (n, 1), 1)
    of_rows = r if weights is None else weights.sqrt()[:, :, None] * r
    scale = small.scale
    of_x = norm(torch.where(scale.isinf(), 0.0, scale) * x)  # without unknowns that are pinned at zero
    if not small.is_whole or bool(_matter(condition, norm(of_rows), of_x).any()):
        return None
    return torch.zeros_like(r), torch.zeros_like(x)


def _matter(condition: Tensor, of_r: Tensor, of_y: Tensor) -> Tensor:
    """(P, k), for a condition number (P, 1, k) and norms of r and of x, columns scaled."""
    beside = of_r / of_y.clamp_min(torch.finfo(torch.float64).tiny)
    return EPS * condition.real[:, 0].square() * (1 + beside) > _SMALL_ERROR
