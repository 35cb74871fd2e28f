"""Robust losses: what a residual costs, once it is too large to be believed.

All take a residual r, its weight w and a threshold t, and are functions of z = w^(1/2) |r| / t, times t^2. A smooth one
is a function of z^2 = w (r / t)^2, which has derivatives at w = 0; others take a root where z is large only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..torch_func.tracing import concrete

SCALES = ("mad", "huber")


class Square:
    """w r^2 / 2, of least squares."""

    def cost(self, r: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return w * r.square() / 2

    def influence(self, r: Tensor, w: Tensor, t: Tensor) -> Tensor:
        """The derivative of the cost by r."""
        return w * r

    def weight(self, r: Tensor, w: Tensor, t: Tensor) -> Tensor:
        """influence / r: the weight of the parabola that touches the cost in r and -r, and is nowhere below it."""
        return w.expand_as(r)


class Loss(Square):
    """A loss with a threshold; one that is smooth gives `of` and twice its derivative, `factor`, by q = z^2."""

    efficient: ClassVar[float]  # the threshold of 95 % efficiency, in units of the scale
    threshold: Any
    scale: str | float | Tensor | None

    def __post_init__(self) -> None:
        """Neither of them given: the numbers that fit data in any units."""
        if self.threshold is None:
            object.__setattr__(self, "threshold", self.efficient)
            object.__setattr__(self, "scale", "mad" if self.scale is None else self.scale)

    def of(self, q: Tensor) -> Tensor:
        raise NotImplementedError

    def factor(self, q: Tensor) -> Tensor:
        raise NotImplementedError

    def cost(self, r: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return t.square() * self.of(w * (r / t).square())

    def influence(self, r: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return w * r * self.factor(w * (r / t).square())

    def weight(self, r: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return w * self.factor(w * (r / t).square())


@dataclass(frozen=True)
class Huber(Loss):
    """Residuals beyond a threshold t count by their size, not by its square (Huber, Ann. Math. Statist. 35(1), 1964).

    The loss rho is z^2 / 2 for |z| <= t, and t |z| - t^2 / 2 beyond: convex. (`scipy.optimize.least_squares` has the
    same with loss="huber" and f_scale=t.)

    Args:
        threshold: t, a positive number or 0-d tensor (which may be differentiated), in units of `scale`. None for one
            that is 95 % efficient where residuals are normal with a standard deviation of `scale`.
        scale: the standard deviation of the residuals, once multiplied by the root of their weights: a positive number
            or 0-d tensor, 1 for weights of 1 / variance. Or how it is estimated, jointly with x, so that a fit in km is
            the one in m; derivatives are those of both. "mad" is the median of their sizes / 0.6745; it has no
            derivative, which is refused, where residuals of the same size tie for the median. "huber" is Huber's
            proposal 2: sum min(z^2, 2.5^2) is what normal residuals make of it, for m - n of them. None is 1 where a
            threshold is given, and else "mad".

    Cost: with an estimated scale some 10 fits instead of one, each from the last, and of a derivative two or three.

    Source: Huber, Robust Statistics, Wiley 1981, sections 6.7 and 7.7; the numbers are those of statsmodels' RLM.

    >>> import torch, functional_lstsq as fl
    >>> A = fl.SparseMatrix.from_torch(torch.ones(5, 1, dtype=torch.float64).to_sparse())
    >>> b = torch.tensor([1.0, 1.2, 0.8, 1.1, 50.0], dtype=torch.float64)
    >>> fl.lstsq(A, b), fl.lstsq(A, b, robust=fl.Huber(0.5))
    (tensor([10.8200], dtype=torch.float64), tensor([1.1500], dtype=torch.float64))
    >>> fl.lstsq(A, b, robust=fl.Huber())
    tensor([1.1000], dtype=torch.float64)
    """

    efficient = 1.345
    threshold: float | Tensor | None = None
    scale: str | float | Tensor | None = None

    def cost(self, r: Tensor, w: Tensor, t: Tensor) -> Tensor:
        size = w.sqrt() * r.abs()
        return torch.where(size <= t, w * r.square() / 2, t * size - t.square() / 2)

    def influence(self, r: Tensor, w: Tensor, t: Tensor) -> Tensor:
        outside = w.sqrt() * r.abs() > t
        return torch.where(outside, t * _root(w, outside) * r.sign(), w * r)

    def weight(self, r: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return w * (t / torch.maximum(w.sqrt() * r.abs(), t))


@dataclass(frozen=True)
class Cauchy(Loss):
    """Residuals far beyond a threshold t hardly count at all.

    The loss rho is t^2 / 2 log(1 + (z / t)^2). It is not convex: what is found is a minimum near the start, which is
    the plain least-squares solution where none is given (Holland and Welsch, Comm. Statist. A6(9), 1977).
    (`scipy.optimize.least_squares` has the same with loss="cauchy" and f_scale=t.)

    Args:
        threshold, scale: as for `Huber`.

    >>> import torch, functional_lstsq as fl
    >>> A = fl.SparseMatrix.from_torch(torch.ones(5, 1, dtype=torch.float64).to_sparse())
    >>> fl.lstsq(A, torch.tensor([1.0, 1.2, 0.8, 1.1, 50.0], dtype=torch.float64), robust=fl.Cauchy(0.5))
    tensor([1.0320], dtype=torch.float64)
    """

    efficient = 2.385
    threshold: float | Tensor | None = None
    scale: str | float | Tensor | None = None

    def of(self, q: Tensor) -> Tensor:
        return torch.log1p(q) / 2

    def factor(self, q: Tensor) -> Tensor:
        return 1 / (1 + q)


@dataclass(frozen=True)
class SoftL1(Loss):
    """Between a square and the size, smoothly: t^2 (sqrt(1 + (z / t)^2) - 1), convex; also called pseudo-Huber.

    (`scipy.optimize.least_squares` has the same with loss="soft_l1" and f_scale=t. Charbonnier, Blanc-Féraud, Aubert,
    Barlaud, IEEE Trans. Image Processing 6(2), 1997.)

    Args:
        threshold, scale: as for `Huber`.

    >>> import torch, functional_lstsq as fl
    >>> A = fl.SparseMatrix.from_torch(torch.ones(5, 1, dtype=torch.float64).to_sparse())
    >>> fl.lstsq(A, torch.tensor([1.0, 1.2, 0.8, 1.1, 50.0], dtype=torch.float64), robust=fl.SoftL1(0.5))
    tensor([1.1707], dtype=torch.float64)
    """

    efficient = 1.287
    threshold: float | Tensor | None = None
    scale: str | float | Tensor | None = None

    def of(self, q: Tensor) -> Tensor:
        return q / (1 + (1 + q).sqrt())  # without the difference, which cancels

    def factor(self, q: Tensor) -> Tensor:
        return (1 + q).rsqrt()


@dataclass(frozen=True)
class Arctan(Loss):
    """No residual costs more than pi t^2 / 4: t^2 / 2 arctan((z / t)^2), not convex (see `Cauchy`).

    (`scipy.optimize.least_squares` has the same with loss="arctan" and f_scale=t.)

    Args:
        threshold, scale: as for `Huber`.

    >>> import torch, functional_lstsq as fl
    >>> A = fl.SparseMatrix.from_torch(torch.ones(5, 1, dtype=torch.float64).to_sparse())
    >>> fl.lstsq(A, torch.tensor([1.0, 1.2, 0.8, 1.1, 50.0], dtype=torch.float64), robust=fl.Arctan(0.5))
    tensor([1.0267], dtype=torch.float64)
    """

    efficient = 2.571
    threshold: float | Tensor | None = None
    scale: str | float | Tensor | None = None

    def of(self, q: Tensor) -> Tensor:
        return q.arctan() / 2

    def factor(self, q: Tensor) -> Tensor:
        return 1 / (1 + q.square())


@dataclass(frozen=True)
class Tukey(Loss):
    """Residuals beyond a threshold t do not count: the biweight, t^2 / 6 (1 - (1 - (z / t)^2)^3), then t^2 / 6.

    Not convex (see `Cauchy`): start from the solution of `Huber`, where the plain one is led astray. (Beaton and Tukey,
    Technometrics 16(2), 1974.)

    Args:
        threshold, scale: as for `Huber`.

    >>> import torch, functional_lstsq as fl
    >>> A = fl.SparseMatrix.from_torch(torch.ones(5, 1, dtype=torch.float64).to_sparse())
    >>> b = torch.tensor([1.0, 1.2, 0.8, 1.1, 50.0], dtype=torch.float64)
    >>> fl.lstsq(A, b, robust=fl.Tukey(), x0=fl.lstsq(A, b, robust=fl.Huber()))
    tensor([1.0271], dtype=torch.float64)
    """

    efficient = 4.685
    threshold: float | Tensor | None = None
    scale: str | float | Tensor | None = None

    def of(self, q: Tensor) -> Tensor:
        return torch.where(q < 1, q * (3 - 3 * q + q.square()), 1.0) / 6

    def factor(self, q: Tensor) -> Tensor:
        return torch.where(q < 1, (1 - q).square(), 0.0)


@dataclass(frozen=True)
class Hampel(Loss):
    """As `Huber` to a second threshold; from there on residuals count less and less, and beyond a third one not at all.

    The derivative psi of the loss is z, t sign(z), t sign(z) (c t - |z|) / (c t - b t), and 0, on the pieces that end
    at t, b t and c t. Not convex (see `Cauchy`). (Andrews, Bickel, Hampel, Huber, Rogers, Tukey, Robust Estimates of
    Location, Princeton 1972.)

    Args:
        threshold, scale: as for `Huber`.
        falls, ends: b and c, numbers with 1 <= b < c.

    >>> import torch, functional_lstsq as fl
    >>> A = fl.SparseMatrix.from_torch(torch.ones(5, 1, dtype=torch.float64).to_sparse())
    >>> fl.lstsq(A, torch.tensor([1.0, 1.2, 0.8, 1.1, 5.0], dtype=torch.float64), robust=fl.Hampel(0.5))
    tensor([1.0250], dtype=torch.float64)
    """

    efficient = 2.0
    threshold: float | Tensor | None = None
    scale: str | float | Tensor | None = None
    falls: float = 2.0
    ends: float = 4.0

    def cost(self, r: Tensor, w: Tensor, t: Tensor) -> Tensor:
        z, b, c = w.sqrt() * r.abs() / t, self.falls, self.ends
        falling = (b - 1) / 2 + c / 2 - (c - z.clamp(b, c)).square() / (2 * (c - b))
        return t.square() * torch.where(z <= 1, z.square() / 2, torch.where(z <= b, z - 0.5, falling))

    def influence(self, r: Tensor, w: Tensor, t: Tensor) -> Tensor:
        z, b, c = w.sqrt() * r.abs() / t, self.falls, self.ends
        flat = t * _root(w, z > 1) * r.sign()
        falling = (c * flat - w * r) / (c - b)
        outside = torch.where(z <= b, flat, torch.where(z <= c, falling, 0.0))
        return torch.where(z <= 1, w * r, outside)

    def weight(self, r: Tensor, w: Tensor, t: Tensor) -> Tensor:
        z, b, c = (w.sqrt() * r.abs() / t).clamp_min(1.0), self.falls, self.ends
        return w * torch.where(z <= b, 1 / z, (c / z - 1).clamp_min(0.0) / (c - b))


def _root(w: Tensor, where: Tensor) -> Tensor:
    """w^(1/2) there, 1 elsewhere, where a w of zero would have an infinite derivative."""
    return torch.where(where, w, 1.0).sqrt()


LOSSES = (Huber, Cauchy, SoftL1, Arctan, Tukey, Hampel)


def loss_of(robust: Any, device: torch.device) -> tuple[Square, Tensor]:
    """(loss, threshold as a 0-d tensor in double precision) of a `robust` argument; None is `Square`.

    The threshold is in units of a scale that is estimated, and has one that is given multiplied in.
    """
    if robust is None:
        return Square(), torch.zeros((), dtype=torch.float64, device=device)
    if not isinstance(robust, LOSSES):
        names = ", ".join(f"{kind.__name__}()" for kind in LOSSES)
        raise TypeError(f"robust must be None or one of {names}, got {robust!r}")
    if isinstance(robust, Hampel) and not 1 <= robust.falls < robust.ends < torch.inf:
        raise ValueError(f"falls and ends of robust must be 1 <= falls < ends, got {robust.falls} and {robust.ends}")
    t = _positive("threshold", robust.threshold, device)
    if isinstance(robust.scale, str) and robust.scale not in SCALES:
        raise ValueError(f"scale of robust must be a positive number, 'mad' or 'huber', got {robust.scale!r}")
    if robust.scale is None or isinstance(robust.scale, str):
        return robust, t
    return robust, t * _positive("scale", robust.scale, device)


def given_threshold(robust: Any, t: Tensor) -> Any:
    """The loss with a threshold of t, of no scale."""
    return None if robust is None else replace(robust, threshold=t, scale=None)


def start_threshold(robust: Any, device: torch.device) -> Tensor:
    """The threshold, or one with which a loss is a square, where it must wait for a scale that is estimated."""
    loss, t = loss_of(robust, device)
    return torch.full_like(t, 1e100) if isinstance(getattr(loss, "scale", None), str) else t


def _positive(name: str, t: Any, device: torch.device) -> Tensor:
    """A positive number as a 0-d tensor."""
    number = isinstance(t, (int, float)) and not isinstance(t, bool)
    if not number and not (isinstance(t, Tensor) and t.ndim == 0 and t.is_floating_point()):
        got = f"shape {tuple(t.shape)}, {t.dtype}" if isinstance(t, Tensor) else repr(t)
        raise TypeError(f"{name} of robust must be a positive number or a 0-d real tensor, got {got}")
    t = torch.as_tensor(t, dtype=torch.float64, device=device)
    every = concrete(t)  # of a batch too
    bad = ~((every > 0) & every.isfinite())
    if bool(bad.any()):
        raise ValueError(f"{name} of robust must be positive and finite, got {float(every[bad].reshape(-1)[0]):g}")
    return t


torch.serialization.add_safe_globals(list(LOSSES))  # torch.load takes these
