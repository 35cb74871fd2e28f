"""`variable_projection`: fits that are linear in some of the unknowns, as nonlinear ones in the others alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import DAMP, EXTENDED, LEAST_NORM, LEAST_NORM_BY_FACTOR, SEE, SolveError
from .fits.arguments import check_args
from .fits.losses import given_threshold, start_threshold
from .fits.report import FitInfo
from .gauss_newton import minimum_of
from .linear.arguments import check_numbers
from .lstsq import solve
from .solvers.watching import Step, watchable
from .sparse.matrix import SparseMatrix
from .sparse.precision import convert
from .torch_func.tracing import fit_beside_graph

_NOT_TAKEN = (LEAST_NORM, LEAST_NORM_BY_FACTOR, DAMP, EXTENDED, SEE)


class SeparableFit(NamedTuple):
    """p, x, the residual b - A(p) x, and `info`; a NamedTuple, hence a pytree."""

    p: Tensor
    x: Tensor
    residual: Tensor
    info: FitInfo


@contextmanager
def _advising() -> Iterator[None]:
    """Without advice to give a solve what `variable_projection` does not take."""
    try:
        yield
    except SolveError as error:
        raise type(error)(error.what, *(said for said in error.advice if said not in _NOT_TAKEN)) from error


@watchable
@fit_beside_graph
def variable_projection(
    design: Callable[..., Any],
    p0: Tensor,
    b: Tensor,
    args: tuple = (),
    *,
    weights: Tensor | None = None,
    robust: Any = None,
    solver: Any = None,
    max_iterations: int | None = None,
    throw: bool = True,
    progress: bool | Callable[[Step], object] = False,
) -> SeparableFit:
    """A minimum of sum_i weights_i |b - A(p) x|_i^2 over p and x, differentiable to any order by all but p0.

    For every p the best x is a linear least-squares solution, so what is left to be found is a minimum over p alone of
    |b - A(p) x(p)|, by `gauss_newton`: fewer unknowns, no start for x, and mostly fewer steps.

    Args:
        design: design(p, *args) -> A, (m, k): a SparseMatrix or LinearOperator, of full rank. (torch can't
            differentiate by what makes a torch sparse tensor: make the pattern outside, the values inside.)
        p0: (n,), float32 or float64, where to start; no derivative flows through it.
        b: (m,), or (m, j) for columns that share p but not x; real.
        args: tuple of pytrees; tensors in them may be differentiated and mapped over.
        weights: (m,) non-negative, in units of 1 / variance of b; None for ones.
        robust: a loss, as for `gauss_newton`, of b - A(p) x for p and x together; an estimated scale is that of all
            columns of b.
        solver: for x, and for the steps in p, as for `lstsq`.
        max_iterations, throw, progress: as for `gauss_newton`.

    Returns:
        `SeparableFit(p, x, residual, info)`: p (n,), x (k,) or (k, j), residual b - A(p) x, all differentiable, and a
        `FitInfo` of p, which is not.

    Raises: as `gauss_newton`, of p0 for x0, and as `lstsq` does for x.

    Cost: with `robust`, a robust fit of x wherever this says solve, and with an estimated scale some ten times as many.
    Without, in each step a solve, and one further solve for the Jacobian by p, all columns together. For small problems
    `gauss_newton` over p and x takes less time, though more steps.

    Source: Golub and Pereyra, SIAM J. Numer. Anal. 10(2), 1973, and Inverse Problems 19(2), 2003.

    >>> import torch, functional_lstsq as fl
    >>> t = torch.linspace(0, 4, 9, dtype=torch.float64)
    >>> pattern = fl.SparsePattern(torch.cartesian_prod(torch.arange(9), torch.arange(2)).T, (9, 2))
    >>> def decays(rates):
    ...     return fl.SparseMatrix(torch.exp(-t[:, None] * rates).reshape(-1), pattern)
    >>> b = 3 * torch.exp(-0.5 * t) + torch.exp(-2 * t)
    >>> fit = fl.variable_projection(decays, torch.tensor([0.1, 1.0], dtype=torch.float64), b)
    >>> fit.p, fit.x
    (tensor([0.5000, 2.0000], dtype=torch.float64), tensor([3.0000, 1.0000], dtype=torch.float64))
    >>> fit.info.status
    'converged'
    """
    if not callable(design):
        raise TypeError(f"design must be callable, got {design!r}")
    if not isinstance(b, Tensor) or b.is_complex():
        raise TypeError(f"b must be a real tensor, got {b.dtype if isinstance(b, Tensor) else type(b).__name__}")
    check_args(args)
    check_numbers("b", b)
    if isinstance(weights, Tensor):
        check_numbers("weights", weights)

    def inner(p: Tensor, t: Tensor, b: Tensor, weights: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
        # A step may lead to where A overflows or has no full rank: NaN, which makes it shorter.
        A, good = design(p, *args), None
        if isinstance(A, SparseMatrix):
            good = A.values.isfinite().all()
            A = SparseMatrix(torch.where(good, A.values, 0.0), A.pattern)
        x, r, _ = solve(A, b, weights=weights, robust=given_threshold(robust, t), solver=solver, throw=False)
        return x, r if good is None else torch.where(good, r, torch.nan)

    def reduced(p: Tensor, *given: Any) -> Tensor:
        return inner(p, *given)[1].flatten()

    name = "variable_projection"
    if throw and isinstance(p0, Tensor) and p0.ndim == 1:
        check_numbers("p0", p0)
        # The errors of a solve say most of what is wrong with A(p0).
        with _advising():
            solve(design(p0.detach(), *args), b, weights=weights, solver=solver)
    threshold = start_threshold(robust, b.device)
    of_all = weights[:, None].expand_as(b).flatten() if isinstance(weights, Tensor) and b.ndim == 2 else weights
    p, dtype, info, given, study = minimum_of(
        reduced, p0, (threshold, b, weights, *args), None, robust, solver, max_iterations, throw, name, "p0", "design",
        weights=of_all, nested=robust is not None, further=lambda *given: inner(*given)[0].flatten(),
    )  # fmt: skip
    _, b, weights, *args_in_double = given
    # In double precision to the end: x may move much more than p.
    A, robust = design(p, *args_in_double), given_threshold(robust, study.leaves[0])
    with _advising():
        x, residual, _ = solve(A, b, weights=weights, robust=robust, solver=solver, throw=throw)
    on_failure = "raise" if throw else "nan"
    named = (("p", p), ("x", x), ("the residual", residual))
    p, x, residual = (convert(result, dtype, f"the derivative of {name}", on_failure) for name, result in named)
    return SeparableFit(p, x, residual, info)
