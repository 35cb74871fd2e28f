"""A method that `Auto` plans to try, and what is predicted of its cost."""

from __future__ import annotations

import math
from typing import NamedTuple

from . import costs
from .base import Factors, Solver
from .cgls import CGLS, Iteration
from .dense import Dense
from .system import System


class Prediction(NamedTuple):
    """A method that `Auto` would try, and what it is predicted to cost on two cores, to a factor of a few.

    Attributes:
        method, reason: in words, as `SolveInfo.tried` has them.
        seconds: of a solve; of iterating, what the errors of the first iterations promise, or the time after which it
            is left for a factor, where that is less; infinite where these errors do not fall.
        iteration: seconds of one iteration, of a method that iterates; else NaN.
    """

    method: str
    reason: str
    seconds: float
    iteration: float


class Step(NamedTuple):
    """A method, why it has its place, and the seconds that an iteration and a factor in its stead would take.

    `each` are the seconds of an iteration for one column, `iteration` what each of many columns adds. `seconds` are
    those of its own factor, where they are known. `CGLS` gives up when its errors promise more iterations than
    `patience`.
    """

    solver: Solver
    reason: str
    iteration: float = 0.0
    each: float = costs.iteration(0.0)
    factor: float = math.inf
    seconds: float = math.nan
    patience: float = math.inf

    def prepare(self, system: System, *, minimum_norm: bool) -> Factors:
        """Those of the solver."""
        if isinstance(self.solver, CGLS):
            return Iteration(self.solver, system, self.patience)
        return self.solver.prepare(system, minimum_norm=minimum_norm)

    def predicted(self, iterations: float) -> Prediction:
        """What it will cost where about so many iterations find a known solution."""
        if not self.iterates:
            return Prediction(self.name, self.reason, costs.ANYWAY + self.seconds, math.nan)
        seconds = (1 + costs.SOLVE) * iterations * self.each
        seconds = seconds if self.patience == math.inf else min(seconds, self.factor)
        return Prediction(self.name, self.reason, costs.ANYWAY + seconds, self.each)

    @property
    def iterates(self) -> bool:
        return isinstance(self.solver, CGLS)

    @property
    def name(self) -> str:
        return "CGLS" if isinstance(self.solver, CGLS) else "Dense" if isinstance(self.solver, Dense) else "Direct"

    def too_dear(self, prepared: Factors | None, columns: int) -> bool:
        """Whether so many right-hand sides are better left to a factor, by the iterations that are known of."""
        iterations = float(prepared.iterations.max()) if isinstance(prepared, Iteration) else costs.FEWEST
        each = self.each if columns == 1 else columns * self.iteration
        return costs.SOLVE * iterations * each / 2 > self.factor + costs.FACTORED * columns * self.iteration
