"""Preconditioners for `CGLS`: what stands for (A^H A + damp^2)^-1, so that iterations are fewer.

A preconditioner changes how fast an answer is reached and never which answers are accepted. Columns are scaled to norms
of about 1 in any case (van der Sluis, Numer. Math. 14, 1969), which is what there is without one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import RankDeficientError
from ..sparse.base import dot
from ..sparse.csr_product import sparse_product
from ..sparse.matrix import SparseMatrix, single
from ..sparse.numerics import noise
from ..sparse.pattern import SparsePattern
from ..sparse.plain_products import Operator
from ..torch_func.tracing import concrete
from .dense import Dense
from .direct import Direct
from .system import EPS, System, check_number

_DENSE_COLUMNS = 500

Apply = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class BlockJacobi:
    """The inverse of the diagonal blocks of A^H A + damp^2 that belong to groups of columns.

    For columns that are coupled strongly within small groups: the coefficients of one body, cell or camera. It needs
    the entries of A, so not for a LinearOperator.

    Args:
        groups: (n,) integer tensor, the group of each column (of each row, where A is wide). A group of s columns takes
            s^2 numbers of memory, as large as the largest group for each, and s^3 / 3 operations.

    Raises:
        TypeError, ValueError: groups are not integers; a solve raises them for groups not of shape (n,) and for a
            LinearOperator.

    Source: Saad, Iterative Methods for Sparse Linear Systems, SIAM 2003, section 10.2.

    >>> import torch, functional_lstsq as fl
    >>> A = fl.SparseMatrix.from_torch(torch.eye(6, 4, dtype=torch.float64).to_sparse())
    >>> solver = fl.CGLS(preconditioner=fl.BlockJacobi(torch.tensor([0, 0, 1, 1])))
    >>> fl.lstsq(A, torch.arange(6.0), solver=solver)
    tensor([0., 1., 2., 3.], dtype=torch.float64)
    """

    groups: Tensor

    def __post_init__(self):
        groups = self.groups
        if not isinstance(groups, Tensor) or groups.is_floating_point() or groups.is_complex() or groups.ndim != 1:
            got = f"{groups.dtype}, shape {tuple(groups.shape)}" if isinstance(groups, Tensor) else repr(groups)
            raise TypeError(f"groups must be an integer tensor of shape (n,), got {got}")

    def prepare(self, system: System) -> Apply:
        """(P, n, k) -> (P, n, k), in the scaled unknowns."""
        A, n = system.A, system.n
        if len(self.groups) != n:
            raise ValueError(f"groups must have shape ({n},), one for each column, got {tuple(self.groups.shape)}")
        _, group, sizes = self.groups.to(A.device).unique(return_inverse=True, return_counts=True)
        count, width = len(sizes), int(sizes.max())
        order = torch.argsort(group, stable=True)
        place = torch.empty_like(order)  # of a column within its group
        place[order] = torch.arange(n, device=A.device) - (sizes.cumsum(0) - sizes)[group[order]]
        # With a row of its own for every pair of a row and a group, A^H A has these blocks only.
        rows, columns = A.pattern.indices
        pairs, rows = (rows * count + group[columns]).unique(return_inverse=True)
        apart = Operator(SparsePattern(torch.stack([rows, columns]), (len(pairs), n)), A.values)
        found = sparse_product(apart.columns.csr, apart.rows.csr).to_sparse_coo()
        i, j = found.indices()
        blocks = A.values.new_zeros((system.copies, count, width, width))
        blocks[i // n, group[i % n], place[i % n], place[j % n]] = found.values()
        diagonal = blocks.diagonal(dim1=2, dim2=3)
        if system.d2 is not None:
            diagonal[:, group, place] += system.d2[:, :, 0]
        diagonal += torch.where(diagonal == 0, 1.0, n * EPS * diagonal)  # what has no column, and rounding
        L, failures = torch.linalg.cholesky_ex(blocks)
        eye = torch.eye(width, dtype=blocks.dtype, device=blocks.device)
        inverse = torch.cholesky_inverse(torch.where((failures != 0)[:, :, None, None], eye, L))

        def apply(g: Tensor) -> Tensor:
            padded = g.new_zeros((system.copies, count, width, g.shape[2]))
            padded[:, group, place] = g
            return (inverse @ padded)[:, group, place]

        return apply


class GramFactor:
    """A factor of A^H A + damp^2 kept for other matrices that are near A: those of the next steps of a training loop.

    Args:
        A: (m, n) SparseMatrix of full rank, or a torch sparse tensor. Where it is wide, A A^H is meant.
        damp: non-negative number or None, as in `lstsq`.
        solver: `Direct()` or `Dense()`, which factors it; None for `Dense()` up to 500 columns.

    Raises:
        RankDeficientError: A has no full rank (with damp, [A; damp I] has not).
        torch.linalg.LinAlgError: there is no such factor, or it does not fit into memory.

    Cost: one factorisation. A factor of values that differ by a relative d leaves a factor of about d times the
    condition number of the error in an iteration.

    >>> import torch, functional_lstsq as fl
    >>> pattern = fl.SparsePattern(torch.tensor([[0, 1, 2, 2], [0, 1, 0, 1]]), (3, 2))
    >>> values, b = torch.tensor([1.0, 1.0, -1.0, 1.0], dtype=torch.float64), torch.tensor([1.0, 2.0, 3.5])
    >>> solver = fl.CGLS(preconditioner=fl.GramFactor(fl.SparseMatrix(values, pattern)))
    >>> fl.lstsq(fl.SparseMatrix(1.001 * values, pattern), b, solver=solver)
    tensor([0.1665, 2.8305], dtype=torch.float64)
    """

    def __init__(self, A: SparseMatrix | Tensor, *, damp: float | None = None, solver: Dense | Direct | None = None):
        if isinstance(A, Tensor):
            A = SparseMatrix.from_torch(A)
        if not isinstance(A, SparseMatrix):
            raise TypeError(f"A must be a SparseMatrix or a torch sparse tensor, got {type(A).__name__}")
        single(A, "A")
        check_number("damp", damp, optional=True)
        if solver is not None and not isinstance(solver, (Dense, Direct)):
            raise TypeError(f"solver must be Dense() or Direct(), got {solver!r}")
        solver = solver or (Dense() if min(A.shape) <= _DENSE_COLUMNS else Direct())
        A = A if A.shape[0] >= A.shape[1] else A.H
        values = concrete(A.values).detach().resolve_conj().to(torch.promote_types(A.dtype, torch.float64))
        d = None if damp is None else torch.full((1, 1), damp, dtype=torch.float64, device=A.device)
        self._system = System(Operator(A.pattern, values[None]), d, torch.finfo(values.dtype).eps)
        self._factors = solver.prepare(self._system, minimum_norm=False)
        rank, full = int(self._factors.rank), self._system.n
        if rank < full:
            raise RankDeficientError(f"A has rank {rank}, not full rank {full}", "damp > 0 for GramFactor", "another A")

    def __call__(self, g: Tensor) -> Tensor:
        """(A^H A + damp^2)^-1 g, to some digits, for g of shape (n, k)."""
        scale = self._system.scale
        return (self._factors.apply(g[None] / scale) / scale)[0]


def prepared(preconditioner: Any, system: System) -> Apply:
    """What applies `preconditioner` in the scaled unknowns, checked on a vector or two."""
    apply = preconditioner.prepare(system) if hasattr(preconditioner, "prepare") else _called(preconditioner, system)
    u, v = noise(system.scale.expand(-1, -1, 2)).to(system.A.dtype).split(1, 2)
    of_u, of_v = apply(u), apply(v)
    sizes = dot(u, of_u), dot(v, of_v)
    apart = (dot(u, of_v) - dot(of_u, v)).abs()
    if not bool(((sizes[0] > 0) & (sizes[1] > 0) & (apart <= 1e-6 * (sizes[0] + sizes[1]))).all()):
        raise ValueError(
            f"preconditioner must be Hermitian and positive definite, got u^H M u = {float(sizes[0].min()):.3g}, "
            f"v^H M v = {float(sizes[1].min()):.3g} and Re u^H M v - Re (M u)^H v = {float(apart.max()):.3g} for two "
            "random vectors"
        )
    return apply


def _called(function: Callable[[Tensor], Tensor], system: System) -> Apply:
    """`function`, of (n, k) in the user's unknowns, in the scaled ones; a batch of matrices has one preconditioner."""

    def apply(g: Tensor) -> Tensor:
        copies, n, k = g.shape
        result = function((g * system.scale).movedim(0, 1).reshape(n, copies * k))
        if not isinstance(result, Tensor) or result.shape != (n, copies * k) or result.dtype != g.dtype:
            what = type(result).__name__
            got = f"{result.dtype}, shape {tuple(result.shape)}" if isinstance(result, Tensor) else what
            raise ValueError(f"preconditioner must return a tensor of {g.dtype}, shape ({n}, {copies * k}), got {got}")
        return result.detach().view(n, copies, k).movedim(1, 0) * system.scale

    return apply
