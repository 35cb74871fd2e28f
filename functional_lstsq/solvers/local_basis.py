"""A basis in which clusters of columns are orthonormal, made without squaring what they are.

In each cluster, by a singular value decomposition of its own columns,

    A_c = U_c S_c V_c^H,    B = [U_1 U_2 ...],    T = diag(V_c S_c^+),    A = B T^+

The columns of B are as sparse as those of A. This does to clusters what scaling by norms does to columns (Demmel, SIAM
J. Numer. Anal. 20(3), 1983). The smallest singular value of A is at most that of any cluster, so what is zero in a
cluster is so in A: a null vector with entries in that cluster only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..sparse.double_double import Pair, Single
from ..sparse.pattern import SparsePattern
from ..sparse.plain_products import Operator
from .clusters import Clusters
from .null_space import SparseVectors, orthonormal, refine_null_space
from .system import System


class LocalBasis:
    """Of the clusters of columns of the matrix p of a system, [A; d] with its damping.

    Args:
        limit: what singular values that are not zero are above.

    Attributes:
        B: (m, n), or (m + n, n) with a damping; columns that are not needed are zeros.
        T: (n, n)
        empty: (n, 1), which columns of B are zeros.
        null: an orthonormal basis of the null vectors of the scaled clusters, or None.
    """

    def __init__(self, system: System, p: int, clusters: Clusters, limit: float):
        self.system, self.p, self.clusters = system, p, clusters
        m, n, A, damp = system.m, system.n, system.A.values[p], None if system.damp is None else system.damp[p]
        tall, square, of_tall, of_damping, of_square, vectors, zeros = [], [], [], [], [], [], []
        for kind in clusters.kinds:
            U, s, Vh = torch.linalg.svd(kind.dense(A, damp), full_matrices=False)
            lost, height, V = (s <= limit)[:, None], kind.pairs.shape[1], Vh.mH
            U = torch.where(lost, 0.0, U)
            tall.append(kind.tall)
            of_tall.append(U[:, :height][kind.seen])
            of_damping.append(U[:, height:].reshape(-1))
            square.append(kind.square)
            of_square.append(torch.where(lost, 0.0, V / s[:, None]).reshape(-1))
            vectors.append(V.flip(2))  # null vectors first
            zeros.append(lost.flip(2))
        where, inside, values = torch.cat(tall, 1), torch.cat(square, 1), torch.cat(of_tall)
        self._U = Operator(SparsePattern(where, (len(clusters.rows), n)), values[None])
        self.T = Operator(SparsePattern(inside, (n, n)), torch.cat(of_square)[None])
        where = torch.stack([clusters.rows[where[0]], where[1]])
        if damp is not None:
            where = torch.cat([where, torch.stack([m + inside[0], inside[1]])], 1)
            values = torch.cat([values, *of_damping])
        self.B = Operator(SparsePattern(where, (m if damp is None else m + n, n)), values[None])
        # Null vectors of all clusters stand side by side, each in the rows of its own.
        width = max(int(lost.sum(2).max()) for lost in zeros)
        self._vectors, self.empty = A.new_zeros((n, width)), system.empty[p, :, None].clone()
        self._lost = torch.zeros_like(self._vectors, dtype=torch.bool)
        for kind, V, lost in zip(clusters.kinds, vectors, zeros, strict=True):
            most = min(width, V.shape[2])
            self._vectors[kind.columns, :most] = torch.where(lost, V, 0.0)[:, :, :most]
            self._lost[kind.columns, :most] = lost.expand_as(V)[:, :, :most]
            self.empty[kind.columns, 0] = lost.flip(2)[:, 0]
        self.null = self._apart(self._vectors) if width else None

    def _apart(self, vectors: Tensor) -> SparseVectors:
        """Those of all clusters (n, q), each by itself."""
        i, j = self._lost.nonzero().T
        names, number = (self.clusters.label[i] * self._lost.shape[1] + j).unique(return_inverse=True)
        return SparseVectors.of(i, number, vectors[i, j], (self.system.n, len(names)))

    def null_space(self) -> tuple[SparseVectors, SparseVectors]:
        """An orthonormal basis of local null vectors of the unscaled matrix, and an estimate of its errors."""
        system, p, clusters = self.system, self.p, self.clusters
        apart = SparsePattern(torch.stack([clusters.pair, clusters.columns]), (len(clusters.rows), system.n))
        exactly = Operator(apart, system.plain.values[p : p + 1, clusters.entries]).exact(adjoint=False)
        roots = None if system.weights is None else system.root[p, clusters.rows, None]

        def correction(whole: Pair | Single) -> Tensor:
            assert isinstance(whole, Pair)
            image = exactly(whole).value
            return self.T.matmul(self._U.adjoint(image if roots is None else roots * image))

        def by_clusters(null: Tensor, *, by_rows: bool = False) -> Tensor:
            found = torch.zeros_like(null)
            for kind in clusters.kinds:
                most = min(null.shape[2], kind.columns.shape[1])
                lost = self._lost[kind.columns[:, 0], None, :most]
                found[0, kind.columns, :most] = orthonormal(null[0, kind.columns, :most], lost, by_rows=by_rows)
            return found

        null, slip = refine_null_space(self._vectors[None], system.scale[p, None], by_clusters, correction, exact=True)
        return self._apart(null[0]), self._apart(slip[0])
