"""What a solve gives back: the solution, what is known of it, and the errors when there is none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from .errors import (
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
from .transforms import concrete

CONVERGED, ZERO, INACCURATE, ITERATION_LIMIT, RANK_DEFICIENT, SPOILT, NO_MINIMUM, OUT_OF_RANGE = range(8)
STATUSES = (
    "converged",
    "zero but for rounding",
    "inaccurate",
    "iteration limit reached",
    "rank deficient",
    "gradient inaccurate",
    "not a strict minimum",
    "out of range",
)
_methods: list[str] = []
derivative_errors: dict[int, float] = {}  # by ticket, of the last thousand solves that were differentiated


def remember_derivative(ticket: int, error: float) -> None:
    """Note the estimated error of a further solve for a derivative of the solve `ticket`."""
    derivative_errors.pop(ticket, None)
    derivative_errors[ticket] = error
    if len(derivative_errors) > 1000:
        del derivative_errors[next(iter(derivative_errors))]


class Report(NamedTuple):
    """What a solver says of its answer to K (r, x) = (b, c); every field has shape (P, k), in double precision."""

    status: Tensor
    method: Tensor
    iterations: Tensor
    optimality: Tensor
    residual_error: Tensor
    solution_error: Tensor
    condition: Tensor
    rank: Tensor
    norm: Tensor
    tried: Tensor
    ticket: Tensor
    rounding: Tensor  # part of the errors that is the rounding of results to the user's precision


def method_code(name: str) -> int:
    """The number that stands for a method in a report, which must be a tensor to pass through vmap."""
    if name not in _methods:
        _methods.append(name)
    return _methods.index(name)


class SolveInfo(NamedTuple):
    """What is known of a solution. Numbers are 0-d tensors for b of shape (m,), of shape (k,) for b (m, k).

    A NamedTuple, hence a pytree of tensors: it passes through `has_aux`, `vmap` and the like.

    Attributes:
        status_code: 0 for success, 1 for an x that is zero but for rounding (see `lstsq`); `status` says it in words.
        method_code: which method answered; `method` gives its name.
        iterations: iterations of conjugate gradients, of all refinements together.
        optimality: |A^H r - damp^2 x| / (|A| |r|), columns scaled to norm about 1. Necessary, not sufficient. NaN where
            `CGLS` failed before it solved anything. Of robust fits (method "IRLS") with the weights of the last step,
            as condition and norm are.
        forward_error: estimate of |x - x_exact| / |x_exact| in the 2-norm; this is what a solve is accepted by, except
            where x is zero but for rounding. Infinite there, and where there is no estimate.
        condition: estimate of the 2-norm condition number of A with its columns scaled to norm about 1
            (of its rows where A is wide). Infinite without full rank; with rank_deficient="minimum_norm" the largest
            singular value over the smallest that is not zero. A lower bound where `CGLS` ran out of iterations.
        rank: numerical rank of A (of A with its damping).
        norm: Frobenius norm of A (of [A; damp I]), weights included.
        tried_code: which methods were tried in turn, and why; `tried` says it in words.
        ticket: number of the solve, by which `adjoint_error` finds what became of its derivatives.
    """

    status_code: Tensor
    method_code: Tensor
    iterations: Tensor
    optimality: Tensor
    forward_error: Tensor
    condition: Tensor
    rank: Tensor
    norm: Tensor
    tried_code: Tensor
    ticket: Tensor

    @property
    def status(self) -> str:
        """In words; the worst one where there are several columns."""
        codes = concrete(self.status_code)
        return STATUSES[int(codes.max())] if codes.numel() else STATUSES[CONVERGED]

    @property
    def method(self) -> str:
        """Name of the method that answered, or of the several that did."""
        return ", ".join(sorted(_methods[code] for code in concrete(self.method_code).unique().tolist()))

    @property
    def tried(self) -> str:
        """The methods that were tried, in that order, each with the reason and with how it ended if it failed."""
        return "; ".join(_methods[code] for code in concrete(self.tried_code).unique().tolist())

    @property
    def adjoint_error(self) -> float:
        """Estimated relative forward error of the last further solve with these factors, for a VJP or a JVP.

        NaN before there is one; the worst of its columns. Only the last thousand solves of a process are remembered.
        """
        ticket = concrete(self.ticket)
        return derivative_errors.get(int(ticket.max()), float("nan")) if ticket.numel() else float("nan")

    def __reduce__(self):
        codes = torch.cat([concrete(code).reshape(-1) for code in (self.method_code, self.tried_code)]).unique()
        return _restore, (tuple(self), {code: _methods[code] for code in codes.tolist()})

    def __repr__(self) -> str:
        numbers = {name: getattr(self, name) for name in self._fields[2:8]}
        shown = (f"{name}={show(concrete(value))}" for name, value in numbers.items())
        return (
            f"SolveInfo(status={self.status!r}, method={self.method!r}, {', '.join(shown)}, tried={self.tried!r}, "
            f"adjoint_error={self.adjoint_error:.2g})"
        )


def _restore(numbers: tuple[Tensor, ...], names: dict[int, str]) -> SolveInfo:
    """What was pickled, by another process maybe, where other codes stand for the names."""
    info = SolveInfo(*numbers)
    here = {code: method_code(name) for code, name in names.items()}

    def translated(codes: Tensor) -> Tensor:
        return torch.tensor([here[code] for code in codes.reshape(-1).tolist()], device=codes.device).view(codes.shape)

    return info._replace(
        method_code=translated(info.method_code),
        tried_code=translated(info.tried_code),
        ticket=torch.zeros_like(info.ticket),
    )


def show(tensor: Tensor) -> str:
    """Numbers in a few words."""
    if tensor.ndim == 0:
        return f"{tensor.item():.2g}" if tensor.is_floating_point() else str(tensor.item())
    return str(tensor.tolist()) if tensor.numel() <= 4 else f"<{tuple(tensor.shape)}>"


class Solution(NamedTuple):
    """x, the residual, and `info`; a NamedTuple, hence a pytree. The residual of `solve` is b - A x."""

    x: Tensor
    residual: Tensor
    info: Any


for _kind in (SolveInfo, Solution):  # for torch.export
    torch_pytree._register_namedtuple(_kind, serialized_type_name=f"functional_lstsq.{_kind.__name__}")


def check(
    report: Report,
    full: int,
    accept: float,
    wanted: Any,
    by_products: bool,
    forward: bool,
    damped: bool,
    dependent: Callable[[int], str],
    uneven: Callable[[int], bool],
) -> None:
    """Raise what a report of failure calls for; one host synchronisation when all is well.

    Args:
        wanted: the `Settings` of the solve.
        by_products: A is known by its products only.
        forward: x was solved for, no derivative of it.
        damped: there is a damping.
        dependent: which columns of matrix p of the batch take part in a dependence, if that is known.
        uneven: whether matrix p is square with rows of very different sizes.
    """
    failed = report.status != CONVERGED
    if not bool(failed.any()):
        return
    p, column = (int(i) for i in failed.nonzero()[0])
    figures = {name: float(getattr(report, name)[p, column]) for name in Report._fields}
    matrices, columns = failed.shape
    where = ""
    if matrices * columns > 1:
        which = f"column {column}" if matrices == 1 else f"matrix {p} of the batch, column {column}"
        where = f" ({int(failed.sum())} of {matrices * columns} right-hand sides failed; the first: {which})"
    method, status = _methods[int(figures["method"])], int(figures["status"])
    what, errors = "rows" if wanted.wide else "columns", (figures["residual_error"], figures["solution_error"])
    if status == RANK_DEFICIENT:
        known = f"rank {int(figures['rank'])}" if figures["rank"] >= 0 else f"rank below {full}"
        first = [LEAST_NORM_BY_FACTOR if method == "cgls" else LEAST_NORM]
        if by_products:
            first = []  # which allow none of least norm
        elif wanted.minimum_norm:
            first = [BY_FACTOR]
        if uneven(p):
            first = [SCALE_ROWS, *first]
        raise RankDeficientError(
            f"A (with its weights) has {known}, not full rank {full}, by method {method}{where}: the solution is not "
            f"unique{dependent(p)}",
            *first,
            *([] if damped else [DAMP]),
            f"remove the dependent {what}",
        )
    if status == SPOILT:
        # Extended precision takes away neither the rounding of results nor that of weighted values.
        able = wanted.exact and not wanted.extended and max(errors) > 2 * figures["rounding"]
        raise ConvergenceError(
            f"method {method} solved for the gradient by A{where}, but that gradient is so small beside the solution "
            f"and its adjoint that their errors may spoil it (condition number about {figures['condition']:.1e})",
            *([EXTENDED] if able else []),
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
        f"{'; '.join(found)}; tried: {_methods[int(figures['tried'])]}",
        ITERATIONS if status == ITERATION_LIMIT else f"rescale or remove nearly dependent {what}",
        SCALE if damped else DAMP,
        *([SEE] if reached else []),
    )
