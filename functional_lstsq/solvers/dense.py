"""Dense factorisation for problems with few columns, batched over values.

    min |A x - b|:   A^H A = L L^H   by Cholesky where the condition number allows it, else
                     A = Q R, R = U S V^H   with Q never stored: rows are taken in blocks (TSQR)

Factor: n^3 / 3 operations after a sparse product for A^H A, or 2 m n^2 and
an SVD of n x n; memory n^2 for each matrix of the batch; a solve is some ten applications of the factor, each n^2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..errors import BY_CGLS, OTHER_SOLVER, SolveError, TooLarge
from ..result import method_code
from ..sparse.double_double import Pair
from ..sparse.numerics import ldexp
from .base import Solver
from .factored import Factored, power
from .memory import available_bytes, fits
from .row_space import RowSpace, Triangles
from .system import System, check_number

# Cholesky of A^H A knows the smallest singular value to a relative n eps cond^2; past this, rows decide.
_CHOLESKY_CONDITION = 1e6
_EXACT = 1e4  # condition number, times the ratio of norms of columns, from which the null space is taken exactly
_BLOCK = 2**24  # entries of a dense block of rows
_PART = 2**20  # entries of the factors of a batch that are made at a time, for them to stay in a cache
SMALL = 128  # columns up to which a compiled function takes less time than LAPACK, and products than power iterations


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
                f"{system.A.places.least(available_bytes(device)):.1e} that are available",
                BY_CGLS,
            )
        return _Factors(system, minimum_norm, self.threshold(system.precision), self.orthogonal)


class _Factors(Factored):
    def __init__(self, system: System, minimum_norm: bool, accept: float, orthogonal: bool):
        super().__init__(system, minimum_norm, accept)
        compiled = system.A.factor(system.d2) if system.n <= SMALL else None
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
        R = _triangle(system, which)
        _, s, Vh = torch.linalg.svd(R)
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
        deficient = ~keep.all(1)
        if bool(deficient.any()):
            self.null = self._row_space(which[deficient], R[deficient], rank[deficient, 0])

    def _row_space(self, which: Tensor, R: Tensor, rank: Tensor) -> RowSpace:
        """Of the matrices `which`, which have triangles R and are of this rank.

        Neither the rank nor the null space depends on the units of rows, but in numbers they do: rows that are tiny
        beside others are nothing but rounding in a column. So both are taken from rows of one size, and where the rank
        differs, nothing is claimed. A tolerance that was asked for is one of A in its own units.
        """
        system, scaled = self.system, self.system.scaling.exponents[which, :, 0]
        shift, rows, found = torch.zeros_like(scaled), None, rank
        if not system.tolerance_given:
            rows = _sizes_of_rows(system, which)
            R = _triangle(system, which, rows)
            shift = torch.frexp(torch.linalg.vector_norm(R, dim=1)).exponent
            R = ldexp(R, -shift[:, None])
            s = torch.linalg.svdvals(R)
            found = (s > system.tolerance * s[:, :1]).sum(1)
        # The condition number magnifies rounding errors of R, and so does a column that is heavier than another.
        spread = (scaled.amax() - scaled.amin()).double().exp2() * self.largest[which] / self.smallest[which]
        exact = system.exact and bool((spread > _EXACT).any())
        gradient = partial(_gradient_of_rows, system, which, rows) if exact else None
        return RowSpace(Triangles(R, scaled, shift, found, rank, which), system.tolerance, gradient)

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
    if system.n <= SMALL:
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


def _sizes_of_rows(system: System, which: Tensor) -> Tensor:
    """Exponents (P', m) of the largest entries of rows of the matrices `which`."""
    place, values = system.A.pattern.indices[0].expand(len(which), -1), system.A.values[which].abs()
    return torch.frexp(values.new_zeros((len(which), system.m)).scatter_reduce(1, place, values, "amax")).exponent


def _gradient_of_rows(system: System, which: Tensor, rows: Tensor | None, N: Pair) -> Tensor:
    """A^H A N of the matrices `which` (P', n, q), A N in extended precision, for rows in units of 2^rows."""
    none = N.high.new_zeros((system.copies, *N.high.shape[1:]))
    whole = Pair(*(none.index_copy(0, which, part) for part in N))
    image = system.weigh(system.exact_residuals.matmul(whole).value)
    if rows is not None:
        unit = -2 * rows[:, :, None]
        image = image.index_copy(0, which, ldexp(image[which], unit))
    found = system.A.adjoint(image)[which]
    if system.d2 is not None:
        d2 = system.d2[which]
        found = found + (d2 if rows is None else (d2 > 0).to(d2.dtype)) * N.high
    return found


def _triangle(system: System, which: Tensor, rows: Tensor | None = None) -> Tensor:
    """R (P', n, n) of the QR factorisations of the matrices `which`, with the damping below A; rows in blocks.

    `rows`: exponents (P', m) of the units of rows, in which those of the damping are ones.
    """
    n, count, where = system.n, len(which), system.A.pattern.rows
    values, d2 = system.A.values[which], system.d2 if system.A.leads else None
    d2 = None if d2 is None else d2[which, :, 0]
    if rows is not None:
        values = ldexp(values, -rows.gather(1, system.A.pattern.indices[0].expand(count, -1)))
        d2 = None if d2 is None else (d2 > 0).to(d2.dtype)
    values = values if where.order is None else values[:, where.order]
    R = values.new_zeros((count, n, n)) if d2 is None else torch.diag_embed(d2.sqrt()).to(values.dtype)
    number = torch.repeat_interleave(torch.arange(system.m, device=values.device), where.pointers.diff())
    height = max(n, _BLOCK // max(1, n * count))
    for top in range(0, system.m, height):
        bottom = min(top + height, system.m)
        first, last = int(where.pointers[top]), int(where.pointers[bottom])
        block = values.new_zeros((count, bottom - top, n))
        block[:, number[first:last] - top, where.indices[first:last].long()] = values[:, first:last]
        R = torch.linalg.qr(torch.cat([R, block], 1), mode="r").R
    return system.A.stacked(R)
