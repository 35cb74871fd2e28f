"""The errors of a solve: each says what went wrong, and carries what may be done about it as data.

The command line, which has other words for the same options, gives its own for each of these (cli/words.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

LEAST_NORM = "rank_deficient='minimum_norm' for the solution of least norm"
LEAST_NORM_BY_FACTOR = (
    "rank_deficient='minimum_norm' with solver=None, Direct() or Dense() for the solution of least norm"
)
FIT_OF_LEAST_CHANGE = "rank_deficient='minimum_norm' where the fit has a gauge"
BY_FACTOR = "solver=Direct() or Dense()"
BY_CGLS = "solver=CGLS()"
OTHER_SOLVER = "another solver"
DAMP = "damp > 0"
EXTENDED = "refine='extended'"
ITERATIONS = "raise max_iterations"
SEE = "throw=False in solve to see how far it came"
NAN = "throw=False in solve for NaN there"
MEMORY = "raise memory"
DOUBLE = "double precision"
SCALE_ROWS = "scale the rows of A and b to sizes of about 1"
SCALE = "scale unknowns and equations to sizes of about 1"
LARGER_THRESHOLD = "a larger threshold of a robust loss"
OTHER_COUNT = "another number of singular values, with a wider gap behind them"


def other_start(point: str) -> str:
    """Advice on where a fit starts; `point` is the argument's name."""
    return f"another {point}"


def nearer_start(point: str) -> str:
    return f"another {point}, nearer to a minimum"


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
    """The matrix has no full rank, so that the solution is not unique and has no derivative in every direction.

    Attributes:
        columns: numbers of some columns that take part in a dependence (of a wide A, of rows), the foremost first;
            empty where the method does not know. `weakest` gives the dependence itself.

    >>> import torch, functional_lstsq as fl
    >>> A = fl.SparseMatrix.from_dense(torch.tensor([[1.0, 0, 2], [0, 1, 0], [0, 1, 0], [1, 0, 2]]))
    >>> try:
    ...     fl.lstsq(A, torch.ones(4))
    ... except fl.RankDeficientError as error:
    ...     sorted(error.columns)
    [0, 2]
    """

    def __init__(self, what: str, *advice: str, columns: Sequence[int] = ()):
        super().__init__(what, *advice)
        self.columns = tuple(columns)


class TooLarge(SolveError, MemoryError):
    """A factor is predicted not to fit into memory, so it was not started; or memory was not to be had."""
