"""A sparse Jacobian by few directional derivatives: columns that share no row are taken together.

(Curtis, Powell and Reid, J. Inst. Maths Applics 13, 1974.) Columns that share rows with most others come first (Welsh
and Powell, Comput. J. 10(1), 1967). Where there are compiled kernels each gets the first colour that is free; elsewhere
each colour is a maximal independent set, found by rounds over all entries at once (Luby, SIAM J. Comput. 15(4), 1986).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..torch_func.forward_mode import jvp
from . import kernels
from .numerics import noise
from .pattern import SparsePattern

_DIRECTIONS = 64  # that are taken together


def colors(pattern: SparsePattern) -> Tensor:
    """(n,) from 0: columns of one colour share no row. There are at least as many as entries in the fullest row."""
    return pattern.keep("colors", lambda: _colors(pattern))


def _colors(pattern: SparsePattern) -> Tensor:
    (m, n), (rows, columns) = pattern.shape, pattern.indices
    lengths = pattern.rows.pointers.diff().to(torch.float64)
    shared = lengths.new_zeros(n).scatter_add_(0, columns, lengths[rows])
    order = torch.argsort(shared + noise(shared) / 2, descending=True)
    if kernels.available(pattern.device):
        return kernels.color_columns(pattern, order)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(n, 0, -1, device=order.device))
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
