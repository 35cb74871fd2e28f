"""How a solution moves with A: an estimate of the condition number, and products with its Jacobian by the values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .linear.settings import check_solver
from .lstsq import lstsq, solve
from .sparse.jacobian_operator import JacobianOperator
from .sparse.matrix import SparseMatrix
from .sparse.operator import LinearOperator
from .sparse.pattern import SparsePattern
from .torch_func.tracing import sparse_beside_graph


@sparse_beside_graph
def condition(A: SparseMatrix | LinearOperator | Tensor, *, solver: Any = None) -> Tensor:
    """An estimate of the 2-norm condition number of A with its columns (rows, where it is wide) scaled to norm 1.

    Args:
        A: as in `lstsq`.
        solver: as in `lstsq`.

    Returns:
        0-d, infinite without full rank, a lower bound where `CGLS` ran out of iterations. It carries no derivative.

    Cost: one solve.

    >>> import torch, functional_lstsq as fl
    >>> A = torch.tensor([[1.0, 1.0], [0, 1e-3], [0, 0]], dtype=torch.float64).to_sparse()
    >>> bool(abs(fl.condition(A) / 2e3 - 1) < 0.5)
    True
    """
    check_solver(solver, "condition")
    if isinstance(A, Tensor):
        A = SparseMatrix.from_torch(A)
    A = A.of_vectors if isinstance(A, LinearOperator) else A
    posed = A.posed(A.dtype, "raise")[0] if isinstance(A, LinearOperator) else A
    b = posed.matmul(torch.ones(A.shape[1], dtype=A.dtype, device=A.device)).to(A.dtype)
    return solve(A, b, solver=solver, throw=False).info.condition


@sparse_beside_graph
def jacobian_operator(A: SparseMatrix, b: Tensor, **options: Any) -> LinearOperator:
    """d x / d values for x = lstsq(A, b), as a LinearOperator that is never formed.

    Args:
        A: (m, n) SparseMatrix.
        b: (m,).
        options: those of `lstsq`.

    Returns:
        J of shape (n, nnz): `J @ v` for v (nnz,) or (nnz, k), `J.adjoint(y)` for y (n,) or (n, k), aligned to the
        pattern's indices.

    Cost: of a product, two solves with one factorisation, whatever the number of columns.

    >>> import torch, functional_lstsq as fl
    >>> pattern = fl.SparsePattern(torch.tensor([[0, 1, 2, 2], [0, 1, 0, 1]]), (3, 2))
    >>> A = fl.SparseMatrix(torch.tensor([1.0, 1.0, -1.0, 1.0], dtype=torch.float64), pattern)
    >>> J = fl.jacobian_operator(A, torch.tensor([1.0, 2.0, 3.5], dtype=torch.float64))
    >>> J.shape
    (2, 4)
    >>> J.adjoint(torch.tensor([1.0, 0.0], dtype=torch.float64))
    tensor([ 0.4444, -1.2222,  0.6111,  1.2222], dtype=torch.float64)
    """
    if not isinstance(A, SparseMatrix):
        raise TypeError(f"A must be a SparseMatrix, got {type(A).__name__}")
    if not isinstance(b, Tensor) or b.shape != A.shape[:1]:
        got = f"shape {tuple(b.shape)}" if isinstance(b, Tensor) else type(b).__name__
        raise ValueError(f"b must be a tensor of shape ({A.shape[0]},), got {got}")
    return JacobianOperator(_OfValues(A.pattern, b, options), A.values)


@dataclass(frozen=True)
class _OfValues:
    """The solution as a function of the values, which can be pickled."""

    pattern: SparsePattern
    b: Tensor
    options: dict[str, Any]

    def __call__(self, values: Tensor) -> Tensor:
        return lstsq(SparseMatrix(values, self.pattern), self.b, **self.options)
