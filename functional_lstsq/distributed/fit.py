"""Nonlinear least squares over ranks: each has some of the residuals; x and all decisions are the same on all ranks.

    f(x) = sum over ranks of sum_i weights_i r_i(x)^2 / 2        g = grad f        H = grad^2 f

It is the fit of `fits`, by its primitives and their rules, whose rows are those of all ranks (fit_rows). args and
weights may differ from rank to rank, and have derivatives of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..fits.arguments import check_sizes
from ..fits.posing import Posed, pose
from ..linear.arguments import check_rank
from ..solvers.watching import Step, watchable
from ..sparse.matrix import SparseMatrix
from ..sparse.pattern import SparsePattern
from ..sparse.precision import convert
from ..torch_func.tracing import concrete, fit_beside_graph, load_forward_mode
from .fit_rows import FitRows
from .matrix import ShardedMatrix
from .ranks import Ranks, digest
from .solve import refuse


class ShardedFit(NamedTuple):
    """What `gauss_newton` over ranks gives: x (n,), the same on all ranks; this rank's residual (m_r,); what is known.

    `info` is a `FitInfo`, or with bounds a `BoundedInfo`, the same on all ranks too.
    """

    x: Tensor
    residual: Tensor
    info: Any


@watchable
@fit_beside_graph
def gauss_newton(
    residual: Callable[..., Tensor],
    x0: Tensor,
    args: tuple = (),
    *,
    jacobian: SparsePattern | Callable[..., SparseMatrix] | None = None,
    weights: Tensor | None = None,
    sigma: Tensor | None = None,
    bounds: tuple[Any, Any] | None = None,
    robust: Any = None,
    solver: Any = None,
    rank_deficient: str = "raise",
    rank_tolerance: float | None = None,
    group: Any = None,
    max_iterations: int | None = None,
    throw: bool = True,
    progress: bool | Callable[[Step], object] = False,
) -> ShardedFit:
    """A minimum of the sum of squares of the residuals of all ranks, differentiable to any order by args and weights.

    Every rank calls it, with the same x0 and settings, and a residual of its own rows. It is `gauss_newton` of all
    rows, by the same steps, and composes with torch.func as that does; what is in args and is the same on all ranks
    goes through `shared`, and so does x where it enters a part of the loss that `total` sums up.

    Args:
        residual: residual(x, *args) -> (m_r,) for x (n,), twice differentiable by torch.func; m_r may be 0.
        x0: (n,) float32 or float64, where the search starts.
        args: a tuple of what the residual depends on besides x, pytrees of tensors; derivatives are taken by these.
        jacobian: the `SparsePattern` (m_r, n) of this rank's rows of the Jacobian, or jacobian(x, *args) ->
            SparseMatrix of these, always on one pattern; None forms all m_r n entries.
        weights, sigma: (m_r,), of this rank's residuals, as `gauss_newton` has them.
        bounds: (lower, upper), as `gauss_newton` has them, the same on all ranks.
        robust: a loss, the same on all ranks, with a threshold and a scale that are numbers: an estimated scale, as
            that of `Huber()`, is not to be had.
        solver: `Auto()`, `Dense()`, `Direct()` or `CGLS()`, for the steps and the derivatives.
        rank_deficient, rank_tolerance, max_iterations, throw, progress: as `gauss_newton` has them; "minimum_norm"
            takes a dense factor, so not `CGLS()`, nor more than 500 unknowns by `Auto()`.
        group: of torch.distributed; None for all ranks.

    Returns:
        `ShardedFit(x, residual, info)`. Of pytrees, `callback` and what a `Fit` says of its unknowns there is none.

    Raises:
        TypeError, ValueError: on every rank, where an argument on any rank is none.
        RankDeficientError, ConvergenceError: on every rank, as `gauss_newton` raises them.
        RankError: a rank was lost.

    Cost: for each step this rank's rows of the Jacobian, and a solve over ranks, with the sums that `shard_rows` tells
    of; for each product with the Hessian matrix, of which Newton's steps and each derivative take some, one all-reduce
    of n numbers. Memory: the entries of this rank's rows, and what a solve takes: n^2 up to 500 unknowns.

    >>> import torch, functional_lstsq as fl
    >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    >>> t = torch.linspace(0, 1, 5, dtype=torch.float64)
    >>> y = 2 * torch.exp(-3 * t)
    >>> fit = fl.distributed.gauss_newton(lambda x, y: x[0] * torch.exp(-x[1] * t) - y, torch.ones(2), (y,))
    >>> fit.x
    tensor([2., 3.], dtype=torch.float64)
    >>> torch.distributed.destroy_process_group()
    """
    ranks = Ranks.of(group)
    device = x0.device if isinstance(x0, Tensor) else torch.device("cpu")
    rows, least_norm = FitRows(ranks), rank_deficient == "minimum_norm"
    load_forward_mode()

    def checked() -> tuple[Posed, dict[str, object]]:
        check_rank(rank_deficient, rank_tolerance)
        if weights is not None and sigma is not None:
            raise TypeError("sigma must be None beside weights, which are 1 / sigma^2, got both")
        if isinstance(getattr(robust, "scale", None), str):
            raise ValueError(f"scale of robust must be a number over ranks, got {robust!r}")
        posed = pose(
            residual, x0, args, jacobian, robust, solver, max_iterations, throw, "gauss_newton", "x0", "residual",
            weights, sigma, bounds, minimum_norm=least_norm, tolerance=rank_tolerance, rows=rows,
        )  # fmt: skip
        pattern = posed.objective.pattern
        like = SparseMatrix(posed.start.new_empty(pattern.nnz), pattern)
        refuse(ShardedMatrix(like, ranks, pattern.shape[1]), None, None, solver, rank_deficient, None)
        return posed, _facts(posed)

    posed = ranks.checked(checked, device)
    m, n = posed.objective.pattern.shape
    rows.whole = int(ranks.sum(torch.tensor([m], device=device)))
    check_sizes(rows.whole, n, bounds is not None, least_norm, robust, "x0", " on all ranks")
    reached, how = posed.descend(), "raise" if throw else "nan"
    r = posed.objective.residual(reached.x, *posed.leaves[3:])
    x = convert(reached.x, posed.dtype, "the derivative of x", how)
    return ShardedFit(x, convert(r, posed.dtype, "the derivative of the residual", how), reached.info)


def _facts(posed: Posed) -> dict[str, object]:
    """What must be the same on all ranks."""
    objective, loss = posed.objective, posed.objective.loss
    numbers = {"x0": posed.start, "the threshold of robust": posed.leaves[0]}
    if posed.limits is not None:
        numbers |= dict(zip(("the lower bound", "the upper bound"), posed.limits, strict=True))
    return {
        "the size of x0": len(posed.start),
        "the dtype of the minimum": posed.dtype,
        "the dtype of the residual": objective.arithmetic,
        "max_iterations": (objective.max_iterations, objective.again),
        "robust": (type(loss).__name__, *(getattr(loss, name, None) for name in ("falls", "ends"))),
        "solver, rank_deficient and rank_tolerance": objective.settings,
        "throw": objective.on_failure == "raise",
        "whether there are bounds": posed.limits is not None,
        "torch.get_num_threads()": torch.get_num_threads(),
        **{name: digest(concrete(t.detach())) for name, t in numbers.items()},
    }
