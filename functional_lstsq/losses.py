"""Robust losses: what a residual costs, once it is too large to be believed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .transforms import concrete


class Square:
    """z^2 / 2, of least squares."""

    def cost(self, z: Tensor, t: Tensor) -> Tensor:
        return z.square() / 2

    def influence(self, z: Tensor, t: Tensor) -> Tensor:
        """The derivative of the cost."""
        return z

    def weight(self, z: Tensor, t: Tensor) -> Tensor:
        """influence / z: the weight of the parabola that touches the cost in z and -z, and is nowhere below it."""
        return torch.ones_like(z)


@dataclass(frozen=True)
class Huber(Square):
    """Residuals beyond a threshold t count by their size, not by its square (Huber, Ann. Math. Statist. 35(1), 1964).

    The loss rho is z^2 / 2 for |z| <= t, and t |z| - t^2 / 2 beyond: convex. (`scipy.optimize.least_squares` has the
    same with loss="huber" and f_scale=t. No scale is estimated: it is in the weights, or in t.)

    Args:
        threshold: t, a positive number or 0-d tensor (which may be differentiated), in the units of the residuals, once
            multiplied by the root of their weights. The default is 95 % efficient where these are normal with a
            standard deviation of 1, as they are for weights of 1 / variance.

    >>> import functional_lstsq as fl
    >>> A = fl.SparseMatrix.from_torch(torch.ones(5, 1, dtype=torch.float64).to_sparse())
    >>> b = torch.tensor([1.0, 1.2, 0.8, 1.1, 50.0], dtype=torch.float64)
    >>> fl.lstsq(A, b), fl.lstsq(A, b, robust=fl.Huber(0.5))
    (tensor([10.8200], dtype=torch.float64), tensor([1.1500], dtype=torch.float64))
    """

    threshold: float | Tensor = 1.345

    def cost(self, z: Tensor, t: Tensor) -> Tensor:
        return torch.where(z.abs() <= t, z.square() / 2, t * z.abs() - t.square() / 2)

    def influence(self, z: Tensor, t: Tensor) -> Tensor:
        return torch.where(z.abs() <= t, z, t * z.sign())

    def weight(self, z: Tensor, t: Tensor) -> Tensor:
        return t / torch.maximum(z.abs(), t)


@dataclass(frozen=True)
class Cauchy(Square):
    """Residuals far beyond a threshold t hardly count at all.

    The loss rho is t^2 / 2 log(1 + (z / t)^2). It is not convex: what is found is a minimum near the start, which is
    the plain least-squares solution where none is given (Holland and Welsch, Comm. Statist. A6(9), 1977).
    (`scipy.optimize.least_squares` has the same with loss="cauchy" and f_scale=t.)

    Args:
        threshold: t, as for `Huber`.

    >>> import functional_lstsq as fl
    >>> A = fl.SparseMatrix.from_torch(torch.ones(5, 1, dtype=torch.float64).to_sparse())
    >>> fl.lstsq(A, torch.tensor([1.0, 1.2, 0.8, 1.1, 50.0], dtype=torch.float64), robust=fl.Cauchy(0.5))
    tensor([1.0320], dtype=torch.float64)
    """

    threshold: float | Tensor = 2.385

    def cost(self, z: Tensor, t: Tensor) -> Tensor:
        return t.square() / 2 * torch.log1p((z / t).square())

    def influence(self, z: Tensor, t: Tensor) -> Tensor:
        return z / (1 + (z / t).square())

    def weight(self, z: Tensor, t: Tensor) -> Tensor:
        return 1 / (1 + (z / t).square())


def loss_of(robust: object, device: torch.device) -> tuple[Square, Tensor]:
    """(loss, threshold as a 0-d tensor in double precision) of a `robust` argument; None is `Square`."""
    if robust is None:
        return Square(), torch.zeros((), dtype=torch.float64, device=device)
    if not isinstance(robust, (Huber, Cauchy)):
        raise TypeError(f"robust must be None, Huber() or Cauchy(), got {robust!r}")
    t = robust.threshold
    number = isinstance(t, (int, float)) and not isinstance(t, bool)
    if not number and not (isinstance(t, Tensor) and t.ndim == 0 and t.is_floating_point()):
        got = f"shape {tuple(t.shape)}, {t.dtype}" if isinstance(t, Tensor) else repr(t)
        raise TypeError(f"threshold of robust must be a positive number or a 0-d real tensor, got {got}")
    t = torch.as_tensor(t, dtype=torch.float64, device=device)
    every = concrete(t)  # of a batch too
    bad = ~((every > 0) & every.isfinite())
    if bool(bad.any()):
        raise ValueError(f"threshold of robust must be positive and finite, got {float(every[bad].reshape(-1)[0]):g}")
    return robust, t
