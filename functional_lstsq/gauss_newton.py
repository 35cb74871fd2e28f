"""`gauss_newton`: nonlinear least squares as a function of its data, differentiated implicitly."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from .closures import close, plain
from .coloring import jacobian_values
from .fits import FitInfo, FitReport
from .holder import check_solver, name_of
from .implicit import Minimum
from .losses import loss_of
from .matrix import SparseMatrix
from .objective import Objective
from .pattern import SparsePattern
from .precision import convert, double
from .problem import check_numbers
from .result import Solution
from .solvers.numerics import noise
from .transforms import load_forward_mode

_ENTRIES = 10**7  # of a Jacobian that is formed whole
_SAME = 1e-4  # relative difference between a given Jacobian and the residual's that may be rounding in single precision


def gauss_newton(
    residual: Callable[..., Tensor],
    x0: Tensor,
    args: tuple = (),
    *,
    jacobian: SparsePattern | Callable[..., SparseMatrix] | None = None,
    robust: Any = None,
    solver: Any = None,
    max_iterations: int = 100,
    throw: bool = True,
) -> Solution:
    """A minimum of sum_i residual(x, *args)_i^2 over x, differentiable to any order by `args`.

    Levenberg and Marquardt's damped Gauss-Newton steps, each a sparse least-squares problem, then Newton's steps until
    they are rounding errors. Composes with every transformation of torch.func: under `vmap` the problems of a batch are
    solved side by side, and derivatives are those of the implicit function theorem at the minimum, whatever way led
    there.

    Args:
        residual: residual(x, *args) -> (m,), m >= n, real; of torch operations that torch.func can transform, with
            second derivatives. What is to be differentiated belongs into `args`.
        x0: (n,), float32 or float64, where to start. No derivative flows through it, and another one may lead to
            another minimum.
        args: tuple of pytrees; tensors in them may be differentiated and mapped over.
        jacobian: a `SparsePattern` (m, n) that holds all nonzeros of the Jacobian, whose values are then found by as
            many directional derivatives as its columns need colours; or jacobian(x, *args) -> SparseMatrix, always on
            one pattern; None forms all m n entries.
        robust: `Huber()` or `Cauchy()`, of loss rho: 2 rho(r) in place of r^2.
        solver: for the steps and the derivatives, as for `lstsq`.
        max_iterations: damped steps, accepted or not.
        throw: False returns what was reached instead of raising; `info.status` tells, and derivatives are NaN.

    Returns:
        `Solution(x, residual, info)`: x (n,), residual (m,) at x, both differentiable, and a `FitInfo`, which is not.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape, or with NaN or infinity in it; a jacobian
            that is not that of residual; a residual that depends on tensors out of `args` that are being
            differentiated.
        RankDeficientError: the Jacobian has no full rank at the point reached, which need not be the only minimum.
        ConvergenceError: no minimum within max_iterations, or one whose estimated forward error, relative, is above
            eps^(1/3) of the dtype; or such a derivative.

    Cost: a factorisation for each step and a few for the end; a derivative costs a factorisation and a few solves and
    products with the Hessian matrix. All arithmetic is in double precision, as far as `residual` keeps to it.

    Source: Nocedal and Wright, Numerical Optimization, Springer 2006, chapter 10; derivatives: Griewank and Walther,
    Evaluating Derivatives, SIAM 2008, chapter 15.

    >>> import functional_lstsq as fl
    >>> t = torch.arange(5.0, dtype=torch.float64)
    >>> y = torch.tensor([2.0, 1.3, 0.7, 0.5, 0.3], dtype=torch.float64)
    >>> def misfit(x, y):
    ...     return x[0] * torch.exp(-x[1] * t) - y
    >>> x0 = torch.tensor([1.0, 1.0], dtype=torch.float64)
    >>> fl.gauss_newton(misfit, x0, (y,)).x
    tensor([2.0133, 0.4804], dtype=torch.float64)
    >>> torch.func.jacrev(lambda y: fl.gauss_newton(misfit, x0, (y,)).x)(y)
    tensor([[ 0.8832,  0.2675, -0.0070, -0.1110, -0.1346],
            [ 0.2239, -0.1010, -0.2106, -0.2219, -0.1939]], dtype=torch.float64)
    """
    x, dtype, info, given = minimum_of(
        residual, x0, args, jacobian, robust, solver, max_iterations, throw, "gauss_newton", "x0", "residual"
    )
    on_failure, r = "raise" if throw else "nan", residual(x, *given)
    x, r = (convert(t, dtype, f"the derivative of {name}", on_failure) for t, name in ((x, "x"), (r, "the residual")))
    return Solution(x, r, info)


def minimum_of(
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
) -> tuple[Tensor, torch.dtype, FitInfo, tuple]:
    """(x, dtype of the results, info, args), in double precision, under the names that the caller gives."""
    _check(residual, x0, args, jacobian, max_iterations, name, of_start)
    check_solver(solver)
    loss, threshold = loss_of(robust, x0.device)
    tensors, rebuild = _taken_apart(args)
    for tensor, where in ((x0, of_start), *((t, "args") for t in tensors)):
        if tensor.layout != torch.strided:
            raise TypeError(f"args must hold dense tensors and SparseMatrix, got layout {tensor.layout}")
        check_numbers(where, tensor)
    load_forward_mode()
    on_failure = "raise" if throw else "nan"
    start = x0.detach().to(torch.float64)
    doubled = [double(tensor, "the derivative by args", on_failure) for tensor in tensors]
    try:
        function, r = close(lambda x, *t: residual(x, *rebuild(t)), of_function, "args", start, *doubled)
    except RuntimeError as error:
        if "dtype" not in str(error):
            raise
        raise TypeError(
            f"{of_function} must take {of_start} and args in double precision, got an error of torch: {error}. Hand "
            "over in args what is of single precision, or convert it"
        ) from error
    n, what = x0.shape[0], of_function if of_function == "residual" else f"the residual of {of_function}({of_start})"
    if not isinstance(r, Tensor) or r.ndim != 1 or not r.is_floating_point():
        got = f"{r.dtype}, shape {tuple(r.shape)}" if isinstance(r, Tensor) else type(r).__name__
        raise ValueError(f"residual must give a real tensor of shape (m,), got {got}")
    m = r.shape[0]
    if m < n:
        raise ValueError(f"residual must give at least as many numbers as {of_start} has, {n}, got {m}")
    dtype = x0.dtype
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype == torch.float64:
            dtype = tensor.dtype

    def in_double(x: Tensor, *given: Tensor) -> Tensor:
        return function(x, *given).to(torch.float64)

    pattern, values = _jacobian_of(in_double, jacobian, rebuild, m, n, x0, doubled)
    objective = Objective(
        residual=in_double,
        jacobian=values,
        pattern=pattern,
        loss=loss,
        settings=name_of(solver, minimum_norm=False, precision=torch.finfo(dtype).eps, exact=False),
        precision=torch.finfo(dtype).eps,
        max_iterations=max_iterations,
        on_failure=on_failure,
        linear=False,
        name=name,
        start=f"{what} must be finite at {of_start}",
        point=of_start,
    )
    leaves = (threshold, torch.zeros_like(threshold), *doubled)
    x, numbers, _ = Minimum.apply(objective, start[None], *(leaf[None] for leaf in leaves))
    x, report = x[0], FitReport(*numbers[0])
    info = FitInfo(
        status_code=report.status.to(torch.int64),
        iterations=report.iterations.to(torch.int64),
        evaluations=report.evaluations.to(torch.int64),
        optimality=report.optimality,
        forward_error=report.forward_error,
        condition=report.condition,
        cost=report.cost,
    )
    return x, dtype, info, rebuild(doubled)


def _check(residual: Any, x0: Any, args: Any, jacobian: Any, max_iterations: Any, name: str, of_start: str) -> None:
    if torch.compiler.is_compiling():
        raise TypeError(f"torch.compile cannot take {name}; compile what makes its arguments")
    if not callable(residual):
        raise TypeError(f"residual must be callable, got {residual!r}")
    if not isinstance(x0, Tensor) or x0.layout != torch.strided:
        got = f"layout {x0.layout}" if isinstance(x0, Tensor) else type(x0).__name__
        raise TypeError(f"{of_start} must be a dense tensor of shape (n,), got {got}")
    if x0.ndim != 1 or not x0.shape[0]:
        hint = "; for a batch of starts use torch.vmap" if x0.ndim > 1 else ""
        raise ValueError(f"{of_start} must have shape (n,) with n > 0, got {tuple(x0.shape)}{hint}")
    if x0.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{of_start} must be float32 or float64, got {x0.dtype}")
    check_args(args)
    if jacobian is not None and not isinstance(jacobian, SparsePattern) and not callable(jacobian):
        raise TypeError(f"jacobian must be None, a SparsePattern or callable, got {jacobian!r}")
    if isinstance(max_iterations, bool) or not isinstance(max_iterations, int):
        raise TypeError(f"max_iterations must be an integer, got {max_iterations!r}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")


def check_args(args: Any) -> None:
    """Refuse what is not a tuple."""
    if not isinstance(args, tuple):
        raise TypeError(f"args must be a tuple, (y,) for one, got {type(args).__name__}")


def _taken_apart(args: tuple) -> tuple[list[Tensor], Callable[[Any], tuple]]:
    """(tensors in `args`, what puts others into their places)"""
    leaves, spec = torch_pytree.tree_flatten(args)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def rebuild(tensors: Any) -> tuple:
        changed = dict(zip(places, tensors, strict=True))
        return torch_pytree.tree_unflatten([changed.get(i, leaf) for i, leaf in enumerate(leaves)], spec)

    return [leaves[i] for i in places], rebuild


@lru_cache(maxsize=8)
def _full(m: int, n: int, device: torch.device) -> SparsePattern:
    entries = torch.arange(m * n, device=device)
    return SparsePattern(torch.stack([entries // n, entries % n]), (m, n))


def _jacobian_of(
    residual: Callable[..., Tensor], jacobian: Any, rebuild: Callable, m: int, n: int, x0: Tensor, given: list[Tensor]
) -> tuple[SparsePattern, Callable[..., Tensor]]:
    """(pattern, (x, *tensors) -> values on it), tried at x0."""
    if jacobian is None:
        if m * n > _ENTRIES:
            raise ValueError(
                f"jacobian=None forms all entries of the Jacobian, {m} x {n}: pass its SparsePattern, or a function "
                "that gives a SparseMatrix"
            )
        pattern = _full(m, n, x0.device)
        # torch.func.jacfwd takes as many directions at a time as there are.
        return pattern, lambda x, *t: torch.func.jacfwd(lambda x: residual(x, *t))(x).reshape(-1)
    point = plain(x0).to(torch.float64)
    plainly = [plain(tensor) for tensor in given]
    if isinstance(jacobian, SparsePattern):
        pattern = jacobian

        def values(x: Tensor, *t: Tensor) -> Tensor:
            return jacobian_values(lambda x: residual(x, *t), x, pattern)

    else:
        closed, J = close(lambda x, *t: jacobian(x, *rebuild(t)), "jacobian", "args", point, *plainly)
        if not isinstance(J, SparseMatrix):
            raise TypeError(f"jacobian must give a SparseMatrix, got {type(J).__name__}")
        pattern = J.pattern

        def values(x: Tensor, *t: Tensor) -> Tensor:
            J = closed(x, *t)
            if J.pattern is not pattern and J.pattern != pattern:
                raise ValueError("jacobian must give a SparseMatrix on the same pattern, always")
            return J.values.to(torch.float64)

    if pattern.shape != (m, n):
        raise ValueError(f"jacobian must have shape ({m}, {n}), got {tuple(pattern.shape)}")
    if pattern.device != x0.device:
        raise ValueError(f"jacobian is on {pattern.device}, x0 is on {x0.device}")
    v = noise(point)
    got = SparseMatrix(values(point, *plainly), pattern) @ v
    want: Any = torch.func.jvp(lambda x: residual(x, *plainly), (point,), (v,))[1]
    off = float((got - want).norm() / torch.maximum(got.norm(), want.norm()).clamp_min(1e-300))
    if not off <= _SAME:
        raise ValueError(
            f"jacobian must be that of residual, got a relative difference of {off:.1e} between their products with a "
            "random vector at x0"
        )
    return pattern, values
