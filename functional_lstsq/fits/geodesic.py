"""Geodesic acceleration: what bends a damped Gauss-Newton step along a curved valley.

Unknowns that follow a geodesic of the model's manifold move along x(h) = x + h p + h^2 a / 2 + ..., where p is the
damped step and the acceleration a solves J a + r'' = 0 as p solves J p + r = 0, r'' being the second derivative of r
along p. (Transtrum and Sethna, Improvements to the Levenberg-Marquardt algorithm, arXiv:1201.5885, sections 3 and 4.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .model import Model
from .objective import Leaves, Objective, each

_AHEAD = 0.1  # where on the step, relative to it, the residual is looked at
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
    usable = second.isfinite().all(1)
    half = damped(torch.where(usable[:, None], second, 0.0)) / 2
    of_half, of_p = (torch.linalg.vector_norm(scale * t, dim=1) for t in (half, p))
    return torch.where((2 * of_half <= _BEND * of_p)[:, None], half, 0.0)
