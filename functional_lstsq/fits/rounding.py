"""How large rounding errors are in f and in its gradient g: by what these are made of, and as measured."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sparse.numerics import noise
from .hessian import conjugate, relative
from .model import Model
from .objective import Leaves, Objective, each
from .rows import Rows

# Relative displacements at which g is sampled: one at which double precision shows its errors, and one at which single
# precision does, which a residual may use inside without telling.
_FINE, _COARSE = 1e-8, 4e-6
_COLLAPSED = 1e-8  # of the norm that a column once had
_EXPLAINED = 30.0  # times what a sample of errors makes, which may by chance have a small part in the weakest direction


def errors_of_residual(model: Model, r: Tensor, x: Tensor) -> Tensor:
    """|r| + |J| |x| (P, m), in units of the machine epsilon, for a residual that is no better than J x and itself."""
    return r.abs() + model.magnitude(x)


def floor_of_cost(model: Model, weights: Tensor, r: Tensor, x: Tensor) -> Tensor:
    """What rounding errors e of r are to f (P,): |r|^T W e + e^T W e / 2, ten times the one and twenty the other.

    A residual takes some operations, each with such errors: a distance from coordinates, say, five or six.

    The term of first order is the larger one as soon as residuals are larger than their own errors: where these are
    small beside the data, f can't tell points apart between which Newton's steps still can.
    """
    eps, errors = model.objective.arithmetic, errors_of_residual(model, r, x)
    squares = weights * (eps * r.abs() * errors + (eps * errors).square())
    return 10 * model.objective.rows.total(squares.sum(1))


def spread_of_influence(model: Model, weights: Tensor, r: Tensor, x: Tensor) -> Tensor:
    """The sizes of rounding errors in psi (P, m), in units of the machine epsilon."""
    return weights * (r.abs() + errors_of_residual(model, r, x))


def blur_of_gradient(model: Model, weights: Tensor, r: Tensor, x: Tensor) -> Tensor:
    """The sizes of rounding errors in g (P, n)."""
    errors = spread_of_influence(model, weights, r, x) + (weights * r).abs()
    return model.objective.arithmetic * model.adjoint_magnitude(errors)


def is_rounding(
    objective: Objective, x: Tensor, leaves: Leaves, model: Model, blur: Tensor, moved: Tensor, least: Tensor
) -> Tensor:
    """Whether steps of Newton's at x (P, n), of relative sizes `moved`, are no more than rounding errors in g make.

    Steps that do not shrink are either such errors or far from a minimum, and their size alone does not tell. So errors
    are carried into x as g is: those that are expected, and those that are measured, g(x + e) - 2 g(x) + g(x - e).
    """
    g = each(objective.gradient, x, *leaves)
    direction = noise(x)
    samples = [blur * noise(x, 1)]
    for size in (_FINE, _COARSE):
        # If e falls by 4, the second difference of a smooth g falls by 16, with a kink by 4, that of errors stays.
        whole, part = (
            sum(each(objective.gradient, x + s * h * direction * x, *leaves) for s in (1, -1)) - 2 * g
            for h in (size, size / 4)
        )
        of_whole, of_part = (torch.linalg.vector_norm(t / _positive(model.norms), dim=1) for t in (whole, part))
        rough = (of_part >= of_whole / 2.5) & part.isfinite().all(1)
        samples.append(torch.where(rough[:, None], part, 0.0))
    steps, definite, _ = conjugate(objective, x, leaves, model, torch.stack(samples, 2), 1e-2)
    sizes = torch.stack([relative(step, x, model.norms, least) for step in steps.unbind(2)])
    return definite.all(1) & (moved <= _EXPLAINED * sizes.amax(0))


def undetermined(model: Model, largest: Tensor, x: Tensor, least: Tensor, errors: Tensor, accept: Tensor) -> Tensor:
    """Which unknowns (P, n) the residuals do not depend on any more, but for rounding.

    Its column was far larger on the way: an unknown that went to infinity, or one that an amplitude of zero, but for
    rounding, multiplies. Whatever it is then, it hides in norms of x, so its error is looked at by itself.

    Args:
        largest: norms (P, n) that columns have had.
        least: the norm of x, scaled, below which x is zero but for rounding (P,).
        errors: samples (P, n, k) of errors of x.
        accept: sizes (P, n) of errors that may be.
    """
    zero = torch.linalg.vector_norm(model.norms * x, dim=1) <= least
    of_zero = torch.where(zero[:, None], least[:, None] / model.norms.clamp_min(torch.finfo(x.dtype).tiny), 0.0)
    error = torch.maximum(errors.abs().amax(2), of_zero)
    return (model.norms <= _COLLAPSED * largest) & (largest > 0) & ~(error <= accept)


def length_of_influence(rows: Rows, psi: Tensor, w: Tensor) -> Tensor:
    """|W^(-1/2) psi| (P,), in the units of W^(1/2) r, in which columns are measured too."""
    return rows.norm(torch.where(w > 0, psi * w.rsqrt(), 0.0))


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)
