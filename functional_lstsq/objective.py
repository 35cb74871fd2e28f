"""What `gauss_newton` and robust fits minimise, and its derivatives, by torch.func.

f(x) = sum_i rho(r_i(x); t) + d^2 |x|^2 / 2        g = J^T psi(r) + d^2 x,    psi = rho'
H v  = the derivative of g along v = J^T psi'(r) J v + sum_i psi(r_i) (grad^2 r_i) v + d^2 v
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from .losses import Square
from .pattern import SparsePattern

Leaves = tuple[Tensor, ...]  # t, d, and what the residual depends on besides x


# Not a tuple, which torch.func would take apart at every call.
@dataclass(frozen=True, eq=False)
class Objective:
    """One problem; `residual(x, *given)` -> (m,) and `jacobian(x, *given)` -> its Jacobian's values on `pattern`.

    The Jacobian decides how steps are made. What is accepted rests on derivatives of `residual` by torch.func.
    """

    residual: Callable[..., Tensor]
    jacobian: Callable[..., Tensor]
    pattern: SparsePattern
    loss: Square
    settings: str
    precision: float  # machine epsilon of the user's dtype
    max_iterations: int
    on_failure: str
    linear: bool
    name: str
    start: str  # what must be finite, and where
    point: str  # what the user calls x0

    @property
    def accept(self) -> float:
        """Largest relative error that is accepted."""
        return self.precision ** (1 / 3)

    def cost(self, x: Tensor, t: Tensor, d: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        """(f, r)"""
        r = self.residual(x, *given)
        return self.loss.cost(r, t).sum() + (d * x).square().sum() / 2, r

    def gradient(self, x: Tensor, t: Tensor, d: Tensor, *given: Tensor) -> Tensor:
        pulled: Any = torch.func.vjp(lambda x: self.residual(x, *given), x)
        r, pull = pulled
        return pull(self.loss.influence(r, t))[0] + d.square() * x

    def curvature(self, V: Tensor, x: Tensor, *leaves: Tensor) -> Tensor:
        """H V for V (n, k)."""

        # H is its own transpose, and torch's reverse mode is the faster one.
        pulled: Any = torch.func.vjp(lambda x: self.gradient(x, *leaves), x)
        _, pull = pulled
        return pull(V[:, 0])[0][:, None] if V.shape[1] == 1 else torch.vmap(lambda v: pull(v)[0], 1, 1)(V)

    def slopes(self, x: Tensor, t: Tensor, d: Tensor, *given: Tensor) -> Tensor:
        """The values of J."""
        return self.jacobian(x, *given)

    def weights(self, r: Tensor, leaves: Leaves) -> Tensor:
        """(P, m), of the parabolas that touch the loss in r."""
        return self.loss.weight(r, leaves[0][:, None])


def each(function: Callable, *tensors: Tensor) -> Any:
    """`function` for each of P problems, which is the first dimension of all tensors."""
    if tensors[0].shape[0] == 1:  # with no more demands on the function than a single problem makes
        return torch_pytree.tree_map(lambda result: result[None], function(*(tensor[0] for tensor in tensors)))
    return torch.vmap(function)(*tensors)
