"""`gauss_newton`: nonlinear least squares as a function of its data, differentiated implicitly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from .fit import Fit, Study
from .fits.posing import pose
from .fits.trees import as_residual, as_vector
from .linear.arguments import check_rank
from .solvers.watching import Step, watchable
from .sparse.matrix import SparseMatrix
from .sparse.pattern import SparsePattern
from .sparse.precision import convert
from .torch_func.tracing import fit_beside_graph


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
    max_iterations: int | None = None,
    callback: Callable[[int, float], object] | None = None,
    throw: bool = True,
    progress: bool | Callable[[Step], object] = False,
) -> Fit:
    """A minimum of sum_i weights_i residual(x, *args)_i^2 over x, differentiable to any order by `args` and weights.

    Levenberg and Marquardt's damped Gauss-Newton steps, each a sparse least-squares problem, then Newton's steps until
    they are rounding errors. Composes with every transformation of torch.func: under `vmap` the problems of a batch are
    solved side by side, and derivatives are those of the implicit function theorem at the minimum, whatever way led
    there.

    Args:
        residual: residual(x, *args) -> (m,), m >= n unless there are bounds; of torch operations that torch.func can
            transform, with second derivatives. What is to be differentiated belongs into `args`. Or a pytree, whose
            leaves one after the other are the m residuals; a complex one is two, the real parts of its leaf followed
            by the imaginary ones.
        x0: (n,), float32 or float64, where to start, or a pytree of such tensors of any shapes, which `residual`,
            `jacobian` and `fit.x` have too. No derivative flows through it, and another one may lead to another
            minimum.
        args: tuple of pytrees; tensors in them may be differentiated and mapped over.
        jacobian: a `SparsePattern` (m, n) that holds all nonzeros of the Jacobian, whose values are then found by as
            many directional derivatives as its columns need colours; or jacobian(x, *args) -> SparseMatrix, always on
            one pattern; None forms all m n entries.
        weights: (m,) non-negative, 1 / variance of each residual; a weight of 0 leaves a residual out, and has an
            ordinary derivative.
        sigma: (m,) positive, standard deviations of the residuals: weights of 1 / sigma^2, in place of `weights`.
        bounds: (lower, upper) of x, each a number or (n,), or a pytree as x0 is; -inf and inf for none, equal ones keep
            an unknown where it is. Derivatives by them are those of the minimum; where an unknown is at a bound but
            does not press against it, there is none, which raises (NaN without throw). `info.active` (-1, 0, 1),
            `.multipliers` and `.weak` tell, as for `lstsq`.
        robust: a loss rho, `Huber()` (see there), `SoftL1()`, `Cauchy()`, `Arctan()`, `Tukey()` or `Hampel()`: 2
            rho(sqrt(weights) r) in place of weights r^2.
        solver: for the steps and the derivatives, as for `lstsq`.
        rank_deficient: "raise", or "minimum_norm" for a cost that some changes of x leave as it is, as moving and
            turning a free network does, or the gauge of a bundle adjustment: every step is that of least change, and
            derivatives are those of the minimum nearest to x. What the residual determines is differentiable so; where
            along the gauge x comes to lie depends on x0.
        rank_tolerance: as for `lstsq`, of the Jacobian.
        max_iterations: damped steps, accepted or not. None for 100 (n + 1), at most 2,000, and as many once more where
            these find no strict minimum: from x0 in another scale, which is the same for all unknowns.
        callback: called with (iteration, cost) after every damped step; under vmap with the largest of the batch.
        throw: False returns what was reached instead of raising; `info.status` tells, and derivatives are NaN, or zero
            in reverse mode where nothing depends on it.
        progress: as for `lstsq`.

    Returns:
        `Fit(x, residual, info)`: x (n,), residual (m,) at x, without weights, both differentiable, and a `FitInfo`,
        which is not. `fit.standard_errors()`, `fit.covariance()`, `fit.jacobian` and `fit.dof` are computed when they
        are asked for, and are differentiable too.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape, or with NaN or infinity in it; a jacobian
            that is not that of residual; a residual that depends on tensors out of `args` that are being
            differentiated.
        RankDeficientError: the Jacobian has no full rank at the point reached, and the Hessian matrix is not positive
            definite there, so that it need not be the only minimum.
        ConvergenceError: no minimum within max_iterations, or one whose estimated forward error, relative, is above
            eps^(1/3) of the dtype in which the residual is computed; or such a derivative; or one that bounds have not.

    Cost: a factorisation for each step, with bounds some, and a few for the end; a derivative costs a factorisation and
    a few solves and products with the Hessian matrix. All arithmetic is in double precision, as far as `residual` keeps
    to it.

    Source: Nocedal and Wright, Numerical Optimization, Springer 2006, chapter 10; derivatives: Griewank and Walther,
    Evaluating Derivatives, SIAM 2008, chapter 15.

    >>> import torch, functional_lstsq as fl
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
    >>> bounded = fl.gauss_newton(misfit, x0, (y,), bounds=(0.0, 2.0))
    >>> bounded.x, bounded.info.active
    (tensor([2.0000, 0.4770], dtype=torch.float64), tensor([1, 0]))
    """
    check_rank(rank_deficient, rank_tolerance)
    if weights is not None and sigma is not None:
        raise TypeError("sigma must be None beside weights, which are 1 / sigma^2, got both")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable, got {callback!r}")
    start, tree = as_vector(x0)
    found = minimum_of(
        (lambda x, *args: as_residual(residual(tree(x), *args))) if callable(residual) else residual,
        start, args,
        (lambda x, *args: jacobian(tree(x), *args)) if callable(jacobian) else jacobian,
        robust, solver, max_iterations, throw, "gauss_newton", "x0", "residual", weights=weights, sigma=sigma,
        bounds=bounds, minimum_norm=rank_deficient == "minimum_norm", tolerance=rank_tolerance, callback=callback,
    )  # fmt: skip

    def rounded(result: Tensor, name: str) -> Tensor:
        dtype = torch.promote_types(found.dtype, torch.complex64) if result.is_complex() else found.dtype
        return convert(result, dtype, f"the derivative of {name}", "raise" if throw else "nan")

    r = torch_pytree.tree_map(lambda leaf: rounded(leaf, "the residual"), residual(tree(found.x), *found.args))
    return Fit(tree(rounded(found.x, "x")), r, found.info).with_study(found.study)


class Found(NamedTuple):
    """A minimum, in double precision."""

    x: Tensor
    dtype: torch.dtype  # of the results
    info: Any  # `FitInfo`, with bounds a `BoundedInfo`
    args: tuple
    study: Study


def minimum_of(*asked: Any, **options: Any) -> Found:
    """The minimum of what `pose` poses of these arguments."""
    posed = pose(*asked, **options)
    objective, x, leaves, blur, token, within, info = posed.descend()
    study = Study(objective, x, leaves, blur, token, posed.dtype, None if within is None else posed.objective)
    return Found(x, posed.dtype, info, posed.args, study)
