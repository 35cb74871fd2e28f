"""What is known of a minimum: the report of a descent, what users see of it, and the errors when there is none."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .errors import ITERATIONS, ConvergenceError, RankDeficientError
from .result import CONVERGED, ITERATION_LIMIT, NO_MINIMUM, RANK_DEFICIENT, STATUSES, show
from .transforms import concrete


class FitReport(NamedTuple):
    """What is known of a minimum; every field has shape (P,), in double precision."""

    status: Tensor
    iterations: Tensor
    evaluations: Tensor
    optimality: Tensor
    forward_error: Tensor
    condition: Tensor
    rank: Tensor
    norm: Tensor
    cost: Tensor


class FitInfo(NamedTuple):
    """What is known of a minimum, by `gauss_newton` or `variable_projection`; numbers are 0-d tensors.

    Attributes:
        status_code: 0 for success; `status` says it in words.
        iterations: damped Gauss-Newton steps that were tried.
        evaluations: of the residual, of its Jacobian, of the gradient, and products with the Hessian matrix, together.
        optimality: |J^T psi| / (|J| |psi|), columns scaled to norm 1. Necessary, not sufficient.
        forward_error: estimate of |x - x_exact| / |x_exact|, for unknowns as they are or scaled by the norms of the
            Jacobian's columns, whichever is larger: Newton's last step, and what rounding may do. This decides whether
            a minimum is accepted.
        condition: estimate of the 2-norm condition number of the Jacobian with its columns scaled to norm about 1.
        cost: half the sum of squares, or the sum of the robust losses.
    """

    status_code: Tensor
    iterations: Tensor
    evaluations: Tensor
    optimality: Tensor
    forward_error: Tensor
    condition: Tensor
    cost: Tensor

    @property
    def status(self) -> str:
        """In words; the worst one where there are several problems."""
        return STATUSES[int(concrete(self.status_code).max())]

    def __repr__(self) -> str:
        shown = (f"{name}={show(concrete(getattr(self, name)))}" for name in self._fields[1:])
        return f"FitInfo(status={self.status!r}, {', '.join(shown)})"


def check_fit(report: FitReport, name: str, point: str, n: int, accept: float, *, can_go_on: bool) -> None:
    """Raise what a report of failure calls for; `can_go_on`: the limit of iterations is the caller's own."""
    failed = report.status != CONVERGED
    if not bool(failed.any()):
        return
    p = int(failed.nonzero()[0])
    told = FitReport(*(field[p] for field in report))
    many = len(failed)
    where = f" ({int(failed.sum())} of {many} problems failed; the first: number {p})" if many > 1 else ""
    if told.status == RANK_DEFICIENT:
        known = f"rank {int(told.rank)}" if int(told.rank) >= 0 else f"rank below {n}"
        cut_off = "; is the residual cut off from them, by detach or item?" if int(told.rank) == 0 else ""
        raise RankDeficientError(
            f"{name} came to a point where the Jacobian has {known}, not full rank {n}{where}: a minimum there need "
            f"not be the only one nearby{cut_off}",
            "remove or fix parameters that do nothing, or nothing of their own",
            f"another {point}",
        )
    ended = f"{name} ended after {int(told.iterations)} iterations"
    if told.status == NO_MINIMUM:
        raise ConvergenceError(
            f"{ended} at a point that is not a strict minimum{where}: along some direction the cost, {told.cost:.3e}, "
            "does not curve upwards",
            f"another {point}, nearer to a minimum",
            "fewer parameters",
            "a larger threshold of a robust loss",
        )
    if told.status == ITERATION_LIMIT:
        raise ConvergenceError(
            f"{ended}, the limit{where}, without a minimum; cost {told.cost:.3e}, optimality {told.optimality:.1e}",
            *([ITERATIONS] if can_go_on else []),
            f"another {point}",
            "parameters of sizes of about 1",
        )
    if told.condition.isnan():
        raise ConvergenceError(
            f"{ended} at a point where the Jacobian holds NaN or infinity{where}: the residual has no derivative there",
            f"another {point}",
            "a residual that is smooth where the minimum may lie",
        )
    raise ConvergenceError(
        f"{ended} with an estimated forward error of {told.forward_error:.1e}{where}, above what is accepted, "
        f"{accept:.1e}; condition number of the Jacobian about {told.condition:.1e}, optimality "
        f"{told.optimality:.1e}",
        "rescale or remove parameters that do nearly the same",
        f"another {point}",
    )
