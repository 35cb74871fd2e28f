"""The corrections that refinement asks of conjugate gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..sparse.base import norm
from .conjugate_gradients import Run
from .single_precision import SINGLE_CONTRACTION

CONTRACTION = 0.05  # of its error that a correction may leave, after the first, which goes to the tolerance at once


class Corrections:
    """What `refine` corrects by: y of A^H A y + d^2 y = A^H b - c, by conjugate gradients.

    Args:
        factors: an `Iteration`.
        start: y to begin the first solve, for the right-hand side `b`, from; None for zero.

    Attributes:
        limited: (P, k), which columns have run out of iterations.
    """

    def __init__(self, factors: Any, b: Tensor, start: Tensor | None):
        self.factors, self.start, self.left, self.first = factors, start, b, True
        self.single = None if factors.passes_once(b.shape[2]) else factors.certificate.single
        self.limited = factors.certificate.unseen.expand(-1, b.shape[2])
        if start is not None:
            system = factors.system
            weighed = system.weigh(b)
            left = weighed - system.A.matmul(start)
            # A start that is worse than none would leave rounding errors of its own size.
            lost = system.A.norm(left).square()
            lost = lost if system.d2 is None else lost + norm(system.d2.sqrt() * start).square()
            better = (lost < system.A.norm(weighed).square())[:, None]
            self.start, self.left = torch.where(better, start, 0.0), torch.where(better, left, weighed)

    def __call__(self, b: Tensor | None, c: Tensor) -> Run:
        factors, start, single = self.factors, self.start if self.first else None, self.single
        if start is not None:
            b, c = self.left, c + factors.system.damped(start)
        if single is not None:
            assert b is not None
            run = single.solved(b, c, lambda b, c: factors.run(single, b, c, SINGLE_CONTRACTION))
        else:
            run = factors.run(factors.system, b, c, factors.target if self.first else CONTRACTION, start)
        self.first = False
        ran_out = run.iterations >= factors.settings.max_iterations
        # Other columns than those that were asked about are samples of rounding errors.
        ran_out = ran_out if ran_out.shape == self.limited.shape else ran_out.any(1, keepdim=True)
        self.limited = self.limited | ran_out
        return run if start is None else run._replace(y=start + run.y)
