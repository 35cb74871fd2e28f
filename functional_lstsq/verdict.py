"""The verdict on a solution: whether it is in the range of its precision, and whether a derivative may be made of it.

A derivative of the solution (r, x) takes a further solve l, and the gradient by A is -(l_r x^H + r l_x^H) at the stored
entries. It is judged by the errors of l and of (r, x):

  - a gradient that these errors may spoil is refused, though l itself is right: x may be right in its norm and not
    in those entries that the gradient needs;
  - a gradient that they cannot spoil is accepted, though l_x is wrong: that of |residual|^2 has l_x = 0.

Sizes of r, x and l may differ so much that neither their products nor their squares are numbers. So each is taken in
units of its own largest entry, and units are multiplied by adding their logarithms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .products import Operator
from .result import CONVERGED, INACCURATE, OUT_OF_RANGE, RANK_DEFICIENT, SPOILT, ZERO, Report
from .solvers.numerics import ldexp
from .solvers.system import System, norm

_RANGE, _SMALLEST = 1023.0, -1074.0  # exponents of the largest and of the smallest number in double precision
_TINY = -700.0  # exponent of columns in which a zero may have been another number
_LEAST = -3000.0  # stands for the logarithm of zero: a product with it is zero beside any other


def judge_range(
    report: Report, name: str, solution: Tensor, zero: Tensor, dtype: torch.dtype, accept: float | None
) -> Report:
    """Add to the error `name` what rounding `solution` to `dtype` does, where its numbers are too small or too large.

    Args:
        zero: (P, k), which columns were zero before they came into this range.
        accept: the largest error with which this is still a solution; None to judge the error alone.
    """
    limits, largest = torch.finfo(dtype), solution.abs().amax(1)
    smallest = limits.smallest_normal * limits.eps * solution.shape[1] ** 0.5
    lost = torch.where(zero, 0.0, (smallest / largest).clamp(max=1.0))
    lost = torch.where(largest > limits.max, torch.inf, lost)
    report = report._replace(**{name: getattr(report, name) + lost})
    if accept is None:
        return report
    gone = (report.status == CONVERGED) & (lost > accept)
    return report._replace(status=torch.where(gone, float(OUT_OF_RANGE), report.status))


def tell_zeros(report: Report, name: str, accept: float) -> Report:
    """What was accepted although its error `name` is larger: a solution that is zero but for rounding."""
    error = getattr(report, name)
    zero = (report.status == CONVERGED) & (error > accept)
    # Relative to what the solution should be, nothing is known of it.
    told = {name: torch.where(zero, torch.inf, error)}
    return report._replace(status=torch.where(zero, float(ZERO), report.status), **told)


def settle(
    system: System,
    report: Report,
    r: Tensor,
    x: Tensor,
    b: Tensor,
    primal: Tensor | None,
    damp: Tensor | None,
    weighted: tuple[Tensor, Tensor | None] | None,
) -> Report:
    """The verdict on (r, x), an adjoint solution where there is a `primal` one: see `describe_primal`."""
    finite = torch.isfinite(r.sum(1)) & torch.isfinite(x.sum(1))  # without a temporary of that size
    # What was solved for in numbers of about 1 has overflowed in those of the problem.
    report = report._replace(
        status=torch.where(~finite & (report.status == CONVERGED), float(OUT_OF_RANGE), report.status)
    )
    if primal is not None:
        s, given = r, b
        if weighted is not None:
            assert system.weights is not None
            unit, rest = weighted
            s, given = (ldexp(system.weights[:, :, None] * t, 2 * unit) for t in (r, b))
            s = s if rest is None else s + ldexp(rest, 2 * unit)
            error = _of_weighted(report.residual_error, ldexp(system.weights, 2 * unit[:, :, 0]), r, s)
            judged = _judge_derivative(system, report._replace(residual_error=error), s, x, given, primal, damp)
            report = report._replace(status=judged.status)
        else:
            report = _judge_derivative(system, report, r, x, b, primal, damp)
    status = report.status
    none = ~finite | (status == RANK_DEFICIENT)
    return report._replace(
        status=status,
        residual_error=torch.where(none, torch.inf, report.residual_error),
        solution_error=torch.where(none, torch.inf, report.solution_error),
        condition=torch.where(status == RANK_DEFICIENT, torch.inf, report.condition),
    )


def _judge_derivative(
    system: System, report: Report, r: Tensor, x: Tensor, b: Tensor, primal: Tensor, damp: Tensor | None
) -> Report:
    of_A, by_damp, relaxed, error_of_r, error_of_x = primal[:, :5].unbind(1)
    (r, R), (x, X) = _in_units(r.abs()), _in_units(x.abs())
    (of_r, of_R), (of_x, of_X) = _in_units(primal[:, 5 : 5 + system.m]), _in_units(primal[:, 5 + system.m :])
    error_r, error_x = _in_unit_of(report.residual_error, r, R), _in_unit_of(report.solution_error, x, X)
    pattern = system.A.pattern
    stored = Operator(pattern, r.new_ones((1, pattern.nnz)).expand(system.copies, -1))
    # Squares of norms of what each row meets of x and of l_x, and each column of s and of l_s.
    rows_of_x, rows_x = (stored.matmul(t.square()) for t in (of_x, x))
    columns_of_r, columns_r = (stored.adjoint(t.square()) for t in (of_r, r))
    first = (r.square() * rows_of_x).sum(1).sqrt()  # |l_s x^H| at the stored entries
    second = (of_r.square() * rows_x).sum(1).sqrt()
    # The units of the first term and of the second, in units of the larger.
    unit = torch.maximum(R + of_X, of_R + X)
    one, other = torch.exp2(R + of_X - unit), torch.exp2(of_R + X - unit)
    # A gradient that is zero but for rounding is as right as can be.
    zero = torch.exp2((R + of_R - unit - _log(report.norm)).clamp(max=_RANGE)) * norm(r) * norm(of_r)
    error = one * error_r * _largest(rows_of_x, r, R) + other * error_x * _largest(columns_of_r, x, X)
    more = one * error_of_x * _largest(columns_r, of_x, of_X) + other * error_of_r * _largest(rows_x, of_r, of_R)
    allowed = system.accept * torch.maximum(one * first + other * second, system.accept * zero)
    useful = (relaxed > 0) & (error <= system.accept * one * first)
    least = system.accept * torch.exp2((_log(b.abs().amax(1)) - R).clamp(max=_RANGE)) * norm(_in_units(b.abs())[0])
    useful &= error_r <= system.accept * torch.maximum(norm(r), least)
    spoilt = (of_A > 0) & ~(error + more <= allowed)
    status = torch.where(useful & (report.status == INACCURATE), float(CONVERGED), report.status)
    status = torch.where(spoilt & (status == CONVERGED), float(SPOILT), status)
    columns = _log(torch.tensor(float(r.shape[2])))
    beyond = (of_A > 0) & (unit + _log(one * first + other * second) + columns >= _RANGE)
    if damp is not None:  # 2 d <l_x, x>
        size = _log(damp)[:, None] + X + of_X + _log(norm(x) * norm(of_x))
        beyond |= (by_damp > 0) & (size + columns + 1 >= _RANGE)
    return report._replace(status=torch.where(beyond & (status == CONVERGED), float(OUT_OF_RANGE), status))


def _largest(squares: Tensor, beside: Tensor, unit: Tensor) -> Tensor:
    """What an error of norm 1 in `beside` is multiplied by at most: what is zero there has none.

    Not where it may be zero because it was too small for a number.
    """
    return torch.where((beside != 0) | (unit < _TINY)[:, None], squares, 0.0).amax(1).sqrt()


def _in_units(size: Tensor) -> tuple[Tensor, Tensor]:
    """(columns in units of their largest entry, the logarithms of these units (P, k)) of sizes (P, rows, k)."""
    largest = size.amax(1)
    return size / torch.where(largest > 0, largest, 1.0)[:, None], _log(largest).clamp_min(_SMALLEST)


def _log(size: Tensor) -> Tensor:
    return torch.where(size > 0, torch.log2(size), _LEAST)


def _in_unit_of(error: Tensor, size: Tensor, unit: Tensor) -> Tensor:
    """The error in the unit of `_in_units`, from the relative one of what has this size.

    What is smaller than any number has been rounded to zero, which `judge_range` notes, or to one of few digits.
    """
    whole, smallest = norm(size), size.shape[1] ** 0.5
    return torch.where(whole > 0, error * whole + smallest * torch.exp2(_SMALLEST - unit), (error >= 0.5) * smallest)


def _of_weighted(error: Tensor, weights: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """The relative error of s = W r + e from that of r, which is relative to |W^(1/2) r| in that norm."""
    root = weights.sqrt()
    size = norm(root[:, :, None] * r) * root.amax(1, keepdim=True)
    return error * size / norm(s).clamp_min(torch.finfo(torch.float64).tiny)


def describe_primal(
    r: Tensor,
    s: Tensor,
    x: Tensor,
    report: Tensor,
    weights: Tensor | None,
    *,
    by_A: bool,
    by_damp: bool,
    relaxed: bool,
) -> Tensor:
    """(P, 5 + m + n, k): what an adjoint solve is to know of the solution (r, x), in one tensor.

    Whether a gradient by A is to be judged (without full rank there is more to it), whether one by damp, whether that
    by A may be accepted for itself, estimated errors of s = W r + e and x in units of their largest entries; |s|, |x|.
    """
    report, r, s, x = report.detach(), r.detach(), s.detach().abs(), x.detach().abs()
    fields = Report._fields
    full = report[:, None, fields.index("rank")] >= x.shape[1]
    rows = [(full & by_A).to(x.dtype), *(torch.full_like(x[:, :1], float(flag)) for flag in (by_damp, relaxed))]
    for size, name in ((s, "residual_error"), (x, "solution_error")):
        # In double precision, whatever the user's own, whose rounding the estimate includes.
        error = report[:, fields.index(name)] - report[:, fields.index("rounding")]
        if weights is not None and size is s:
            error = _of_weighted(error, weights.detach(), r, s)
        rows.append(_in_unit_of(error, *_in_units(size))[:, None])
    return torch.cat([*rows, s, x], 1)
