"""Whether a refined solution is accepted: what is known of its errors, in a report.

    relative error = max(|e_r| / |W^(1/2) r|, |e_x| / |x|) + eps / 2 <= accept

The estimates e_r and e_x of refinement rest on the factor. So they are held against the residuals that are left, which
are computed from A itself, and cannot be smaller than these allow, however wrong the factor may be.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..result import CONVERGED, INACCURATE, ITERATION_LIMIT, Report
from ..sparse.base import norm
from .refinement import Errors, Measure, Refined, ratio
from .system import EPS, System


def _at_least(errors: Errors, first: Tensor, second: Tensor, largest: Tensor, noise: Tensor) -> Errors:
    """`errors`, or larger ones where residuals of the norms `first` and `second` prove that e_r is larger.

    f_1 = e_r + A e_y and f_2 = A^H e_r - d^2 e_y, so that e_r or A e_y is at least half as large as f_1, and as
    f_2 / |A|; ten times the `noise` of the residuals themselves proves nothing.
    """
    least = (torch.maximum(first, second / largest) - 10 * noise).clamp_min(0) / 2
    both = (errors.r < least) & (largest * errors.y < least)
    return Errors(torch.where(both, least, errors.r), errors.y, errors.x)


def report(
    system: System,
    b: Tensor,
    c: Tensor,
    refined: Refined,
    *,
    method: int | Tensor,
    largest: Tensor,
    smallest: Tensor,
    rank: int | Tensor,
    accept: float | None,
    limited: Tensor | None = None,
    given: Tensor | None = None,
) -> Report:
    """Judge a solution; `largest` and `smallest` are singular values (P, 1), `limited` marks columns that ran out.

    `accept` is the largest relative error that is accepted, None for any. `given` is the c that was asked about, where
    c is a projection of it.
    """
    r, y, errors, iterations = refined
    measure = Measure(system, b, c if given is None else given, largest, accept)
    whole = measure.sizes(r, y)
    left_of_b, left_of_c = system.residuals(b, c, r, y)
    first, second, of_b, of_c = system.row_norm(left_of_b), norm(left_of_c), measure.of_b, norm(c)
    errors = _at_least(errors, first, second, largest, EPS * (of_b + of_c + whole.r + largest * whole.y))
    # |x| is a root of squares in units of min D^-1. Where it is below 2^-450 these may have underflown, and nothing is
    # claimed of x.
    zero_r, zero_y = system.A.largest(r) == 0, (y == 0).all(1)
    measured = (whole.x > 2.0**-450) | zero_y
    relative = measure.relative(errors, whole) + system.precision / 2
    accepted = (relative.isfinite() if accept is None else relative <= accept) & measured
    failed = INACCURATE if limited is None else torch.where(limited, ITERATION_LIMIT, INACCURATE)
    ones = torch.ones_like(iterations)
    slack = EPS * (of_b + largest * whole.y)

    def claim(error: Tensor, size: Tensor, zero: Tensor) -> Tensor:
        relative = ratio(error, size)
        if bool(zero.any()):
            relative = torch.where(zero & accepted, _of_zero(system, b, c, r, y), relative)
        return torch.where(measured, relative + system.precision / 2, torch.inf)

    of_r = claim(errors.r, whole.r, zero_r)
    return Report(
        status=torch.where(accepted, CONVERGED, failed) * ones,
        method=method * ones,
        iterations=iterations,
        optimality=ratio(second, largest * torch.maximum(whole.r, slack) + of_c),
        residual_error=of_r,
        weighted_error=of_r,
        solution_error=claim(errors.x, whole.x, zero_y),
        condition=largest / smallest * ones,
        rank=rank * ones,
        norm=system.frobenius * ones,
        tried=0 * ones,
        rounding=system.precision / 2 * ones,
    )


def _of_zero(system: System, b: Tensor, c: Tensor, r: Tensor, y: Tensor) -> Tensor:
    """The relative error (P, k) of a solution of zeros: 0 where its gradient is but rounding, else 1.

    A solver may end with zeros because its numbers were too small for their squares.
    """
    rounding = system.rounding(b, c, r, y)[1][:, :, : b.shape[2]]
    other = (system.gradient(system.weigh(r), y, c).abs() > 16 * rounding.abs()).any(1)
    return (other | (system.lost & ((system.A.largest(b) > 0) | (c != 0).any(1)))).to(torch.float64)
