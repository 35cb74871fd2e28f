"""A fit as it is asked for: checked, posed as an objective with all that it depends on, and followed to its minimum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..linear.bounds import BoundedInfo
from ..linear.settings import Settings, check_solver
from ..solvers.system import EPS
from ..sparse.precision import double
from ..torch_func.closures import close
from ..torch_func.tracing import load_forward_mode
from .arguments import (
    bounds_of,
    check_asked,
    check_sizes,
    check_tensors,
    closed_residual,
    taken_apart,
    weights_of,
)
from .bounded import OnSet, within_bounds
from .jacobian import slopes_of
from .losses import loss_of
from .objective import Leaves, Objective
from .report import FitInfo, FitReport, scale_of
from .rows import Rows
from .scale import minimum_with_scale

_STEPS = 2000  # which no default exceeds, however many the unknowns


class Reached(NamedTuple):
    """Where a fit ended, x (n,), in double precision; `objective` is that on the set of unknowns at bounds, if any."""

    objective: Objective
    x: Tensor
    leaves: Leaves
    blur: Tensor
    token: Tensor
    within: OnSet | None
    info: Any  # `FitInfo`, with bounds a `BoundedInfo`


class Posed(NamedTuple):
    """A fit, checked, in double precision: from `start` (n,), within the limits (n,) if there are any."""

    objective: Objective
    start: Tensor
    leaves: Leaves
    limits: tuple[Tensor, Tensor] | None
    robust: Any
    dtype: torch.dtype  # of the results
    args: tuple

    def descend(self) -> Reached:
        """Its minimum."""
        every, begin, within = tuple(leaf[None] for leaf in self.leaves), self.start[None], None
        if self.limits is not None:
            lower, upper = self.limits
            within = within_bounds(self.objective, begin, (lower[None], upper[None]), every)
            begin, every = within.start, within.leaves
        asked, scale = self.objective if within is None else within.objective, getattr(self.robust, "scale", None)
        x, numbers, blur, token, threshold = minimum_with_scale(asked, scale, begin, *every)
        leaves = (threshold[0], *(leaf[0] for leaf in every[1:]))
        x = (x if within is None else within.finished(x))[0]
        return Reached(asked, x, leaves, blur, token, within, _told(numbers, scale_of(self.robust, threshold), within))


def pose(
    residual: Any,
    x0: Any,
    args: Any,
    jacobian: Any,
    robust: Any,
    solver: Any,
    max_iterations: Any,
    throw: bool,
    name: str,
    of_start: str,
    of_function: str,
    weights: Any = None,
    sigma: Any = None,
    bounds: Any = None,
    callback: Any = None,
    nested: bool = False,
    further: Callable[..., Tensor] | None = None,
    minimum_norm: bool = False,
    tolerance: float | None = None,
    rows: Rows | None = None,
) -> Posed:
    """Check every argument, under the names that the caller gives.

    Args:
        weights, sigma, bounds: as `gauss_newton` has them, at most one of the first two.
        callback, nested, further: as `Objective` has them; further(x, *args) -> (j,).
        minimum_norm, tolerance: as of `Settings`.
        rows: where the residuals are, if not all of them are here; then their number is left to the caller to check.
    """
    check_asked(residual, x0, args, jacobian, max_iterations, name, of_start)
    check_solver(solver, name)
    loss, threshold = loss_of(robust, x0.device)
    tensors, rebuild = taken_apart(args)
    check_tensors(x0, of_start, tensors)
    load_forward_mode()
    on_failure = "raise" if throw else "nan"
    start = x0.detach().to(torch.float64)
    doubled = [double(tensor, "the derivative by args", on_failure) for tensor in tensors]
    function, r = closed_residual(lambda x, *t: residual(x, *rebuild(t)), of_function, of_start, start, doubled)
    n, what = x0.shape[0], of_function if of_function == "residual" else f"the residual of {of_function}({of_start})"
    m = r.shape[0]
    limits = None if bounds is None else bounds_of(bounds, x0, on_failure)
    if rows is None:
        check_sizes(m, n, limits is not None, minimum_norm, robust, of_start)
    weights = weights_of(weights, sigma, m, x0, on_failure)
    is_double = any(tensor.dtype == torch.float64 for tensor in tensors)
    dtype, arithmetic = torch.float64 if is_double else x0.dtype, max(torch.finfo(r.dtype).eps, EPS)
    in_double, pull = _with_transpose(function, rows or Rows())
    closed, found_inside = None, 0
    if further is not None:
        closed, others = close(lambda x, *t: further(x, *rebuild(t)), of_function, "args", start, *doubled)
        found_inside = others.numel()
    pattern, values = slopes_of(in_double, jacobian, rebuild, m, n, x0, doubled)
    objective = Objective(
        residual=in_double,
        pull=pull,
        jacobian=values,
        pattern=pattern,
        loss=loss,
        settings=Settings(solver, minimum_norm, precision=arithmetic, exact=False, tolerance=tolerance),
        precision=torch.finfo(dtype).eps,
        arithmetic=arithmetic,
        max_iterations=min(100 * (n + 1), _STEPS) if max_iterations is None else max_iterations,
        again=max_iterations is None,
        on_failure=on_failure,
        linear=False,
        name=name,
        start=f"{what} must be finite at {of_start}",
        point=of_start,
        further=closed,
        callback=callback,
        nested=nested,
        found_inside=found_inside,
        whole=jacobian is None and further is None and rows is None,
        rows=rows or Rows(),
    )
    leaves = (threshold, torch.zeros_like(threshold), weights, *doubled)
    return Posed(objective, start, leaves, limits, robust, dtype, rebuild(doubled))


def _with_transpose(function: Callable[..., Tensor], rows: Rows) -> tuple[Callable[..., Tensor], Callable[..., Any]]:
    """`function` in double precision, and (x, *given) -> (its result, y -> J^T y, summed over all rows)."""

    def in_double(x: Tensor, *given: Tensor) -> Tensor:
        return rows.linked(function(rows.shared(x), *given).to(torch.float64), (x, *given))

    def pull(x: Tensor, *given: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        r, pulled = torch.func.vjp(lambda x: in_double(x, *given), x)  # type: ignore[misc]
        return r, lambda y: pulled(y)[0]

    return in_double, pull


def _told(numbers: Tensor, scale: Tensor, within: OnSet | None) -> Any:
    """What users are told, of the numbers (1, fields) of a `FitReport` and a scale (1,)."""
    report = FitReport(*(field[0] for field in FitReport.unpacked(numbers)))
    info: Any = FitInfo(
        status_code=report.status.to(torch.int64),
        iterations=report.iterations.to(torch.int64),
        evaluations=report.evaluations.to(torch.int64),
        optimality=report.optimality,
        forward_error=report.forward_error,
        condition=report.condition,
        cost=report.cost,
        scale=scale[0],
    )
    if within is None:
        return info
    found = within.found
    info = info._replace(iterations=info.iterations + found.iterations[0].to(torch.int64))
    return BoundedInfo(info, found.active[0].to(torch.int64), found.multipliers[0], found.weak[0] != 0)
