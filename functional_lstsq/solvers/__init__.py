"""Methods for the augmented system, one file each.

A `Solver` is a frozen dataclass of settings that prepares `Factors` of a system, `system.System`: the augmented system
of P matrices on one pattern, in double precision, its columns scaled. One preparation serves the solve, its adjoint,
every row of a Jacobian and every derivative after that.

- base: both as classes, with all that the library asks of them.
- auto, with plan and costs, and cgls, dense, direct: the methods a user can name; small: what dense does, in one
  compiled call; preconditioners: those for `CGLS`; stopped: the iterate after some of its steps.
- conjugate_gradients, refinement, acceptance: the loops that methods share, and the report of what was reached;
  one_pass: conjugate gradients that read A once an iteration; corrections: what refinement asks of them.
- factored, sparse_factor, shifted: solves by a factor, and the sparse Cholesky factor of A^H A.
- inverse_iteration, null_space, row_space, clusters, local, local_basis, ritz, certificate, weakest: extreme singular
  values and what belongs to them.
- scaling: columns of norms of about 1. exact_residuals: residuals in twice the working precision. single_precision:
  iterations in half of it, for large A. memory: how much there is. watching: how far it has come.
"""

import torch

from .auto import Auto
from .base import Factors, Solver
from .cgls import CGLS
from .dense import Dense
from .direct import Direct
from .factored import Factored
from .preconditioners import BlockJacobi, GramFactor

torch.serialization.add_safe_globals([Auto, BlockJacobi, CGLS, Dense, Direct, GramFactor])  # torch.load takes these

__all__ = ["CGLS", "Auto", "BlockJacobi", "Dense", "Direct", "Factored", "Factors", "GramFactor", "Solver"]
