"""The errors of a solve: each says what went wrong, and carries what may be done about it as data.

A command line, which has other words for the same options, words the advice anew.
"""

from __future__ import annotations

import torch

LEAST_NORM = "rank_deficient='minimum_norm' for the solution of least norm"
LEAST_NORM_BY_FACTOR = (
    "rank_deficient='minimum_norm' with solver=None, Direct() or Dense() for the solution of least norm"
)
BY_FACTOR = "solver=Direct() or Dense()"
BY_CGLS = "solver=CGLS()"
OTHER_SOLVER = "another solver"
DAMP = "damp > 0"
EXTENDED = "refine='extended'"
ITERATIONS = "raise max_iterations"
SEE = "throw=False in solve to see how far it came"
MEMORY = "raise memory"
DOUBLE = "double precision"
SCALE_ROWS = "scale the rows of A and b to sizes of about 1"
SCALE = "scale unknowns and equations to sizes of about 1"


class SolveError(torch.linalg.LinAlgError):
    """No answer that can be vouched for.

    Attributes:
        what: what went wrong.
        advice: what may be done about it, in the words of the functions of this library; the message joins both.
    """

    def __init__(self, what: str, *advice: str):
        super().__init__(f"{what}. Try: {'; '.join(advice)}" if advice else what)
        self.what, self.advice = what, advice


class ConvergenceError(SolveError):
    """The estimated forward error of a solve is larger than what the solver accepts."""


class RankDeficientError(SolveError):
    """The matrix has no full rank, so that the solution is not unique and has no derivative in every direction."""


class TooLarge(SolveError, MemoryError):
    """A factor is predicted not to fit into memory, so it was not started; or memory was not to be had."""
