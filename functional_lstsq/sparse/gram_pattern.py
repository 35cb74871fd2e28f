"""A^H A on a pattern that is known: its positions once for each pattern of A, its values by a plan of sums.

    (A^H A)[i, j] = sum over rows r of conj(A[r, i]) A[r, j]

A compiled kernel sums column by column. Where there is none, a plan says which products of two stored entries of one
row belong to each position, so that the values of A^H A are one product of a sparse matrix, made of entries of A, with
the vector of all entries of A: torch's own product of two sparse matrices loses memory at every call (CSR, torch 2.13
and 2.14) and takes 3 to 9 times as long.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernels
from .lazy import lazy
from .pattern import SparsePattern

_PAIRS = 2**24  # products of a plan, of 8 bytes each, that a pattern keeps


class Gram:
    """The lower triangle of A^H A, column by column.

    Attributes:
        rows, columns: positions (entries,), ascending by column, then by row; what no row of A has is left out.
    """

    rows: Tensor
    columns: Tensor

    def values(self, values: Tensor) -> Tensor:
        """(entries,) for the values (nnz,) of A in double precision, plain tensors."""
        raise NotImplementedError


class GramPattern(Gram):
    """Of a matrix whose rows are all here."""

    def __init__(self, pattern: SparsePattern):
        self.pattern = pattern
        self.n = pattern.shape[1]
        lengths = pattern.rows.pointers.diff().long()
        self._plan = self._make_plan() if int((lengths * (lengths + 1) // 2).sum()) <= _PAIRS else None
        if self._plan is None:
            ones = torch.ones(pattern.nnz, dtype=torch.float64, device=self.device)
            self.rows, self.columns, _ = self._multiply(ones)
        elif kernels.available(self.device):
            self._plan = None  # which takes more memory than all else

    @property
    def device(self) -> torch.device:
        return self.pattern.device

    def values(self, values: Tensor) -> Tensor:
        values = values.resolve_conj()
        if kernels.available(self.device):
            return kernels.gram(self.pattern, self._kernel_plan, values)
        if self._plan is None:
            return self._multiply(values)[2]
        pointers, left, right = self._plan
        values, _ = self._sorted(values)
        # conj(A[r, i]) stand in the row of their position, each in the column of the entry that it is multiplied by.
        factors = values.conj().resolve_conj()[left]
        size = (len(self.rows), len(values))
        return torch.sparse_csr_tensor(pointers, right, factors, size, device=values.device, check_invariants=False).mv(
            values
        )

    @lazy
    def _kernel_plan(self) -> kernels.GramPlan:
        return kernels.gram_plan(self.pattern, self.rows, self.columns)

    def _sorted(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Entries row by row, and their places in the caller's order."""
        order = self.pattern.rows.order
        if order is None:
            return values, torch.arange(len(values), device=self.device)
        return values[order], order

    def _make_plan(self) -> tuple[Tensor, Tensor, Tensor]:
        """(pointers, left, right): which entries, counted row by row, are multiplied for each position."""
        by_rows, by_columns = self.pattern.rows, self.pattern.columns
        _, order = self._sorted(by_rows.indices)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=self.device)
        place = place if by_columns.order is None else place[by_columns.order]  # of the entries column by column
        first = by_rows.pointers.long()[by_columns.indices.long()]  # where their rows begin
        counts = place - first + 1  # entries of the row up to there, which have columns j <= i
        starts = counts.cumsum(0) - counts
        left = torch.repeat_interleave(place, counts)
        right = torch.arange(len(left), device=self.device) - torch.repeat_interleave(starts - first, counts)
        # They come ascending by i, the column of the left one, so that one stable sort by j does.
        columns, order = torch.sort(by_rows.indices[right], stable=True)
        left, right = left[order], right[order]
        rows = by_rows.indices[left]
        new = torch.ones(len(rows) + 1, dtype=torch.bool, device=self.device)
        new[1:-1] = (rows[1:] != rows[:-1]) | (columns[1:] != columns[:-1])
        starts = new.nonzero()[:, 0]
        self.rows, self.columns = rows[starts[:-1]].long(), columns[starts[:-1]].long()
        index = by_rows.indices.dtype  # 32 bits where they do, which MKL wants
        return starts.to(index), left.to(index), right.to(index)

    def _multiply(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, columns, values) where a plan would be too large: torch's product in COO, which gives memory back."""
        places, (m, n) = self.pattern.indices, self.pattern.shape
        A = torch.sparse_coo_tensor(places, values, (m, n), device=values.device, check_invariants=False).coalesce()
        adjoint = torch.sparse_coo_tensor(
            places.flip(0), values.conj().resolve_conj(), (n, m), device=values.device, check_invariants=False
        ).coalesce()
        product = torch.sparse.mm(adjoint, A).coalesce()
        columns, rows = product.indices()
        lower = rows >= columns
        return rows[lower], columns[lower], product.values()[lower].conj().resolve_conj()


def gram_pattern(pattern: SparsePattern) -> GramPattern:
    """That of `pattern`, which keeps it."""
    return pattern.keep("gram pattern", lambda: GramPattern(pattern))
