"""A sparse factor in a local basis, for matrices with more weak directions than can be told one by one.

    A = B T^+,    (A^H A + d^2)^+ = T (B^H B)^+ T^H, about

Most weak directions of large sparse problems are local: the line in Julian date of each star, the camera that saw too
little. Columns that depend on each other strongly make a cluster, and the columns of B are orthonormal within each. So
B has only those weak directions that clusters have among each other, which are few, and is factored in the place of A.

Errors of B are eps |A|, and change a singular value sigma of A by a relative eps / sigma.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .clusters import Clusters, clustered
from .inverse_iteration import InverseIteration
from .local_basis import LocalBasis
from .memory import fits
from .null_space import SparseVectors
from .shifted import ShiftedFactor
from .sparse_factor import GramAnalysis
from .system import System

_COPIES = 8  # of the numbers in dense matrices of all clusters, with their positions, while a basis is made


def local_factor(
    system: System, p: int, limit: float, analysis: GramAnalysis, too_large: Callable[[GramAnalysis, int], str]
) -> LocalFactor | None:
    """Of matrix p; None where no columns depend on each other strongly, or it would not fit into memory.

    Args:
        limit: what singular values that are not zero are above.
        analysis: of the pattern of A.
    """
    values, norms = system.A.values[p], system.norms[p, :, 0]
    clusters = Clusters(system.A.pattern, clustered(analysis, values, torch.where(system.empty[p], 0.0, norms)))
    wanted = _COPIES * clusters.numbers * values.element_size()
    if int(clusters.sizes.max()) < 2 or not fits(wanted, None, values.device):
        return None
    basis = LocalBasis(system, p, clusters, limit)
    analysis = GramAnalysis(basis.B.pattern, complex_values=values.is_complex())
    return None if too_large(analysis, 1) else LocalFactor(system, p, basis, analysis, limit)


class LocalFactor:
    """About (A^H A + d^2)^+ for the matrix p of a system.

    Args:
        basis: of its columns.
        analysis: of the pattern of B.
        limit: what singular values that are not zero are above.

    Attributes:
        null: null vectors (n, q) of the scaled matrix that are not local, once `explore` has looked for them.
        smallest: the smallest singular value that is not zero.
    """

    def __init__(self, system: System, p: int, basis: LocalBasis, analysis: GramAnalysis, limit: float):
        self.basis, self.limit, self.tolerance = basis, limit, system.tolerance
        self.A = system.A.with_values(system.A.values[p : p + 1])
        self.damp = None if system.damp is None else system.damp[p]
        self.empty = system.empty[p, :, None]
        self.inner = ShiftedFactor(basis.B, None, torch.ones_like(system.norms[p]), basis.empty, analysis)
        self.null = self.A.values.new_zeros((system.n, 0))

    @property
    def nullity(self) -> int:
        """Columns of zeros are not counted."""
        return self.null.shape[1] + (0 if self.basis.null is None else self.basis.null.operator.n)

    def explore(self, largest: float) -> bool:
        """Find null vectors that are not local, and the smallest singular value; whether all is known."""
        known = self.inner.explore(1.0, self.tolerance)  # |A y| is as small as |B z|, or smaller, for y = T z
        if self.inner.nullity:
            null = self.basis.T.matmul(self.inner.null[None])[0]
            self.null = torch.linalg.qr(null / torch.linalg.vector_norm(null, dim=0)).Q
        search = InverseIteration(self.A, self.damp, self.empty, self.apply, self.limit, self._project, self.nullity)
        # A direction that is weak in its cluster, and weak in B, may be a null vector of A though it is one of neither:
        # its singular value may be as small as the product of both.
        weak = search.explore(largest)
        more, _, _, self.smallest = weak.split(self.limit)
        self.null = torch.linalg.qr(torch.cat([self.null, more], 1)).Q if more.shape[1] else self.null
        return known and weak.known

    def apply(self, g: Tensor) -> Tensor:
        """(A^H A + d^2)^+ g, to some digits."""
        T = self.basis.T
        return self._outside(T.matmul(self.inner.apply(T.adjoint(self._outside(g)[None])[0])[None])[0])

    def _outside(self, x: Tensor) -> Tensor:
        """x without its part in null vectors that are not local; T makes none in the others."""
        return x - self.null @ (self.null.mH @ x) if self.null.shape[1] else x

    def _project(self, x: Tensor) -> Tensor:
        """x without its part in the null space."""
        x, local = self._outside(x), self.basis.null
        return x if local is None else x - (local @ (local.mH @ x[None]))[0]

    def local_null_space(self) -> tuple[SparseVectors, SparseVectors] | None:
        """An orthonormal basis of local null vectors of the unscaled matrix with its errors, if there are any."""
        return None if self.basis.null is None else self.basis.null_space()
