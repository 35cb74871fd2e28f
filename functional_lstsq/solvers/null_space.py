"""The null space of the unscaled matrix: an orthonormal basis of it, made accurate, and kept sparse where it is.

    A D^-1 Z = 0:    Z -= A^+ A Z, three times;    D^-1 Z, made orthonormal, times D is the next Z

The null space is D^-1 times that of the scaled matrix A D^-1. D^-1 magnifies the errors of Z in columns of small norm,
so they are corrected for Z, and once more for an orthonormal basis of what D^-1 has made of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..sparse.double_double import EPS_EXTENDED, Pair, Single
from ..sparse.numerics import noise
from ..sparse.pattern import SparsePattern
from ..sparse.plain_products import Operator
from .system import EPS


def refine_null_space(
    Z: Tensor,
    scale: Tensor,
    orthonormal: Callable[..., Tensor],
    correction: Callable[[Pair | Single], Tensor],
    *,
    exact: bool,
) -> tuple[Tensor, Tensor]:
    """(an orthonormal basis of the null space, an estimate of its errors), each (P, n, q).

    Args:
        Z: approximate null vectors of the scaled matrix, zeros where there are fewer.
        scale: D (P, n, 1).
        orthonormal: of vectors like Z, and `by_rows`, as the function of that name.
        correction: A^+ A Z.
        exact: carry Z as a pair.
    """
    null = Z / scale
    for _ in range(2):
        Z = orthonormal(null) * scale
        whole: Pair | Single = Pair.of(Z) if exact else Single(Z)
        for _ in range(3):
            moved = correction(whole)
            whole = whole.plus(-moved)
        null = whole.high / scale
    # Reflections would leave errors as large as a whole column of `null` in each of its rows, which are tiny in columns
    # of A of large norm. The factor R is nearly one by now, and a solution with it has errors of each row's own size.
    null = orthonormal(null, by_rows=True)
    slip = moved / scale + EPS * null * noise(null)
    if exact:  # exact products cut slices of Z off there, whatever D^-1 makes of what is lost
        cut = EPS_EXTENDED * (null * scale).abs().amax(1, keepdim=True) / scale
        slip = slip + cut * noise(cut)
    return null, slip


def orthonormal(null: Tensor, lost: Tensor, *, by_rows: bool = False) -> Tensor:
    """An orthonormal basis of the columns `lost` (..., 1, q) of `null` (..., n, q); the others are zeros.

    `by_rows`: with errors in proportion to each row, for columns that are nearly orthonormal.
    """
    null = null / torch.where(lost, torch.linalg.vector_norm(null, dim=-2, keepdim=True), 1.0)
    Q, R = torch.linalg.qr(null)
    if by_rows:
        one = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
        Q = torch.linalg.solve_triangular(torch.where(lost | lost.mT, R, one), null, upper=True, left=False)
    return torch.where(lost, Q, 0.0)  # QR makes up directions for the columns of zeros


class NullSpace:
    """The null space of the unscaled matrices of a batch, as what solvers need of it."""

    def project(self, x: Tensor) -> Tensor:
        """The part of x (P, n, k) in the row space."""
        raise NotImplementedError

    def outside(self, x: Tensor) -> Tensor:
        """The part of x in the null space."""
        raise NotImplementedError

    def errors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Estimates of the errors of `project` (in the row space, in the null space)."""
        raise NotImplementedError

    def basis(self, scale: Tensor) -> Tensor | SparseVectors:
        """A basis of the null space of the matrix with columns scaled by D = `scale` (P, n, q), or zeros behind it."""
        raise NotImplementedError


class NullVectors(NullSpace):
    """By an orthonormal basis Z (P, n, q), zeros where a matrix has fewer vectors, and an estimate of its errors."""

    def __init__(self, Z: Tensor | SparseVectors, slip: Tensor | SparseVectors, empty: Tensor):
        self.Z, self.slip, self.empty = Z, slip, empty[:, :, None]

    def project(self, x: Tensor) -> Tensor:
        """The part of x (P, n, k) in the row space."""
        return torch.where(self.empty, 0.0, x - self.outside(x))

    def outside(self, x: Tensor) -> Tensor:
        """The part of x in the null space."""
        return self.Z @ (self.Z.mH @ x)

    def errors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """An error dZ of Z moves x - Z Z^H x by dZ Z^H x and Z dZ^H x."""
        lost = self.Z.mH @ x
        inside = self.slip @ lost
        return inside + EPS * noise(inside) * (self.Z.abs() @ lost.abs()), self.Z @ (self.slip.mH @ x)

    def basis(self, scale: Tensor) -> Tensor | SparseVectors:
        """D Z, or the sparse Z itself."""
        return self.Z if isinstance(self.Z, SparseVectors) else scale * self.Z


class SparseVectors:
    """Sparse vectors that stand where a dense tensor Z (P, n, q) of them does, in products with Z and Z^H.

    Each belongs to one matrix of the batch: together they are the columns of one matrix (P n, q).
    """

    def __init__(self, operator: Operator, copies: int):
        self.operator, self.copies = operator, copies

    @classmethod
    def of(
        cls, rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int], copies: int = 1
    ) -> SparseVectors:
        return cls(Operator(SparsePattern(torch.stack([rows, columns]), shape), values[None]), copies)

    @classmethod
    def together(cls, parts: list[tuple[int, SparseVectors]], copies: int) -> SparseVectors:
        """Vectors of single matrices, each with the number of its matrix, as those of a batch."""
        n, count, where, values = parts[0][1].operator.m, 0, [], []
        for p, part in parts:
            rows, columns = part.operator.pattern.indices
            where.append(torch.stack([p * n + rows, count + columns]))
            values.append(part.operator.values[0])
            count += part.operator.n
        rows, columns = torch.cat(where, 1)
        return cls.of(rows, columns, torch.cat(values), (copies * n, count), copies)

    @classmethod
    def from_dense(cls, Z: Tensor, mask: Tensor) -> SparseVectors:
        """The columns (n, q) of Z where `mask` (q,) holds."""
        Z = Z[:, mask]
        where = torch.ones_like(Z, dtype=torch.bool).nonzero().T
        return cls.of(where[0], where[1], Z.reshape(-1), (Z.shape[0], Z.shape[1]))

    def __matmul__(self, x: Tensor) -> Tensor:
        """(1, q, k) -> (P, n, k)"""
        return self.operator.matmul(x).view(self.copies, -1, x.shape[2])

    @property
    def mH(self) -> _Adjoint:
        return _Adjoint(self)

    def abs(self) -> SparseVectors:
        return SparseVectors(self.operator.absolute, self.copies)

    def norms_of_rows(self) -> Tensor:
        """(P, n)"""
        squares, rows = self.operator.values[0].abs().square(), self.operator.pattern.indices[0]
        return squares.new_zeros(self.operator.m).index_add_(0, rows, squares).sqrt().view(self.copies, -1)


class _Adjoint:
    def __init__(self, vectors: SparseVectors):
        self.vectors = vectors

    def __matmul__(self, x: Tensor) -> Tensor:
        """(P, n, k) -> (1, q, k)"""
        return self.vectors.operator.adjoint(x.reshape(1, -1, x.shape[2]))
