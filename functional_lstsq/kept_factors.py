"""`factorize`: factors that a user keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .distributed.matrix import ShardedMatrix
from .distributed.studies import FACTOR, factorize_together
from .linear.arguments import pose
from .linear.factorization import Factorization, unprepared
from .linear.posed import run
from .linear.settings import check_solver
from .result import Report, info_of
from .sparse.matrix import SparseMatrix
from .sparse.numerics import noise
from .torch_func.tracing import is_traced, sparse_beside_graph


@sparse_beside_graph
def factorize(
    A: SparseMatrix | ShardedMatrix | Tensor,
    *,
    damp: float | Tensor | None = None,
    weights: Tensor | None = None,
    solver: Any = None,
    rank_deficient: str = "raise",
    rank_tolerance: float | None = None,
) -> Factorization:
    """A with factors that are kept, for many solves one after the other, each of which depends on the last.

    The result stands where A stands: in `lstsq`, `solve`, `leverage`, `covariance` and the others, in any number of
    calls, inside and outside of every transformation. Derivatives by the values of A, by damp and by weights are those
    of a solve with A. (A batch of right-hand sides that are all known is faster in one call, as columns or by vmap.)

    Args:
        A: (m, n) SparseMatrix or torch sparse tensor; or a `distributed.ShardedMatrix` with entries.
        damp, weights, rank_deficient, rank_tolerance: as in `lstsq`, decided here for all solves.
        solver: as in `lstsq`; None is `Auto(factor=True)`, which factors where the factors fit into memory.

    Returns:
        A `Factorization`, with `info` of its first solve. The factors are those of the values as they are now: a solve
        after values were changed in place is right, and makes factors of its own, as does one whose b has another
        dtype than A, or with refine="extended".

    Raises: as `lstsq`; TypeError for a LinearOperator.

    Cost: one factorisation and one solve; of a solve that uses them two to ten products with the factors, A and A^H.
    Memory: the factors, for as long as the result lives.

    >>> import torch, functional_lstsq as fl
    >>> A = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64).to_sparse()
    >>> F = fl.factorize(A)
    >>> b = torch.tensor([2.0, 1.0, 3.0], dtype=torch.float64)
    >>> for _ in range(2):
    ...     b = F @ fl.lstsq(F, b)
    >>> b
    tensor([2., 2., 2.], dtype=torch.float64)
    >>> F.info.method
    'dense-cholesky'
    """
    if isinstance(A, ShardedMatrix):
        return factorize_together(A, damp, weights, solver, rank_deficient, rank_tolerance)
    if isinstance(A, Tensor):
        A = SparseMatrix.from_torch(A)
    if not isinstance(A, SparseMatrix):
        raise TypeError(f"A must be a SparseMatrix or a torch sparse tensor, got {type(A).__name__}")
    check_solver(solver, "factorize")
    F = unprepared(A, damp, weights, FACTOR if solver is None else solver, rank_deficient, rank_tolerance)
    with torch.no_grad():
        b = A.matmul(A.values.new_ones(A.shape[1]))
        if rank_tolerance is not None:  # else r would be what is left out of A, of which nothing is known
            b = b + torch.linalg.vector_norm(b) * noise(b.real).to(b.dtype)
        problem = pose(F, b, None, None, None, None, "raise", "auto", None, of="factorize")
        report = run(problem, "raise")[2]
    if is_traced(A.values):
        return F
    return replace(F, info=info_of(Report.unpacked(report), wide=problem.wide, single=True))
