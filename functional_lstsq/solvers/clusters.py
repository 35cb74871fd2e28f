"""Clusters of columns that depend on each other strongly, and their own parts of A as small dense matrices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ..sparse.lazy import lazy
from ..sparse.pattern import SparsePattern
from .sparse_factor import GramAnalysis

_LARGEST = 64  # columns of a cluster
# Cosines of the angle of two columns, above which they are of one cluster: the least that leaves clusters small enough.
_COSINES = (0.0, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999)


def clustered(analysis: GramAnalysis, values: Tensor, norms: Tensor) -> Tensor:
    """(n,) the number of the cluster of each column, from 0; -1 for columns of zeros.

    Args:
        values: (nnz,)
        norms: (n,), of the columns.
    """
    i, j, cosines = (part.cpu().numpy() for part in analysis.cosines(values, norms))
    alone = (norms != 0).cpu().numpy()  # what has no cluster yet
    label, empty = np.arange(len(alone)), ~alone
    for cosine in _COSINES:
        edges = (cosines > cosine) & alone[i] & alone[j]
        graph = csr_matrix((np.ones(edges.sum(), dtype=np.int8), (i[edges], j[edges])), shape=(len(label),) * 2)
        part = connected_components(graph, directed=False)[1]
        small = alone & (np.bincount(part)[part] <= _LARGEST)
        label[small] = np.unique(part, return_index=True)[1][part[small]]  # for now, by the first of its columns
        alone &= ~small
    label[~empty] = np.unique(label[~empty], return_inverse=True)[1]
    label[empty] = -1
    return torch.from_numpy(label).to(values.device)


@dataclass(frozen=True)
class Kind:
    """All clusters of s columns and of about as many rows.

    Attributes:
        columns: (c, s)
        pairs: (c, h), the numbers of their rows among all pairs of a row and a cluster; -1 for none.
        entries, places: the entries of A that are theirs, and their places in a tensor (c, h, s).
    """

    columns: Tensor
    pairs: Tensor
    entries: Tensor
    places: Tensor

    def dense(self, values: Tensor, damp: Tensor | None) -> Tensor:
        """[A; d] (c, h, s), or (c, h + s, s) with a damping d (n, 1), for values (nnz,)."""
        (count, width), height = self.columns.shape, self.pairs.shape[1]
        flat = values.new_zeros(count * height * width).index_put_((self.places,), values[self.entries])
        A = flat.view(count, height, width)
        return A if damp is None else torch.cat([A, torch.diag_embed(damp[self.columns, 0]).to(A.dtype)], 1)

    @property
    def seen(self) -> Tensor:
        """(c, h, s), which are in rows that there are."""
        return (self.pairs >= 0)[:, :, None].expand(-1, -1, self.columns.shape[1])

    @property
    def tall(self) -> Tensor:
        """(2, entries): pairs and columns of what is `seen`."""
        seen = self.seen
        return torch.stack([self.pairs[:, :, None].expand_as(seen)[seen], self.columns[:, None].expand_as(seen)[seen]])

    @property
    def square(self) -> Tensor:
        """(2, c s s): rows and columns of the entries of matrices from and to the columns of the clusters."""
        width = self.columns.shape[1]
        rows, columns = self.columns[:, :, None].expand(-1, -1, width), self.columns[:, None].expand(-1, width, -1)
        return torch.stack([rows.reshape(-1), columns.reshape(-1)])


class Clusters:
    """The parts of a sparse matrix that belong to clusters of its columns, by their labels (n,).

    Attributes:
        rows: (pairs,) the row of each pair of a row and a cluster that has an entry in it.
        entries: the entries of A that are in clusters; their `pair` and their `columns`.
        numbers: how many numbers dense matrices of all clusters have, about.
    """

    def __init__(self, pattern: SparsePattern, label: Tensor):
        (m, _), (rows, columns), self.label = pattern.shape, pattern.indices, label
        self.sizes = torch.bincount(label[label >= 0])
        self.entries = (label[columns] >= 0).nonzero()[:, 0]
        self.columns = columns[self.entries]
        # Ascending by cluster, then by row.
        keys, self.pair = (label[self.columns] * m + rows[self.entries]).unique(return_inverse=True)
        self.rows = keys % m
        self.heights = torch.bincount(keys // m, minlength=len(self.sizes))
        self.numbers = int((self.sizes * (2 * self.heights + self.sizes)).sum())

    @lazy
    def kinds(self) -> list[Kind]:
        """All clusters, those of a kind together: of as many columns, of rows up to the same power of two."""
        sizes, heights, label, device = self.sizes, self.heights, self.label, self.label.device
        order = torch.argsort(label, stable=True)[int((label < 0).sum()) :]
        first_column, first_pair = sizes.cumsum(0) - sizes, heights.cumsum(0) - heights
        place = torch.empty_like(label)  # of a column in its cluster
        place[order] = torch.arange(len(order), device=device) - first_column[label[order]]
        # At least as many as columns, for as many singular vectors.
        height = torch.maximum(2 ** torch.log2(heights.clamp_min(1).double()).ceil().long(), sizes)
        shapes, kind = torch.stack([sizes, height]).unique(dim=1, return_inverse=True)
        cluster, kinds = label[self.columns], []
        number = torch.empty_like(kind)  # of a cluster in its kind
        for index, (s, h) in enumerate(shapes.T.tolist()):
            which = (kind == index).nonzero()
            number[which[:, 0]] = torch.arange(len(which), device=device)
            row = torch.arange(h, device=device)
            pairs = torch.where(row < heights[which], first_pair[which] + row, -1)
            mine = (kind[cluster] == index).nonzero()[:, 0]
            of = cluster[mine]
            places = (number[of] * h + self.pair[mine] - first_pair[of]) * s + place[self.columns[mine]]
            columns = order[first_column[which] + torch.arange(s, device=device)]
            kinds.append(Kind(columns, pairs, self.entries[mine], places))
        return kinds
