"""What is known of a minimum: the report of a descent, what users see of it, and the errors when there is none."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from ..errors import (
    FIT_OF_LEAST_CHANGE,
    LARGER_THRESHOLD,
    ConvergenceError,
    RankDeficientError,
    nearer_start,
    other_start,
)
from ..linear.factor_cache import no_token
from ..result import (
    CONVERGED,
    ITERATION_LIMIT,
    NO_MINIMUM,
    RANK_DEFICIENT,
    STATUSES,
    SolveInfo,
    html_table,
    info_rows,
    of_solve,
    show,
)
from ..torch_func.tracing import concrete


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

    def packed(self) -> Tensor:
        """The report as one tensor (P, fields), which `Minimum` gives."""
        return torch.stack(list(self), 1)

    @classmethod
    def unpacked(cls, numbers: Tensor) -> FitReport:
        """What `packed` made one tensor of."""
        return cls(*numbers.unbind(1))

    @classmethod
    def of_nothing(
        cls, status: Tensor, iterations: Tensor, evaluations: Tensor, x: Tensor
    ) -> tuple[FitReport, Tensor, Tensor]:
        """(report, blur, token) of problems none of which could start from x."""
        unknown = torch.full_like(status, torch.nan)
        report = cls(*[unknown] * len(cls._fields))._replace(
            status=status,
            iterations=iterations,
            evaluations=evaluations,
            forward_error=torch.full_like(unknown, torch.inf),
            rank=torch.zeros_like(unknown),
        )
        return report, torch.zeros_like(x), no_token()


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
        condition: estimate of the 2-norm condition number of the Jacobian with its columns scaled to norm 1.
        cost: half the sum of squares, or the sum of the robust losses.
        scale: of a robust fit, by which its loss divides residuals: as estimated, or given, or 1; NaN of another.
    """

    status_code: Tensor
    iterations: Tensor
    evaluations: Tensor
    optimality: Tensor
    forward_error: Tensor
    condition: Tensor
    cost: Tensor
    scale: Tensor

    @property
    def status(self) -> str:
        """In words; the worst one where there are several problems."""
        return STATUSES[int(concrete(self.status_code).max())]

    def __repr__(self) -> str:
        shown = (f"{name}={show(concrete(getattr(self, name)))}" for name in self._fields[1:])
        return f"FitInfo(status={self.status!r}, {', '.join(shown)})"

    def _repr_html_(self) -> str:
        return html_table("FitInfo", info_rows(self))


class RobustInfo(NamedTuple):
    """What is known of a robust solution of `solve`: all of `SolveInfo`, by the same names, and the scale of residuals.

    Attributes:
        solve: the `SolveInfo` of the fit. `info.status` is `info.solve.status`, and so on.
        scale: 0-d, or (k,) for b (m, k): by which the loss divides residuals, as it was estimated, or given, or 1.
    """

    solve: SolveInfo
    scale: Tensor

    def __getattr__(self, name: str) -> Any:
        return of_solve(self, name)

    def __repr__(self) -> str:
        return f"RobustInfo(scale={show(concrete(self.scale))}, solve={self.solve!r})"

    def _repr_html_(self) -> str:
        return html_table("RobustInfo", [*info_rows(self.solve), ("scale", show(concrete(self.scale)))])


torch_pytree._register_namedtuple(RobustInfo, serialized_type_name="functional_lstsq.RobustInfo")


def scale_of(robust: Any, threshold: Tensor) -> Tensor:
    """By which a loss with this threshold (P,), that of residuals as they are, divides them."""
    given = robust.threshold if robust is not None else torch.nan
    return threshold.detach() / (given.detach() if isinstance(given, Tensor) else given)


def check_fit(
    report: FitReport,
    name: str,
    point: str,
    n: int,
    accept: float,
    advice: list[str],
    *,
    undefined: bool,
    least_norm: bool,
) -> None:
    """Raise what a report of failure calls for.

    Args:
        advice: what may be done where the limit of iterations was reached.
        undefined: second derivatives were NaN or infinite.
        least_norm: steps are those of least change.
    """
    failed = report.status != CONVERGED
    if not bool(failed.any()):
        return
    p = int(failed.nonzero()[0])
    told = FitReport(*(field[p] for field in report))
    many = len(failed)
    where = f" ({int(failed.sum())} of {many} problems failed; the first: number {p})" if many > 1 else ""
    if told.status == RANK_DEFICIENT:
        _refuse_deficient(int(told.rank), name, point, n, where, least_norm=least_norm)
    ended = f"{name} ended after {int(told.iterations)} iterations"
    if told.status == NO_MINIMUM and undefined:
        raise ConvergenceError(
            f"{ended} at a point where products with the Hessian matrix hold NaN or infinity{where}: the residual has "
            "no second derivatives there that torch can take",
            "a residual that is smooth where the minimum may lie, and for every row (torch.where in front of what is "
            "NaN, not behind it)",
            other_start(point),
        )
    if told.status == NO_MINIMUM:
        raise ConvergenceError(
            f"{ended} at a point that is not a strict minimum{where}: along some direction the cost, {told.cost:.3e}, "
            "does not curve upwards",
            nearer_start(point),
            "fewer parameters",
            LARGER_THRESHOLD,
        )
    if told.status == ITERATION_LIMIT:
        raise ConvergenceError(
            f"{ended}, the limit{where}, without a minimum; cost {told.cost:.3e}, optimality {told.optimality:.1e}",
            *advice,
            other_start(point),
            "parameters of sizes of about 1",
        )
    if told.condition.isnan():
        raise ConvergenceError(
            f"{ended} at a point where the Jacobian holds NaN or infinity{where}: the residual has no derivative there",
            other_start(point),
            "a residual that is smooth where the minimum may lie",
        )
    raise ConvergenceError(
        f"{ended} with an estimated forward error of {told.forward_error:.1e}{where}, above what is accepted, "
        f"{accept:.1e}; condition number of the Jacobian about {told.condition:.1e}, optimality "
        f"{told.optimality:.1e}",
        "rescale or remove parameters that do nearly the same",
        other_start(point),
    )


def _refuse_deficient(rank: int, name: str, point: str, n: int, where: str, *, least_norm: bool) -> NoReturn:
    """Raise what a Jacobian without full rank calls for."""
    if least_norm:
        raise RankDeficientError(
            f"{name} came to a point where the Jacobian has rank {rank} of {n}, and the cost changes along "
            f"its null space all the same{where}: that is no gauge, whose derivatives rank_deficient='minimum_norm' "
            "gives",
            "rank_deficient='raise', for which such a minimum may be a strict one",
            other_start(point),
        )
    known = f"rank {rank}" if rank >= 0 else f"rank below {n}"
    cut_off = "; is the residual cut off from them, by detach or item?" if rank == 0 else ""
    raise RankDeficientError(
        f"{name} came to a point where the Jacobian has {known}, not full rank {n}{where}: a minimum there need "
        f"not be the only one nearby{cut_off}",
        *([FIT_OF_LEAST_CHANGE] if name in ("gauss_newton", "the robust fit") else []),
        "remove or fix parameters that do nothing, or nothing of their own",
        other_start(point),
    )


torch.serialization.add_safe_globals([FitInfo])  # torch.load takes it
