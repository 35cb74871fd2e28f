"""What the kernel refuses: numbers and patterns before it solves, solutions that failed afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import (
    BY_FACTOR,
    DAMP,
    DOUBLE,
    EXTENDED,
    ITERATIONS,
    LEAST_NORM,
    LEAST_NORM_BY_FACTOR,
    SCALE,
    SCALE_ROWS,
    SEE,
    ConvergenceError,
    RankDeficientError,
)
from ..result import (
    CONVERGED,
    ITERATION_LIMIT,
    OUT_OF_RANGE,
    RANK_DEFICIENT,
    SPOILT,
    STATUSES,
    STOPPED,
    Report,
    method_of,
    tried_of,
)
from ..solvers import CGLS
from ..solvers.sparse_factor import full_matching
from ..solvers.system import System
from ..sparse.pattern import SparsePattern
from ..torch_func.tracing import concrete, is_traced
from .settings import Settings

_UNEVEN = 1e8  # ratio of the sizes of rows
# What functions other than `lstsq` and `solve` do not take, and hence are not to be told to try.
_NOT_TAKEN = {
    "lstsq": set(),
    "bounds": {LEAST_NORM, LEAST_NORM_BY_FACTOR},
    "study": {DAMP, EXTENDED, SEE},
    "factorize": {EXTENDED, SEE},
}


def _advised(wanted: Settings, *advice: str) -> list[str]:
    """Those that what was called can take."""
    return [said for said in advice if said not in _NOT_TAKEN[wanted.of]]


def require_matching(pattern: SparsePattern, wanted: Settings) -> None:
    """Refuse a pattern for which no values have full rank."""
    n, wide = pattern.shape[1], wanted.wide
    rank, unmatched = pattern.keep("matching", lambda: full_matching(pattern))
    if unmatched >= 0:
        what, other = ("row", "column") if wide else ("column", "row")
        raise RankDeficientError(
            f"A has structural rank {rank}, not full rank {n}: its pattern allows no full rank, whatever the values; "
            f"{what} {unmatched} for one is empty or shares too few {other}s with others",
            *_advised(wanted, LEAST_NORM_BY_FACTOR if isinstance(wanted.solver, CGLS) else LEAST_NORM, DAMP),
            f"remove such {what}s",
            columns=[unmatched],
        )


def has_uneven_rows(system: System, p: int) -> bool:
    """Whether a square matrix has rows of sizes so different that it may have full rank once they are scaled."""
    A = system.A
    if A.height != system.n:
        return False
    sizes = A.values[p].abs()
    rows = sizes.new_zeros(system.m).scatter_reduce(0, A.pattern.indices[0], sizes, "amax")[:, None]
    largest, least = A.largest(torch.stack([rows, 1 / rows]))[:, 0].tolist()
    return bool(math.isfinite(least) and largest * least > _UNEVEN)


def _named(columns: Sequence[int], wide: bool) -> str:
    """Which columns are dependent, as a part of an error message."""
    what, which = "row" if wide else "column", ", ".join(map(str, sorted(columns)))
    if len(columns) == 1:
        return f"; {what} {which} takes part in a dependence"
    return f"; {what}s {which} take part in a dependence" if columns else ""


def require_finite(derivative: bool, **numbers: tuple[Tensor | None, ...]) -> None:
    """Refuse NaN and infinity in what the system is made of and in its right-hand sides."""
    for name, tensor in [(name, tensor) for name, tensors in numbers.items() for tensor in tensors]:
        # A sum needs no temporary; of large finite numbers it may still overflow.
        if tensor is None or bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all()):
            continue
        if derivative and name in ("b", "c"):
            raise ValueError(
                "what came in for a derivative holds NaN or infinity: the cotangent of the solution, from the loss, or "
                "a tangent of A, b, damp or weights; look at the loss, at sqrt or log of 0 for one"
            )
        raise ValueError(f"{name} of the augmented system holds NaN or infinity (or its derivative does)")


def require_not_negative(**numbers: Tensor | None) -> None:
    """Refuse what is negative, or NaN."""
    for name, tensor in numbers.items():
        if tensor is not None and bool((~(tensor >= 0)).any()):
            what = "be NaN" if bool(tensor.isnan().any()) else f"be negative, got {float(tensor.min()):g}"
            raise ValueError(f"{name} must not {what}")


def refuse_derivative(wanted: Settings) -> None:
    """Refuse the derivative of an iterate that is not the solution: no linear system defines it."""
    raise ConvergenceError(
        f"what CGLS(steps={wanted.solver.steps}) stopped at, short of the solution, has no derivative here",
        "solver=None for that of the solution, with damp to regularise it",
        "x.detach()",
    )


def require_solved(
    report: Report,
    full: int,
    accept: float,
    wanted: Settings,
    *,
    by_products: bool,
    forward: bool,
    damped: bool,
    dependent: Callable[[int], Sequence[int]],
    uneven: Callable[[int], bool],
) -> None:
    """Raise what a report of failure calls for; one host synchronisation when all is well.

    Args:
        by_products: A is known by its products only.
        forward: x was solved for, no derivative of it.
        damped: there is a damping.
        dependent: which columns of matrix p of the batch take part in a dependence, if that is known.
        uneven: whether matrix p is square with rows of very different sizes.
    """
    failed = (report.status != CONVERGED) & (report.status != STOPPED)
    if not bool(failed.any()):
        return
    p, column = (int(i) for i in failed.nonzero()[0])
    figures = {name: float(getattr(report, name)[p, column]) for name in Report._fields}
    matrices, columns = failed.shape
    where = ""
    if matrices * columns > 1:
        which = f"column {column}" if matrices == 1 else f"matrix {p} of the batch, column {column}"
        where = f" ({int(failed.sum())} of {matrices * columns} right-hand sides failed; the first: {which})"
    method, status = method_of(int(figures["method"])), int(figures["status"])
    what, errors = "rows" if wanted.wide else "columns", (figures["residual_error"], figures["solution_error"])
    if status == RANK_DEFICIENT:
        by = BY_FACTOR if wanted.minimum_norm and not by_products else LEAST_NORM
        by = LEAST_NORM_BY_FACTOR if by == LEAST_NORM and method == "cgls" and not by_products else by
        first = [*([SCALE_ROWS] if uneven(p) else []), by]
        known = f"rank {int(figures['rank'])}" if figures["rank"] >= 0 else f"rank below {full}"
        involved = dependent(p)
        raise RankDeficientError(
            f"A (with its weights) has {known}, not full rank {full}, by method {method}{where}: the solution is not "
            f"unique{_named(involved, wanted.wide)}",
            *_advised(wanted, *first, *([] if damped else [DAMP])),
            f"remove the dependent {what}",
            columns=involved,
        )
    if status == SPOILT:
        # Extended precision takes away neither the rounding of results nor that of weighted values.
        able = wanted.exact and not wanted.extended and max(errors) > 2 * figures["rounding"]
        raise ConvergenceError(
            f"method {method} solved for the gradient by A{where}, but that gradient is so small beside the solution "
            f"and its adjoint that their errors may spoil it (condition number about {figures['condition']:.1e})",
            *_advised(wanted, *([EXTENDED] if able else [])),
            SCALE,
        )
    if status == OUT_OF_RANGE:
        of = "x" if forward else "a derivative of x"
        single = wanted.precision > 1e-10 and forward
        raise ConvergenceError(
            f"method {method} solved for {of}{where}, whose numbers leave the range of "
            f"{'single' if single else 'double'} precision",
            SCALE,
            *([DOUBLE] if single else []),
        )
    found = [
        f"estimated forward error {max(errors):.1e} is above what is accepted, {accept:.1e}"
        if all(map(math.isfinite, errors))
        else "the forward error could not be estimated"
    ]
    reached = math.isfinite(figures["optimality"])  # else nothing was solved
    bound = status == ITERATION_LIMIT and not reached
    found.append(f"condition number {'at least' if bound else 'about'} {figures['condition']:.1e}")
    if reached:
        found.append(f"optimality {figures['optimality']:.1e}")
    raise ConvergenceError(
        f"method {method} ended after {int(figures['iterations'])} iterations with status '{STATUSES[status]}'{where}: "
        f"{'; '.join(found)}; tried: {tried_of(int(figures['tried']), int(figures['method']))}",
        ITERATIONS if status == ITERATION_LIMIT else f"rescale or remove nearly dependent {what}",
        *_advised(wanted, SCALE if damped else DAMP, *([SEE] if reached else [])),
    )


def product_in_range(name: str, numbers: Tensor, root: Tensor) -> Tensor:
    """Their product, refused where it overflows or becomes so small that it loses digits."""
    product = root * numbers
    smallest = torch.finfo(torch.float64).smallest_normal
    lost = (product.abs() < smallest) & (product.abs() < numbers.abs()) & (root != 0)
    require_in_range(f"the product of {name} with the square roots of weights", product, lost)
    return product


def require_in_range(name: str, result: Tensor, lost: Tensor | None = None) -> None:
    """Refuse what overflows, or has `lost` digits below the smallest numbers."""
    if is_traced(result):
        return
    if not bool(concrete(result).isfinite().all()) or (lost is not None and bool(concrete(lost).any())):
        raise ConvergenceError(f"{name} leaves the range of double precision", SCALE)
