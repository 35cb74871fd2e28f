"""Better steps: geodesic acceleration, which bends a damped Gauss-Newton step along a curved valley, and Newton's.

Unknowns that follow a geodesic of the model's manifold move along x(h) = x + h p + h^2 a / 2 + ..., where p is the
damped step and the acceleration a solves J a + r'' = 0 as p solves J p + r = 0, r'' being the second derivative of r
along p. (Transtrum and Sethna, Improvements to the Levenberg-Marquardt algorithm, arXiv:1201.5885, sections 3 and 4.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..torch_func.forward_mode import jvp
from .model import Model, model_at
from .objective import Leaves, Objective, each

_AHEAD = 0.1  # where on the step, relative to it, the residual is looked at
_FLAT = 1e-4  # the part of the weights of reweighting that stays beside second derivatives of the loss
_PARTS = (1.0, 0.25, 0.06, 0.01)  # of Newton's step
_BEND = 0.75  # the largest |a| / |p| that is followed


def acceleration(
    objective: Objective,
    x: Tensor,
    r: Tensor,
    leaves: Leaves,
    model: Model,
    scale: Tensor,
    p: Tensor,
    damped: Callable[[Tensor], Tensor],
) -> Tensor:
    """a / 2 (P, n) for steps p (P, n) from x that `damped` made of r; one more residual, and no factor.

    Where a is not small beside p, the series of which it is the second term says nothing, and the result is zero.
    """
    _, ahead = each(objective.cost, x + _AHEAD * p, *leaves)
    second = 2 / _AHEAD * ((ahead - r) / _AHEAD - model.along(p))
    usable = objective.rows.everywhere(second.isfinite())
    half = damped(torch.where(usable[:, None], second, 0.0)) / 2
    of_half, of_p = (torch.linalg.vector_norm(scale * t, dim=1) for t in (half, p))
    return torch.where((2 * of_half <= _BEND * of_p)[:, None], half, 0.0)


def lowest(
    objective: Objective, x: Tensor, r: Tensor, weights: Tensor, J: Tensor, leaves: Leaves, g: Tensor, p: Tensor
) -> Tensor:
    """Of the step p (P, n) of reweighting and Newton's along the gradient g, whole or in parts, that of least cost.

    Where nearly all residuals are beyond the threshold, as with a median, the parabolas of reweighting are much steeper
    than the cost, and their steps go the right way at a crawl. A small part of them stays where the cost is flat.
    """
    t, _, w, *_ = leaves
    slopes = jvp(lambda r: objective.loss.influence(r, w, t[:, None]), (r,), (torch.ones_like(r),))[1]
    model = model_at(objective, J, slopes.clamp_min(0) + _FLAT * weights, leaves)
    newton = -model.inverse(g[:, :, None])[:, :, 0]
    steps = torch.stack([p, *(newton * part for part in _PARTS)])
    costs = torch.stack([each(objective.cost, x + step, *leaves)[0] for step in steps])
    best = torch.where(costs.isfinite(), costs, torch.inf).argmin(0)
    return steps.take_along_dim(best[None, :, None], 0)[0]
