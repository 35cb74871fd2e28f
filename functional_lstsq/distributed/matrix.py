"""`ShardedMatrix`: a matrix of which each rank holds some of the rows, a pytree of these."""

from __future__ import annotations

from typing import Any, cast

import optree
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from ..sparse.matrix import SparseMatrix
from ..sparse.operator import LinearOperator
from ..sparse.pattern import SparsePattern
from ..torch_func.layouts import LAYOUTS
from .collectives import shared_by, total_of, zero_of
from .ranks import Ranks


class ShardedMatrix:
    """What `shard_rows` makes: it stands where A stands in `lstsq` and `solve`, on all ranks of a group together.

    A pytree for torch.func and optree with this rank's `rows` in it: `torch.func.grad(loss)(A)` is a ShardedMatrix, of
    which `rows.values`, or `rows.params`, are the gradient by what this rank has.

    Attributes:
        rows: the rows of this rank, a SparseMatrix or a LinearOperator.
        ranks: the ranks of the group.
        height: how many rows there are on all ranks.
    """

    __slots__ = ("height", "ranks", "rows")
    rows: SparseMatrix | LinearOperator
    ranks: Ranks
    height: int

    def __init__(self, rows: SparseMatrix | LinearOperator, ranks: Ranks, height: int):
        self.rows, self.ranks, self.height = rows, ranks, height

    @property
    def values(self) -> Tensor:
        """The values of this rank's rows, where these have entries."""
        if isinstance(self.rows, LinearOperator):
            raise AttributeError("a ShardedMatrix of operators has no values, but rows.params")
        return self.rows.values

    @property
    def pattern(self) -> SparsePattern:
        """The pattern of this rank's rows, where these have entries."""
        if isinstance(self.rows, LinearOperator):
            raise AttributeError("a ShardedMatrix of operators has no pattern")
        return self.rows.pattern

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), with m of all ranks."""
        return self.height, width_of(self.rows)

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def matmul(self, X: Tensor) -> Tensor:
        """This rank's rows of A X, for X (n,) or (n, k), the same on all ranks; differentiable by both, to any order.

        The derivative by X is summed over ranks, as X is the same on all of them.
        """
        X = shared_by(X, self.ranks.name)
        return self.rows.matmul(X) + self._zero(X)

    __matmul__ = matmul

    def adjoint(self, Y: Tensor) -> Tensor:
        """A^H Y, the same on all ranks, for this rank's rows Y (m,) or (m, k); differentiable by both, to any order."""
        rows = self.rows
        here = rows.adjoint(Y) if isinstance(rows, LinearOperator) else rows.H.matmul(Y)
        return total_of(here + self._zero(Y), self.ranks.name)

    def _zero(self, X: Tensor) -> Tensor | float:
        if not isinstance(self.rows, LinearOperator) or X.ndim > 2:
            return 0.0
        columns = X[None, :, None] if X.ndim == 1 else X[None]
        zero = zero_of([leaf[None] for leaf in torch_pytree.tree_leaves(self.rows.params)], columns)[0]
        return zero[:, 0] if X.ndim == 1 else zero

    def __repr__(self) -> str:
        try:
            return f"ShardedMatrix(shape={self.shape}, rows={self.rows!r}, {self.ranks})"
        except Exception:  # a pytree's leaf may be anything, and the group may have ended
            return f"ShardedMatrix(rows={self.rows!r})"


def shard_rows(A: Any, group: Any = None) -> ShardedMatrix:
    """One matrix of the rows that each rank of a group has, for `lstsq` and `solve`, which solve for all rows together.

    Every rank calls it, and then `lstsq` or `solve`, with its own rows of b and of weights, and with the same damp, x0
    and settings. x and `info` are the same on all ranks to the bit. The residual, and the gradients by b, weights and
    the values of A, or the params of its rows, are those of the rank's rows. All of torch.func goes through, to any
    order, `vmap` over b included. What enters a rank's rows and is the same on all ranks goes through `shared`,
    parameters of operators too, and so does x where it enters a part of the loss that `total` sums up. Solvers are
    `Auto()`, `Dense()`, `Direct()` and `CGLS()`, of operators `CGLS()`. `Direct` searches for
    directions below 5e-7 of the largest singular value, those of the null space included, one by one: of more than 512
    it says that the error could not be estimated.

    `factorize`, `leverage` and `covariance` (but for sandwiches) take it too, where its rows have entries. b and
    weights may be DTensors that are sharded as its rows are; the residual and gradients by autograd then are too, but
    they do not go through torch.func.

    Not to be had are `robust`, CGLS with a preconditioner or a callback, bounds of operators,
    fewer rows in all than columns without damping or rank_deficient="minimum_norm"; and in whole graphs of
    `torch.compile`, which all ranks must compile alike, bounds, operators and factors that are kept.
    A derivative in forward mode is along one direction of all ranks together: `jacfwd` by what is a rank's own would
    move an entry of each rank at once, and is for what is the same on all ranks.

    Args:
        A: (m_r, n) SparseMatrix, torch sparse tensor or LinearOperator of this rank's rows; any number of them, 0 too.
        group: of torch.distributed, gloo for tensors on the CPU; None for all ranks.

    Returns:
        A `ShardedMatrix` of shape (m, n), m being the sum of the m_r.

    Raises:
        TypeError, ValueError: on every rank, an A on any rank that is none, with its rank in the message, or ranks that
            differ in n, in the dtype, or in the number of threads, on which the order of sums depends.
        RuntimeError: torch.distributed is not initialised.
        RankError: a rank was lost. What it stops for, the others learn at the end of the group's timeout at the latest.

    Cost: two all-reduces of some integers. Of a solve with CGLS, for each iteration one all-reduce of n + 3 numbers for
    a column, of 2 n + 6 in one of nine; with Dense n^2 numbers once; with Direct the entries of A^H A once for each set
    of values, and once for each pattern their positions. Memory: this rank's rows, and n numbers for each vector; with
    Dense n^2; with Direct A^H A of all rows and its factor, which every rank makes.

    >>> import torch, functional_lstsq as fl
    >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    >>> rows = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]], dtype=torch.float64).to_sparse()
    >>> A = fl.distributed.shard_rows(rows)
    >>> fl.lstsq(A, torch.tensor([1.0, 2.0, 3.5], dtype=torch.float64))
    tensor([0.9167, 1.2500], dtype=torch.float64)
    >>> torch.distributed.destroy_process_group()
    """
    ranks = Ranks.of(group)
    device = A.device if isinstance(getattr(A, "device", None), torch.device) else torch.device("cpu")

    def checked() -> tuple[tuple[SparseMatrix | LinearOperator, int], dict[str, object]]:
        rows = SparseMatrix.from_torch(A) if isinstance(A, Tensor) and A.layout in LAYOUTS else A
        if not isinstance(rows, (SparseMatrix, LinearOperator)):
            raise TypeError(
                "A must be a SparseMatrix, a LinearOperator or a torch sparse tensor of this rank's rows, got "
                f"{type(A).__name__}"
            )
        facts = {"the number of columns of A": width_of(rows), "the dtype of A": rows.dtype}
        facts["whether A is a LinearOperator"] = isinstance(rows, LinearOperator)
        if isinstance(rows, LinearOperator):
            facts["the dtype= of A"], facts["x"] = rows.given, None if rows.trees is None else rows.trees[0]
        return (rows, rows.shape[0]), facts | {"torch.get_num_threads()": torch.get_num_threads()}

    rows, here = ranks.checked(checked, device)
    height = ranks.sum(torch.tensor([here], dtype=torch.int64, device=device))
    return ShardedMatrix(rows, ranks, int(height))


def width_of(rows: SparseMatrix | LinearOperator) -> int:
    """How many columns there are, without a product."""
    return rows.in_size if isinstance(rows, LinearOperator) else rows.pattern.shape[1]


def _flatten(A: ShardedMatrix) -> tuple[list, tuple]:
    return [A.rows], (A.ranks, A.height)


def _unflatten(leaves: Any, context: tuple) -> ShardedMatrix:
    (rows,) = leaves  # no checks: a pytree holds axes, None or any other object in place of a leaf
    return ShardedMatrix(rows, *context)


torch_pytree.register_pytree_node(ShardedMatrix, _flatten, _unflatten)
cast(Any, optree.register_pytree_node)(
    ShardedMatrix,
    lambda A: ((A.rows,), _flatten(A)[1], ("rows",)),
    lambda context, leaves: _unflatten(leaves, context),
    namespace=optree.registry.__GLOBAL_NAMESPACE,
)
