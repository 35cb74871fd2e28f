"""The condition number of a matrix B by what conjugate gradients met on the way to a solution that was known."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_STEPS = 3  # power iterations, with which it comes out at 1 to 1.1 times too small


def condition_met(gradients: list[Tensor], energies: list[Tensor], steps: Tensor) -> Tensor:
    """A lower bound (P, k) of the condition number of B, from |g_j| and |B e_j| with the errors e_j, B^H B e_j = g_j.

    The v_j = g_j / |g_j| are orthonormal. With E_j = |B e_j|^2, and alpha_j = (E_j - E_j+1) / |g_j|^2,

        v_i^H (B^H B)^-1 v_j = E_max(i,j) / (|g_i| |g_j|)     V^H B^H B V = L diag(1 / alpha) L^H

    where L has ones and, below them, |g_j+1| / |g_j|, but for signs that eigenvalues do not depend on (Meurant and
    Tichy, Numer. Algorithms 82, 2019). The largest eigenvalue of either, by power iterations, is a lower bound of that
    of the matrix, and close where the errors have become small in every direction.

    Args:
        gradients, energies: |g_j| and |B e_j|, each (P, k), one more of them than steps; zero gradients are left out.
        steps: (P, k), how many were taken in each column.
    """
    size, E = torch.stack(gradients).double(), torch.stack(energies).double().square()
    step = torch.arange(len(size), device=size.device)[:, None, None]
    inverse_size = torch.where((step <= steps) & (size > 0), 1 / size, 0.0)
    drop, below = E[:-1] - E[1:], size[1:] * inverse_size[:-1]
    # What is left of a difference that cancels may be far too small; without its step the bound is a lower one still.
    certain = (step[:-1] < steps) & (drop > torch.finfo(energies[0].dtype).eps ** 0.5 * E[:-1])
    inverse_alpha = torch.where(certain, size[:-1].square() / drop, 0.0)

    def inverse(z: Tensor) -> Tensor:
        z = inverse_size * z
        later = E * z
        return inverse_size * (E * z.cumsum(0) + later.sum(0) - later.cumsum(0))

    def square(z: Tensor) -> Tensor:
        z = inverse_alpha * (z[:-1] + below * z[1:])
        none = torch.zeros_like(z[:1])
        return torch.cat([z, none]) + torch.cat([none, below * z])

    def largest(apply: Callable[[Tensor], Tensor]) -> Tensor:
        z = torch.ones_like(size)
        for _ in range(_STEPS):
            z = apply(z / torch.linalg.vector_norm(z, dim=0).clamp_min(torch.finfo(z.dtype).tiny))
        return torch.linalg.vector_norm(z, dim=0)

    return (largest(inverse) * largest(square)).sqrt()
