"""Linear systems with the curvature H of an objective: conjugate gradients, preconditioned by a Gauss-Newton model."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConvergenceError
from ..solvers.system import EPS
from ..sparse.base import dot
from .model import Model, model_at
from .objective import Leaves, Objective, curvature_at, each

_CORRECTIONS = 8
_FLAT = 1e-12  # curvature, relative to that of the model, that is taken for none
_TINY = torch.finfo(torch.float64).tiny


def relative(e: Tensor, x: Tensor, scale: Tensor, least: Tensor | float = 0.0) -> Tensor:
    """The size of e beside x, as they are or scaled by the norms of columns, whichever is larger.

    An x whose scaled norm is below `least` is zero but for rounding, and has no relative errors of its own.
    """
    of_e, of_x = (torch.linalg.vector_norm(scale * t, dim=1) for t in (e, x))
    scaled = of_e / torch.clamp(of_x, min=least).clamp_min(_TINY)
    plain = torch.linalg.vector_norm(e, dim=1) / torch.linalg.vector_norm(x, dim=1).clamp_min(_TINY)
    return torch.where(of_x > least, torch.maximum(plain, scaled), scaled)


def conjugate(
    objective: Objective, x: Tensor, leaves: Leaves, model: Model, c: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, int]:
    """(H^-1 c (P, n, k), whether it was found, H being positive definite on the way (P, k), products per problem).

    Args:
        tolerance: by how much the error is to shrink, in the norm of M.
    """
    finite, inverse = c.isfinite().all(1), model.preconditioner(x, leaves)
    s, residual = torch.zeros_like(c), torch.where(finite[:, None], c, 0.0)
    z = inverse(residual)
    rho = dot(z, residual)
    first, p, length = rho, z, rho
    definite = finite & rho.isfinite() & (rho >= 0)
    live = definite & (rho > 0)
    products, H = 0, curvature_at(objective, x, leaves)
    for _ in range(2 * c.shape[1] + 20):
        if not bool(live.any()):
            break
        Hp = H(p)
        products += c.shape[2]
        curved = dot(p, Hp)
        definite = definite & (~live | (curved > _FLAT * length))
        live = live & definite
        step = torch.where(live, rho / torch.where(live, curved, 1.0), 0.0)[:, None]
        s, residual = s + step * p, residual - step * Hp
        z = inverse(residual)
        new = dot(z, residual)
        live = live & (new > tolerance**2 * first)
        ratio = torch.where(live, new / torch.where(live, rho, 1.0), 0.0)
        p = torch.where(live[:, None], z + ratio[:, None] * p, p)
        rho, length = torch.where(live, new, rho), torch.where(live, new + ratio.square() * length, length)
    return s, definite & ~live, products


def solve_curvature(
    objective: Objective,
    u: Tensor,
    c: Tensor,
    near: Tensor | None,
    x: Tensor,
    blur: Tensor,
    token: Tensor | None,
    leaves: Leaves,
) -> Tensor:
    """The solution s of H s + J^T u + c = 0 for u (P, m, k), c (P, n, k), refined until nothing changes but rounding.

    Args:
        near: u and c, one above the other, for leaves nearby and x + blur: how far s is from solving the equation with
            these is one sample of the rounding errors in it, beside two of those in J^T (u + psi' J s). Below stand
            derivatives of further results for s = 0, if they are judged. None where only errors of the solution are.

    Raises:
        ConvergenceError: a last correction, or such a sample, above what is accepted, or an H that is not positive
            definite (NaN for these, unless on_failure is "raise").
    """
    rows = objective.rows
    finite = (rows.everywhere(u.isfinite()) & c.isfinite().all(1))[:, None]
    if objective.on_failure == "raise" and not bool(finite.all()):
        raise ValueError(f"a derivative that is taken through {objective.name} must be finite, got NaN or infinity")
    u, c = (torch.where(finite, t, 0.0) for t in (u, c))
    size = torch.maximum(rows.largest(u.abs()), c.abs().amax(1))[:, None]
    size = torch.where(size > 0, size, 1.0)
    u, c = u / size, c / size
    _, r = each(objective.cost, x, *leaves)
    weights, J = objective.weights(r, leaves), each(objective.slopes, x, *leaves)
    # Not so where there was no minimum.
    usable = rows.everywhere(torch.cat([J.isfinite(), weights.isfinite()], 1))[:, None]
    model = model_at(objective, J.where(usable, 0.0), weights.where(usable, 1.0), leaves, token)
    scale, s = model.norms[:, :, None], torch.zeros_like(c)
    error = torch.full_like(c[:, 0], torch.inf)
    definite = torch.ones_like(error, dtype=torch.bool)
    # For a u that J does not reach s is zero but for rounding, and has no relative errors of its own.
    root = model.root[:, :, None]
    least = objective.accept / 10 * rows.norm(torch.where(root > 0, u / root, 0.0))
    for step in range(_CORRECTIONS):
        residual = -each(objective.equation, s, u, c, x, *leaves)
        d, seen, _ = conjugate(objective, x, leaves, model, residual, 1e-8)
        definite = definite & seen
        moved = relative(d, s + d, scale, least)
        better = moved < (error / 2 if step else torch.inf)
        s = torch.where(better[:, None], s + d, s)
        error = torch.where(better | (moved > error), moved, error)
        if not bool((better & (moved > 4 * EPS)).any()):
            break
    if near is not None:
        sampled, seen = _sampled(objective, model, s, near / size, x, blur, leaves, least)
        error, definite = error + sampled[0], definite & seen
        error = torch.maximum(error, sampled[1])
    failed = ~(definite & (error <= objective.accept))
    if objective.on_failure == "raise" and bool(failed.any()):
        worst = float(torch.where(definite, error, torch.inf).max())
        raise ConvergenceError(
            f"{objective.name} found a minimum, but its derivative has an estimated relative error of {worst:.1e}, "
            f"above what is accepted, {objective.accept:.1e}; condition number of the Jacobian about "
            f"{float(model.told.condition.max()):.1e}",
            "rescale or remove parameters that do nearly the same",
        )
    return torch.where(failed[:, None] | ~finite, torch.nan, s * size)


def _sampled(
    objective: Objective,
    model: Model,
    s: Tensor,
    near: Tensor,
    x: Tensor,
    blur: Tensor,
    leaves: Leaves,
    least: Tensor,
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """((errors (P, k) of s by samples of rounding, those of further results), whether H was positive definite).

    Arguments as in `solve_curvature`, `near` and `least` in the units of s.
    """
    m, n = objective.pattern.shape
    u, c, further = near.tensor_split((m, m + n), 1)
    y = each(objective.influence_along, s, u, x, *leaves)
    size_of_y = u.abs() + model.root[:, :, None] * model.A.absolute_matmul(s.abs())
    right = [each(objective.equation, s, u, c, x + blur, *objective.nearby(leaves))]
    right += [model.rounding(y, size_of_y, seed) for seed in (1, 2)]
    d, seen, _ = conjugate(objective, x, leaves, model, torch.cat(right, 2), 1e-2)
    largest = lambda errors: errors.unflatten(1, (len(right), -1)).amax(1)  # noqa: E731
    error = largest(relative(d, s.repeat(1, 1, len(right)), model.norms[:, :, None], least.repeat(1, len(right))))
    of_further = torch.zeros_like(error)
    if further.shape[1]:
        moved = each(objective.further_along, torch.cat([d, s], 2), x, *leaves)
        ds, more = moved.tensor_split((d.shape[2],), 2)
        whole, *parts = (torch.linalg.vector_norm(t, dim=1) for t in (further + more, further, more))
        # Where they cancel, an error is held against a hundredth of what the result is made of.
        whole = torch.maximum(whole, sum(parts) / 100).clamp_min(_TINY)
        of_further = largest(torch.linalg.vector_norm(ds, dim=1)) / whole
    return (error, of_further), seen.unflatten(1, (len(right), -1)).all(1)
