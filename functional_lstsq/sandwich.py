"""Covariances of a linear fit whose errors have unknown variances, or are dependent within groups: sandwiches.

    C M C        C = (A^H W A + D)^-1        M = A^H diag(omega) A, or the sum over groups g of u_g u_g^H

with residuals r, omega_i = w_i^2 |r_i|^2 times what their leverages h_i ask for, and u_g the sum of a_i^H w_i r_i in g:

    HC0   1                (White, Econometrica 48(4), 1980)
    HC1   m / (m - n)      (MacKinnon and White, J. Econometrics 29(3), 1985, as the next two)
    HC2   1 / (1 - h_i)
    HC3   1 / (1 - h_i)^2
    groups   G / (G - 1) (m - 1) / (m - n)      (Liang and Zeger, Biometrika 73(1), 1986)

Columns j come from V = A C e_j, which K (-V, C e_j) = (0, -e_j) has, and C A^H y from one more solve, of A x = y / w,
where w cancels: neither A^H A nor anything of m x m is formed, and weights of zero divide nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .hat_matrix import BLOCK
from .linear.arguments import pose
from .linear.factorization import Factorization
from .linear.posed import rounded, run, shaped
from .lstsq import solve
from .torch_func.tracing import concrete, is_traced

KINDS = ("HC0", "HC1", "HC2", "HC3")


@dataclass(frozen=True)
class Sandwich:
    """C M C of one fit."""

    A: Factorization
    weighted: Tensor  # w r (m,), zero of a constraint, which has no error
    residual: Tensor  # r (m,), or what stands for it, so that w r times its conjugate is omega
    groups: Tensor | None  # (m,), numbers below `count`
    count: int
    factor: Tensor | float

    def columns(self, which: Tensor) -> Tensor:
        """(n, k)"""
        blocks = [self._columns(block) for block in which.split(BLOCK)]
        return torch.cat(blocks, 1) if blocks else self.A.values.new_zeros((self.A.shape[1], 0))

    def diagonal(self) -> Tensor:
        """(n,), real."""
        blocks = torch.arange(self.A.shape[1], device=self.A.device).split(BLOCK)
        found = [self._diagonal(self._fitted(block)) for block in blocks]
        return torch.cat(found) if found else self.A.values.real.new_zeros(0)

    def _fitted(self, which: Tensor) -> Tensor:
        """V = A C e_j (m, k)."""
        (m, n), A = self.A.shape, self.A
        problem = pose(A, A.values.new_zeros((m, len(which))), None, None, None, None, "raise", "auto", None)
        c = -torch.nn.functional.one_hot(which, n).T.to(problem.b.dtype)
        return rounded(-shaped(run(problem, "raise", c[None])[0], problem), problem, "the covariance")

    def _columns(self, which: Tensor) -> Tensor:
        V = self._fitted(which)
        if self.groups is None:
            y = (self.weighted.conj() * self.residual).real[:, None] * V
        else:
            y = self.residual[:, None] * self._sums(V)[self.groups]
        return self.factor * solve(self.A, y).x

    def _diagonal(self, V: Tensor) -> Tensor:
        if self.groups is not None:
            return self.factor * self._sums(V).abs().square().sum(0)
        # w |r|^2 w |v|^2: of two weights one is in `weighted`.
        w = 1.0 if self.A.weights is None else torch.where(self.A.weights.isinf(), 0.0, self.A.weights)
        omega = w * (self.weighted.conj() * self.residual).real
        return self.factor * (omega[:, None] * V.abs().square()).sum(0)

    def _sums(self, V: Tensor) -> Tensor:
        """u_g^H C e_j (G, k)."""
        assert self.groups is not None
        return V.new_zeros((self.count, V.shape[1])).index_add(0, self.groups, self.weighted.conj()[:, None] * V)


def sandwich(
    A: Factorization, b: Any, kind: Any, groups: Any, left_out: Callable[[Factorization, Tensor], Tensor]
) -> Sandwich:
    """What `covariance` is asked for with b, checked.

    Args:
        left_out: (A, b) -> (m,) residuals r_i / (1 - h_i).
    """
    m, n = A.shape
    if b is None:
        raise ValueError(f"b must be given beside {'kind' if groups is None else 'groups'}, got None")
    if not isinstance(b, Tensor) or b.shape != (m,):
        got = f"shape {tuple(b.shape)}" if isinstance(b, Tensor) else type(b).__name__
        raise ValueError(f"b must be a tensor of shape ({m},), got {got}")
    if groups is None and kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if groups is not None and kind is not None:
        raise ValueError(f"kind must be None beside groups, got {kind!r}")
    number, count = (None, 0) if groups is None else _numbered(groups, m, A.device)
    r = solve(A, b).residual
    counted = torch.full((), m, device=A.device) if A.weights is None else (A.weights > 0).sum()
    if (groups is not None or kind == "HC1") and bool((concrete(counted) <= n).any()):
        raise ValueError(
            f"A must have more rows than columns for {kind or 'groups'}, got {m} x {n}, weights of 0 aside"
        )
    counted = counted.to(r.real.dtype)
    factor: Tensor | float = 1.0
    if groups is not None:
        factor = count / (count - 1) * (counted - 1) / (counted - n)
    elif kind == "HC1":
        factor = counted / (counted - n)
    residual = left_out(A, b) if kind in ("HC2", "HC3") else r
    if A.weights is not None:
        residual = torch.where(A.weights.isinf(), 0.0, residual)
    if not is_traced(residual) and bool(concrete(residual).isnan().any()):
        row = int(concrete(residual).isnan().nonzero()[0, -1])
        raise ValueError(f"kind must be HC0 or HC1 where a row has leverage 1, as row {row} has, got {kind!r}")
    weighted = residual if kind == "HC3" else r
    if A.weights is not None:
        weighted = torch.where(A.weights.isinf(), 0.0, A.weights).to(r.real.dtype) * weighted
    return Sandwich(A, weighted, residual, number, count, factor)


def _numbered(groups: Any, m: int, device: torch.device) -> tuple[Tensor, int]:
    """(the number of each row's group, from 0, how many there are)"""
    groups = groups if isinstance(groups, Tensor) else torch.as_tensor(groups, device=device)
    if groups.shape != (m,) or groups.is_floating_point() or groups.is_complex():
        raise ValueError(f"groups must be integers of shape ({m},), got {groups.dtype}, shape {tuple(groups.shape)}")
    if is_traced(groups):
        raise TypeError("groups must be known before torch.compile or a transformation, got a traced tensor")
    found, number = torch.unique(concrete(groups).to(device), return_inverse=True)
    if len(found) < 2:
        raise ValueError(f"groups must hold at least two groups, got {len(found)}")
    return number, len(found)
