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

from ..result import CONVERGED, INACCURATE, OUT_OF_RANGE, RANK_DEFICIENT, SPOILT, STOPPED, ZERO, Report
from ..solvers.system import System
from ..sparse.base import Products, norm
from ..sparse.numerics import power_of_two
from ..torch_func.primitive import beside

_RANGE, _SMALLEST = 1023.0, -1074.0  # exponents of the largest and of the smallest number in double precision
_TINY = -700.0  # exponent of columns in which a zero may have been another number
_LEAST = -3000.0  # stands for the logarithm of zero: a product with it is zero beside any other


def judge_range(
    report: Report,
    name: str,
    solution: Tensor,
    zero: Tensor,
    dtype: torch.dtype,
    accept: float | None,
    rows: Products | None = None,
) -> Report:
    """Add to the error `name` what rounding `solution` to `dtype` does, where its numbers are too small or too large.

    Args:
        zero: (P, k), which columns were zero before they came into this range.
        accept: the largest error with which this is still a solution; None to judge the error alone.
        rows: A, of a solution that has its rows, which may lie in several places.
    """
    limits, largest = torch.finfo(dtype), solution.abs().amax(1) if rows is None else rows.largest(solution)
    smallest = limits.smallest_normal * limits.eps * (solution.shape[1] if rows is None else rows.height) ** 0.5
    lost = torch.where(zero, 0.0, (smallest / largest).clamp(max=1.0))
    lost = torch.where(largest > limits.max, torch.inf, lost)
    report = report._replace(**{name: getattr(report, name) + lost})
    if accept is None:
        return report
    gone = _is_answer(report.status) & (lost > accept)
    return report._replace(status=torch.where(gone, float(OUT_OF_RANGE), report.status))


def _is_answer(status: Tensor) -> Tensor:
    return (status == CONVERGED) | (status == STOPPED)


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
    accept: float,
    r: Tensor,
    x: Tensor,
    b: Tensor,
    primal: Tensor | None,
    damp: Tensor | None,
    e: Tensor | None,
) -> Report:
    """The verdict on (r, x), an adjoint solution where there is a `primal` one: see `describe_primal`.

    A derivative is refused where its relative error may be above `accept`.
    """
    finite = torch.isfinite(r.sum(1)) & torch.isfinite(x.sum(1))  # without a temporary of that size
    finite = system.A.everywhere(finite)
    # What was solved for in numbers of about 1 has overflowed in those of the problem.
    report = report._replace(
        status=torch.where(~finite & _is_answer(report.status), float(OUT_OF_RANGE), report.status)
    )
    s, given = r, b
    if system.weights is not None:
        s, given = system.multiplied(r, e), system.multiplied(b, e)
        # The error of r is relative to |W^(1/2) r| in that norm.
        size = system.row_norm(r) * system.A.largest(system.root[:, :, None]) * power_of_two(2 * system.half)
        error = report.residual_error * size / system.A.norm(s).clamp_min(torch.finfo(torch.float64).tiny)
        report = report._replace(weighted_error=error)
    else:
        report = report._replace(weighted_error=report.residual_error)
    if primal is not None:
        report = _judge_derivative(system, report, accept, s, x, given, primal, damp)
    status = report.status
    none = ~finite | (status == RANK_DEFICIENT)
    return report._replace(
        status=status,
        residual_error=torch.where(none, torch.inf, report.residual_error),
        weighted_error=torch.where(none, torch.inf, report.weighted_error),
        solution_error=torch.where(none, torch.inf, report.solution_error),
        condition=torch.where(status == RANK_DEFICIENT, torch.inf, report.condition),
    )


def _judge_derivative(
    system: System,
    report: Report,
    accept: float,
    r: Tensor,
    x: Tensor,
    b: Tensor,
    primal: Tensor,
    damp: Tensor | None,
) -> Report:
    of_A, by_damp, relaxed, error_of_r, error_of_x = primal[:, :5].unbind(1)
    A = system.A
    (r, R), (x, X) = _in_units(r.abs(), A), _in_units(x.abs())
    (of_r, of_R), (of_x, of_X) = _in_units(primal[:, 5 : 5 + system.m], A), _in_units(primal[:, 5 + system.m :])
    error_r, error_x = _in_unit_of(report.weighted_error, r, R, A), _in_unit_of(report.solution_error, x, X)
    error_of_r, error_of_x = _in_unit_of(error_of_r, of_r, of_R, A), _in_unit_of(error_of_x, of_x, of_X)
    # Squares of norms of what each row meets of x and of l_x, and each column of s and of l_s.
    rows_of_x, rows_x = A.stored_matmul(torch.cat([of_x, x], 2).square()).chunk(2, 2)
    columns_of_r, columns_r = A.stored_adjoint(torch.cat([of_r, r], 2).square()).chunk(2, 2)
    first = A.dot(r.square(), rows_of_x).sqrt()  # |l_s x^H| at the stored entries
    second = A.dot(of_r.square(), rows_x).sqrt()
    # The units of the first term and of the second, in units of the larger.
    unit = torch.maximum(R + of_X, of_R + X)
    one, other = torch.exp2(R + of_X - unit), torch.exp2(of_R + X - unit)
    # A gradient that is zero but for rounding is as right as can be.
    zero = torch.exp2((R + of_R - unit - _log(report.norm)).clamp(max=_RANGE)) * A.norm(r) * A.norm(of_r)
    error = one * error_r * _largest(rows_of_x, r, R, A) + other * error_x * _largest(columns_of_r, x, X)
    more = one * error_of_x * _largest(columns_r, of_x, of_X) + other * error_of_r * _largest(rows_x, of_r, of_R, A)
    allowed = accept * torch.maximum(one * first + other * second, accept * zero)
    useful = (relaxed > 0) & (error <= accept * one * first)
    b, B = _in_units(b.abs(), A)
    least = accept * torch.exp2((B - R).clamp(max=_RANGE)) * A.norm(b)
    useful &= error_r <= accept * torch.maximum(A.norm(r), least)
    spoilt = (of_A > 0) & ~(error + more <= allowed)
    status = torch.where(useful & (report.status == INACCURATE), float(CONVERGED), report.status)
    status = torch.where(spoilt & (status == CONVERGED), float(SPOILT), status)
    columns = _log(torch.tensor(float(r.shape[2]), device=r.device))
    beyond = (of_A > 0) & (unit + _log(one * first + other * second) + columns >= _RANGE)
    if damp is not None:  # 2 d <l_x, x>
        size = _log(torch.where(damp.isinf(), 0.0, damp).amax(1))[:, None] + X + of_X + _log(norm(x) * norm(of_x))
        beyond |= (by_damp > 0) & (size + columns + 1 >= _RANGE)
    return report._replace(status=torch.where(beyond & (status == CONVERGED), float(OUT_OF_RANGE), status))


def _largest(squares: Tensor, beside: Tensor, unit: Tensor, rows: Products | None = None) -> Tensor:
    """What an error of norm 1 in `beside` is multiplied by at most: what is zero there has none.

    Not where it may be zero because it was too small for a number.
    """
    counted = torch.where((beside != 0) | (unit < _TINY)[:, None], squares, 0.0)
    return (counted.amax(1) if rows is None else rows.largest(counted)).sqrt()


def _in_units(size: Tensor, rows: Products | None = None) -> tuple[Tensor, Tensor]:
    """(columns in units of their largest entry, the logarithms of these units (P, k)) of sizes (P, rows, k).

    `rows` is A, of what has its rows, which may lie in several places; here and below.
    """
    largest = size.amax(1) if rows is None else rows.largest(size)
    return size / torch.where(largest > 0, largest, 1.0)[:, None], _log(largest).clamp_min(_SMALLEST)


def _log(size: Tensor) -> Tensor:
    return torch.where(size > 0, torch.log2(size), _LEAST)


def _in_unit_of(error: Tensor, size: Tensor, unit: Tensor, rows: Products | None = None) -> Tensor:
    """The error in the unit of `_in_units`, from the relative one of what has this size.

    What is smaller than any number has been rounded to zero, which `judge_range` notes, or to one of few digits.
    """
    whole, smallest = (norm(size), size.shape[1] ** 0.5) if rows is None else (rows.norm(size), rows.height**0.5)
    return torch.where(whole > 0, error * whole + smallest * torch.exp2(_SMALLEST - unit), (error >= 0.5) * smallest)


def describe_primal(
    s: Tensor,
    x: Tensor,
    report: Tensor,
    *,
    by_A: bool,
    by_damp: bool,
    relaxed: bool,
) -> Tensor:
    """(P, 5 + m + n, k): what an adjoint solve is to know of the solution (s, x), in one tensor.

    Whether a gradient by A is to be judged (without full rank there is more to it), whether one by damp, whether that
    by A may be accepted for itself, estimated relative errors of s = W r + e and x; |s|, |x|.
    """
    told, s, x = Report.unpacked(report.detach()), s.detach().abs(), x.detach().abs()
    full = told.rank[:, None] >= x.shape[1]
    rows = [(full & by_A).to(x.dtype), *(torch.full_like(x[:, :1], float(flag)) for flag in (by_damp, relaxed))]
    for error in (told.weighted_error, told.solution_error):
        # In double precision, whatever the user's own, whose rounding the estimate includes.
        rows.append((error - told.rounding)[:, None])
    return beside([*rows, s, x], 1)
