"""A system in single precision, for the iterations of conjugate gradients on large problems.

Products in single precision take half the time where memory bounds them. A correction by them is right to some digits
while eps cond^2 is small, and refinement in double precision makes up the others (Carson, Higham, Pranesh, SIAM J. Sci.
Comput. 42(6), 2020).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..sparse.base import Products, norm
from .conjugate_gradients import Run
from .system import System

SINGLE_CONDITION = 30  # largest condition number: eps cond^2 = 1e-4, the error that a correction may leave
SINGLE_CONTRACTION = 1e-4


class SingleSystem(NamedTuple):
    """What conjugate gradients need of a system, in single precision."""

    A: Products
    d2: Tensor | None

    @classmethod
    def of(cls, system: System) -> SingleSystem | None:
        """None where products in single precision would not take much less time, or lose too many digits."""
        A = system.A.single()
        return None if A is None else cls(A, None if system.d2 is None else system.d2.float())

    def solved(self, b: Tensor, c: Tensor, solve: Callable[[Tensor, Tensor], Run]) -> Run:
        """The run of `solve` for (b, c) in double precision and of any size, which single precision has no room for."""
        size = (self.A.norm(b) + norm(c))[:, None]
        size = torch.where(size > 0, size, 1.0)
        run = solve((b / size).to(self.A.dtype), (c / size).to(self.A.dtype))
        r, y = (part.to(b.dtype) * size for part in (run.r, run.y))
        return Run(r, y, run.gamma.to(size.dtype), run.iterations.to(size.dtype))
