"""A sparse Jacobian by few directional derivatives: columns that share no row are taken together.

(Curtis, Powell and Reid, J. Inst. Maths Applics 13, 1974.) Columns are coloured by maximal independent sets (Luby, SIAM
J. Comput. 15(4), 1986), each found by rounds over all entries at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..torch_func.forward_mode import jvp
from .numerics import noise
from .pattern import SparsePattern

_DIRECTIONS = 64  # that are taken together


def colors(pattern: SparsePattern) -> Tensor:
    """(n,) from 0: columns of one colour share no row. There are at least as many as entries in the fullest row."""
    return pattern.keep("colors", lambda: _colors(pattern))


def _colors(pattern: SparsePattern) -> Tensor:
    (m, n), (rows, columns) = pattern.shape, pattern.indices
    rank = torch.argsort(noise(torch.zeros(n, device=pattern.device, dtype=torch.float64))).argsort() + 1  # from 1
    color = torch.full((n,), -1, device=pattern.device)
    number = 0
    while bool((color < 0).any()):
        candidate = color < 0
        while bool(candidate.any()):
            offered = torch.where(candidate, rank, 0)[columns]
            best = rank.new_zeros(m).scatter_reduce(0, rows, offered, "amax")
            beaten = rank.new_zeros(n).scatter_reduce(0, columns, (offered < best[rows]).to(rank.dtype), "amax")
            chosen = candidate & (beaten == 0)
            color = torch.where(chosen, number, color)
            taken = rank.new_zeros(m).scatter_reduce(0, rows, chosen[columns].to(rank.dtype), "amax")
            meets = rank.new_zeros(n).scatter_reduce(0, columns, taken[rows], "amax")
            candidate &= ~chosen & (meets == 0)
        number += 1
    return color


def jacobian_values(function: Callable[[Tensor], Tensor], x: Tensor, pattern: SparsePattern) -> Tensor:
    """The Jacobian of `function` at x (n,), (nnz,) values on `pattern`, which holds all of its nonzeros."""
    color, (rows, columns) = colors(pattern), pattern.indices
    number = torch.arange(int(color.max()) + 1, device=x.device)
    seeds = (color == number[:, None]).to(x.dtype)
    derivatives = torch.vmap(lambda v: jvp(function, (x,), (v,))[1], chunk_size=_DIRECTIONS)(seeds)
    return derivatives[color[columns], rows]
