"""A guess of which unknowns of a bounded problem are at their bounds, from which the search for them may begin.

It is made from h = A^T W b and G = A^T W A + D^2, which square the condition number: so nothing rests on it but the
number of solves that the search needs, each of which takes as long as many a guess.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..sparse import small_kernels
from ..sparse.kernels import available
from ..sparse.pattern import find_pattern
from ..sparse.plain_products import Operator
from .pivoting import Bounded

_MOST, _ENTRIES = 512, 2**24  # unknowns of a problem, and entries of all G that are formed at a time


def guess(problems: Bounded, active: Tensor) -> Tensor:
    """What to begin with in the place of `active` (P, n), which is -1, 0, 1 or `BY_DAMPING`, for few unknowns."""
    n = problems.n
    if n > _MOST or not available(active.device):
        return active
    part = max(1, _ENTRIES // n**2)
    every = torch.arange(len(active))
    return torch.cat([_guess(problems.take(some), active[some]) for some in every.split(part)])


def _guess(problems: Bounded, active: Tensor) -> Tensor:
    values, weights, damp, b, lower, upper, indices, static = problems
    root = None if weights is None else weights.sqrt()
    A = Operator(find_pattern(indices, static.m, static.n), values if root is None else values * root[:, indices[0]])
    h = static.total(A.adjoint(b if root is None else root[:, :, None] * b))[:, :, 0]
    G = static.total(A.gram())
    G.diagonal(dim1=1, dim2=2).add_(torch.where(damp.isinf(), 0.0, damp).square())
    usual = (h.isfinite() & G.isfinite().all(2)).all(1)  # not of infinite weights, say
    found = small_kernels.guess_active(torch.where(usual[:, None, None], G, 0.0), h, lower, upper, active)
    return torch.where(usual[:, None], found, active)
