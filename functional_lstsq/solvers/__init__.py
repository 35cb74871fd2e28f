"""Methods for the augmented system, one file each.

A solver is a frozen dataclass of settings with one method, `prepare(system, *, minimum_norm) -> factors`; what it
returns has `solve(b, c) -> (r, y, report)` for right-hand sides (P, m, k) and (P, n, k). So one preparation
serves the solve, its adjoint, every row of a Jacobian and every derivative after that. `system` is a
`solvers.system.System`: the augmented system of P matrices on one pattern, in double precision, columns scaled.
"""

from .auto import Auto
from .cgls import CGLS
from .dense import Dense
from .direct import Direct
from .precondition import BlockJacobi, GramFactor

__all__ = ["CGLS", "Auto", "BlockJacobi", "Dense", "Direct", "GramFactor"]
