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
from ..result import method_code
from .base import Solver
from .factored import Factored, power
from .memory import available_bytes, fits
from .system import System, check_number

# Cholesky of A^H A knows the smallest singular value to a relative n eps cond^2; past this, rows decide.
_CHOLESKY_CONDITION = 1e6
_BLOCK = 2**24  # entries of a dense block of rows
_PART = 2**20  # entries of the factors of a batch that are made at a time, for them to stay in a cache
_SMALL = 128  # columns up to which a compiled function takes less time than LAPACK, and products than power iterations


@dataclass(frozen=True)
class Dense(Solver):
    """Factor A^H A (or A, where that is too ill-conditioned) densely and refine; finds the rank.

    For problems whose smaller dimension is at most a few thousand. Batched over values.

    Args:
        accept: largest estimated forward error, relative, of an answer that is given; None for eps^(1/3).
        orthogonal: whether a matrix that is too ill-conditioned for Cholesky is factored anew by QR and an SVD, which
            takes many times as long for thousands of columns; otherwise it raises `torch.linalg.LinAlgError`.

    >>> import torch, functional_lstsq as fl
    >>> pattern = fl.SparsePattern(torch.tensor([[0, 1, 2], [0, 0, 1]]), (3, 2))
    >>> A = fl.SparseMatrix(torch.tensor([1.0, 2.0, 3.0]), pattern)
    >>> fl.solve(A, torch.tensor([1.0, 2.0, 3.0]), solver=fl.Dense()).info.method
    'dense-cholesky'
    """

    accept: float | None = None
    orthogonal: bool = True

    def __post_init__(self):
        check_number("accept", self.accept, optional=True, below=1)
        if not isinstance(self.orthogonal, bool):
            raise TypeError(f"orthogonal must be True or False, got {self.orthogonal!r}")

    def prepare(self, system: System, *, minimum_norm: bool) -> _Factors:
        """Factor `system`; the result solves for any right-hand side."""
        wanted, device = factor_bytes(system), system.A.device
        room = fits(wanted, None, device) or wanted <= available_bytes(device)
        if not bool(system.A.everywhere(torch.tensor(room, device=device))):
            raise TooLarge(
                f"method dense was not started: its factors would take about {wanted:.1e} bytes, of "
                f"{available_bytes(device):.1e} that are available",
                BY_CGLS,
            )
        return _Factors(system, minimum_norm, self.threshold(system.precision), self.orthogonal)


class _Factors(Factored):
    def __init__(self, system: System, minimum_norm: bool, accept: float, orthogonal: bool):
        super().__init__(system, minimum_norm, accept)
        compiled = system.A.factor(system.d2) if system.n <= _SMALL else None
        if compiled is not None:
            self.L, extremes = compiled
            self.largest, self.smallest = extremes.sqrt().split(1, 1)
            failed = self.smallest[:, 0].isnan()
        else:
            self.L, self.largest, self.smallest, failed = _factor_in_parts(system)
        doubtful = failed | ~(self.largest[:, 0] < _CHOLESKY_CONDITION * self.smallest[:, 0])
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
            self.null, self.null_slip = self._null_space(torch.where(lost, vectors, 0.0), lost)

    def apply(self, g: Tensor) -> Tensor:
        """(A^H A + d^2)^+ g"""
        if self.inverse is None:
            return _solve(self.L, g)
        return self.inverse @ (self.inverse.mH @ g)


def factor_bytes(system: System) -> int:
    """Memory for the factors of a batch, twice while they are put together, and what is made for a part of it."""
    part = min(system.copies * system.n**2, max(_PART, system.n**2))
    return (2 * system.copies * system.n**2 + 4 * part) * system.A.values.element_size()


def _factor_in_parts(system: System) -> list[Tensor]:
    """[L, largest and smallest singular value, whether there is no L] of all matrices, some at a time."""
    at_once = max(1, _PART // (system.n * max(system.n, system.A.height // 4, 1)))
    parts = [_factor(system, first, first + at_once) for first in range(0, system.copies, at_once)]
    if len(parts) == 1:
        return list(parts[0])
    # Column by column, as LAPACK leaves it and solves with it: any other order would be copied at every solve.
    L = torch.cat([part[0].mT for part in parts]).mT
    return [L, *(torch.cat(numbers) for numbers in list(zip(*parts, strict=True))[1:])]


def _factor(system: System, first: int, last: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_factor_in_parts`, of a part of the batch."""
    scale = system.scale[first:last]
    A = system.A if len(scale) == system.copies else system.A.with_values(system.A.values[first:last])
    gram = A.gram()
    if system.d2 is not None:
        gram.diagonal(dim1=1, dim2=2).add_(system.d2[first:last, :, 0])
    L, failures = torch.linalg.cholesky_ex(gram)
    if system.n <= _SMALL:
        eye = torch.eye(system.n, dtype=gram.dtype, device=gram.device).expand_as(gram)
        inverse = torch.linalg.solve_triangular(L, eye, upper=False)
        largest, smallest = _largest(gram).sqrt(), _largest(inverse @ inverse.mH).rsqrt()
    else:
        largest = power(lambda v: gram @ v, scale, gram.dtype).sqrt()
        smallest = power(lambda v: _solve(L, v), scale, gram.dtype).rsqrt()
    return L, largest, smallest, failures != 0


def _solve(L: Tensor, g: Tensor) -> Tensor:
    """(L L^H)^-1 g; `torch.cholesky_solve` copies L at every call, which takes up to ten times as long."""
    return torch.linalg.solve_triangular(L.mH, torch.linalg.solve_triangular(L, g, upper=False), upper=True)


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
    return system.A.stacked(R)
