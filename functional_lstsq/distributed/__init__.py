"""Rows of A on many ranks, by torch.distributed: `shard_rows`, `shared` and `total`, with every derivative.

Each rank has its own rows of A, b, weights and the residual; x, damp and `info` are the same on all of them, to the
bit. All ranks run the same program.

- matrix: `ShardedMatrix`, the matrix that `shard_rows` makes of the rows of each rank.
- solve: what `lstsq` and `solve` are asked of a sharded matrix, checked.
- studies: `factorize`, `leverage` and `covariance` of it.
- fit: `gauss_newton`, of the residuals of each rank. fit_rows: what such a fit sums up, and decides, over them;
  fit_models: its steps.
- sparse_rows, operator_rows: the primitives over ranks, of rows whose entries are known and of rows known by products.
- heavy_rows: rows of all ranks that weigh much more than others, constraints above all.
- dtensors: DTensors that are sharded by rows, for b and weights.
- bounds: bounds of the unknowns of such a matrix.
- agreement: what all ranks hold against each other before and after a solve.
- products: `Products` over ranks, all that solvers ask of the matrix. places: A^H A of all rows, for sparse factors.
- collectives: the primitives `total` and `shared`, the sum over ranks and its adjoint.
- ranks: a group of torch.distributed: sums, agreement on what must be the same, and errors that all ranks raise.
"""

from .collectives import shared, total
from .fit import ShardedFit, gauss_newton
from .matrix import ShardedMatrix, shard_rows
from .ranks import RankError

__all__ = ["RankError", "ShardedFit", "ShardedMatrix", "gauss_newton", "shard_rows", "shared", "total"]


def __dir__() -> list[str]:
    """The public names alone."""
    return __all__
