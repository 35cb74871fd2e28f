"""Dense factorisation for problems with few columns, batched over values.

    min |A x - b|:   A^H A = L L^H   by Cholesky where the condition number allows it, else
                     A = Q R, R = U S V^H   with Q never stored: rows are taken in blocks (TSQR)

Factor: n^3 / 3 operations after a sparse product for A^H A, or 2 m n^2 and
an SVD of n x n; memory n^2 for each matrix of the batch; a solve is some ten applications of the factor, each n^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BY_CGLS, OTHER_SOLVER, SolveError, TooLarge
from ..memory import available_bytes, fits
from ..result import method_code
from .factored import Factored, power
from .system import System, check_number

# Cholesky of A^H A knows the smallest singular value to a relative n eps cond^2; past this, rows decide.
_CHOLESKY_CONDITION = 1e6
_BLOCK = 2**24  # entries of a dense block of rows
_SQUARED = 128  # columns up to which a few products of matrices take less time than power iterations


@dataclass(frozen=True)
class Dense:
    """Factor A^H A (or A, where that is too ill-conditioned) densely and refine; finds the rank.

    For problems whose smaller dimension is at most a few thousand. Batched over values.

    Args:
        accept: largest estimated forward error, relative, of an answer that is given; None for eps^(1/3).
        orthogonal: whether a matrix that is too ill-conditioned for Cholesky is factored anew by QR and an SVD, which
            takes many times as long for thousands of columns; otherwise it raises `torch.linalg.LinAlgError`.

    >>> import functional_lstsq as fl
    >>> pattern = fl.SparsePattern(torch.tensor([[0, 1, 2], [0, 0, 1]]), (3, 2))
    >>> A = fl.SparseMatrix(torch.tensor([1.0, 2.0, 3.0]), pattern)
    >>> fl.solve(A, torch.tensor([1.0, 2.0, 3.0]), solver=fl.Dense()).info.method
    'dense-cholesky'
    """

    accept: float | None = None
    orthogonal: bool = True

    def __post_init__(self):
        check_number("accept", self.accept, optional=True)
        if not isinstance(self.orthogonal, bool):
            raise TypeError(f"orthogonal must be True or False, got {self.orthogonal!r}")

    def prepare(self, system: System, *, minimum_norm: bool) -> _Factors:
        """Factor `system`; the result solves for any right-hand side."""
        system.accept = self.accept or system.accept
        wanted, device = factor_bytes(system), system.A.device
        if not fits(wanted, None, device) and wanted > available_bytes(device):
            raise TooLarge(
                f"method dense was not started: its factors would take about {wanted:.1e} bytes, of "
                f"{available_bytes(device):.1e} that are available",
                BY_CGLS,
            )
        return _Factors(system, minimum_norm, self.orthogonal)


class _Factors(Factored):
    def __init__(self, system: System, minimum_norm: bool, orthogonal: bool):
        super().__init__(system, minimum_norm)
        gram = system.A.gram()
        if system.d2 is not None:
            gram.diagonal(dim1=1, dim2=2).add_(system.d2[:, :, 0])
        self.L, failures = torch.linalg.cholesky_ex(gram)
        if system.n <= _SQUARED:
            eye = torch.eye(system.n, dtype=gram.dtype, device=gram.device).expand_as(gram)
            inverse = torch.linalg.solve_triangular(self.L, eye, upper=False)
            self.largest, self.smallest = _largest(gram).sqrt(), _largest(inverse @ inverse.mH).rsqrt()
        else:
            self.largest = power(lambda v: gram @ v, system).sqrt()
            self.smallest = power(lambda v: torch.cholesky_solve(v, self.L), system).rsqrt()
        doubtful = (failures != 0) | ~(self.largest[:, 0] < _CHOLESKY_CONDITION * self.smallest[:, 0])
        self.rank = torch.full_like(self.largest, system.n)
        self.inverse: Tensor | None = None
        self.method = torch.where(doubtful, method_code("dense-qr"), method_code("dense-cholesky"))[:, None]
        if bool(doubtful.any()):
            if not orthogonal:
                raise SolveError("method dense-cholesky: A is too ill-conditioned for a factor of A^H A", OTHER_SOLVER)
            self._decompose(doubtful.nonzero()[:, 0])

    def _decompose(self, which: Tensor) -> None:
        """Singular values and vectors of the matrices `which`, without squaring the condition number."""
        system = self.system
        _, s, Vh = torch.linalg.svd(_triangle(system, which))
        V = Vh.mH
        keep = s > system.tolerance * s[:, :1]  # none of a matrix of zeros, whose condition number is set to 1
        rank = keep.sum(1, keepdim=True)
        self.rank[which] = rank.to(self.rank.dtype)
        self.largest[which] = torch.where(rank > 0, s[:, :1], 1.0)
        self.smallest[which] = torch.where(rank > 0, s.gather(1, (rank - 1).clamp_min(0)), 1.0)
        everything = torch.zeros_like(self.L)
        sound = torch.ones(system.copies, dtype=torch.bool, device=which.device)
        sound[which] = False
        eye = torch.eye(system.n, dtype=V.dtype, device=V.device)
        everything[sound] = torch.linalg.solve_triangular(self.L[sound], eye, upper=False).mH
        everything[which] = V * torch.where(keep, 1 / s, 0.0)[:, None]
        self.inverse = everything  # B with B B^H = (A^H A + d^2)^+
        nullity = int((~keep).sum(1).max())
        if nullity:
            lost = keep.new_zeros((system.copies, 1, nullity))
            lost[which] = ~keep.flip(1)[:, None, :nullity]  # null vectors first, zeros behind
            vectors = torch.zeros_like(everything[:, :, :nullity])
            vectors[which] = V.flip(2)[:, :, :nullity]
            self._find_null_space(torch.where(lost, vectors, 0.0), lost)

    def apply(self, g: Tensor) -> Tensor:
        """(A^H A + d^2)^+ g"""
        if self.inverse is None:
            return torch.cholesky_solve(g, self.L)
        return self.inverse @ (self.inverse.mH @ g)


def factor_bytes(system: System) -> int:
    """Memory for the factors of a batch: A^H A, its factor, and one more while they are made."""
    return 3 * system.copies * system.n**2 * system.A.values.element_size()


def _largest(M: Tensor) -> Tensor:
    """The largest eigenvalue (P, 1) of positive definite M (P, n, n), too large by n^(1/8) at most: |M^4|_F^(1/4)."""
    M = M @ M
    return torch.linalg.matrix_norm(M @ M)[:, None] ** 0.25


def _triangle(system: System, which: Tensor) -> Tensor:
    """R (P', n, n) of the QR factorisations of the matrices `which`, with the damping below A; rows in blocks."""
    n, count, where = system.n, len(which), system.A.pattern.rows
    values = system.A.values[which]
    values = values if where.order is None else values[:, where.order]
    if system.d2 is None:
        R = values.new_zeros((count, n, n))
    else:
        R = torch.diag_embed(system.d2[which, :, 0].sqrt()).to(values.dtype)
    rows = torch.repeat_interleave(torch.arange(system.m, device=values.device), where.pointers.diff())
    height = max(n, _BLOCK // max(1, n * count))
    for top in range(0, system.m, height):
        bottom = min(top + height, system.m)
        first, last = int(where.pointers[top]), int(where.pointers[bottom])
        block = values.new_zeros((count, bottom - top, n))
        block[:, rows[first:last] - top, where.indices[first:last].long()] = values[:, first:last]
        R = torch.linalg.qr(torch.cat([R, block], 1), mode="r").R
    return R
