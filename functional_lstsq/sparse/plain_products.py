"""Products with sparse matrices, on plain tensors: the one place that picks sparse kernels."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..torch_func.cores import are_alone, threads
from . import dense_kernels, entry_kernels, kernels
from .base import Products, dot, norm
from .column_search import Found, Wanted, search
from .csr_product import sparse_product
from .exact_products import ExactProducts
from .lazy import lazy
from .normal_iteration import NormalIteration, NormalProducts, work
from .numerics import at
from .pattern import SparsePattern

with warnings.catch_warnings():  # torch says once per process that CSR tensors are in beta; we know what we use of them
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1), dtype=torch.float64, device="cpu", check_invariants=False)

_TINY = torch.finfo(torch.float64).tiny
_SMALLEST = 2.0**-900  # of the squares of norms that lose nothing to the range of numbers
_LONG = 1024  # terms of a sum above which torch's kernels, which add up float32 in float32, lose the last digits
# Products in single precision take half the time where memory bounds them.
_SINGLE_ENTRIES = 500_000  # fewest of A
_SINGLE_TERMS = 2000  # of a sum in single precision, whose rounding errors grow with them
_GRAM_ENTRIES = 2**24  # of A^H A that are formed at a time
# A dense product makes so many multiplications in the time of one of a sparse product, and so many before it counts.
_DENSE_SPEED, _SMALL = 100, 10**7
_SHARED = 500_000  # entries above which many threads gain by taking parts of one product each
_COMPILED_SPEED = 5  # as much faster than torch a compiled kernel adds up products of entries


class RowByRow:
    """P matrices on one pattern with their values gathered row by row, and what their products need made once.

    Args:
        pattern: positions of the entries, shape (m, n).
        values: (P, nnz) in the pattern's own order. A kernel that reads values in another order than by rows takes
            longer, even for one product.
        in_order: whether they have been gathered already.
    """

    def __init__(self, pattern: SparsePattern, values: Tensor, *, in_order: bool = False):
        order = None if in_order or values.stride(1) == 0 else pattern.rows.order  # 0: one number for all entries
        self.pattern, self.copies = pattern, len(values)
        if order is None:
            self.values = values.contiguous()
        elif entry_kernels.suit(values):
            self.values = entry_kernels.take_rows(pattern, values)
        else:  # gather is several times faster than index_select along rows
            self.values = values.gather(1, order.expand(self.copies, -1))
        long = values.dtype == torch.float32 and _longest_row(pattern) > _LONG
        self.compiled = kernels.available(values.device)
        self.compiled_always = self.compiled and (long or values.is_complex())

    @lazy
    def csr(self) -> Tensor:
        """The block-diagonal matrix as torch CSR."""
        where, size = self.pattern.repeated(self.copies), [self.copies * count for count in self.pattern.shape]
        return torch.sparse_csr_tensor(
            where.pointers,
            where.indices,
            self.values.reshape(-1),
            size,
            device=self.values.device,
            check_invariants=False,
        )

    @lazy
    def arrays(self) -> kernels.Matrix:
        """As compiled kernels take it."""
        return kernels.Matrix.of(self.pattern, self.values)

    def multiply(self, X: Tensor, out: Tensor | None) -> Tensor:
        """A X (P, m, k) for X (P, n, k), into a contiguous `out` if there is one."""
        k, entries = X.shape[2], self.values.numel()
        if out is None:
            out = X.new_empty((self.copies, self.pattern.shape[0], k))
        if not (entries and k):
            return out.zero_()
        # Torch's is faster for one column and more work, if its threads have cores of their own.
        if self.compiled_always or (self.compiled and (k > 1 or entries <= kernels.SMALL or are_alone())):
            return kernels.multiply(self.arrays, X, out)
        if k == 1:  # as a vector, which has a faster kernel
            torch.mv(self.csr, X.reshape(-1), out=out.view(-1))
        else:
            torch.mm(self.csr, X.reshape(-1, k).contiguous(), out=out.view(-1, k))
        return out


class Operator(Products):
    """P matrices on one pattern with their values gathered into both orientations, for repeated products.

    Plain tensors only: this is what solvers work with, below every transformation. P matrices act as one
    block-diagonal matrix, so that a batch is one call of one kernel.

    Args:
        pattern: positions of the entries, shape (m, n).
        values: (P, nnz) in the pattern's own order.
    """

    has_entries = has_exact_products = True
    dot, norm = staticmethod(dot), staticmethod(norm)  # type: ignore[assignment]

    def __init__(self, pattern: SparsePattern, values: Tensor):
        self.pattern, self.values = pattern, values.resolve_conj()
        self.copies, self.dtype, self.device = values.shape[0], values.dtype, values.device
        self.m, self.n = pattern.shape

    @lazy
    def rows(self) -> RowByRow:
        """A"""
        return RowByRow(self.pattern, self.values)

    @lazy
    def columns(self) -> RowByRow:
        """A^H, with values of its own: a product with the transpose of A's rows would sort anew every time."""
        return RowByRow(self.pattern.T, self.values.conj().resolve_conj())

    def matmul(self, X: Tensor, out: Tensor | None = None) -> Tensor:
        """A X for X of shape (P, n, k), into a contiguous `out` if there is one."""
        return self.rows.multiply(X, out)

    def adjoint(self, Y: Tensor, out: Tensor | None = None) -> Tensor:
        """A^H Y for Y of shape (P, m, k), into a contiguous `out` if there is one."""
        return self.columns.multiply(Y, out)

    def gram(self) -> Tensor:
        """A^H A as a dense tensor (P, n, n), from a sparse product."""
        n = self.n
        if not self.pattern.nnz:
            return self.values.new_zeros((self.copies, n, n))
        work = _DENSE_SPEED * kernels.multiplications(self.pattern)
        if kernels.available(self.device) and work <= _COMPILED_SPEED * self.m * n**2:
            return dense_kernels.dense_gram(self.rows.arrays, self.pattern)
        cheap = self.m * n**2 <= work + _SMALL
        if cheap and self.copies * self.m * n <= _GRAM_ENTRIES // 4:
            A = self.dense()
            return A.mH @ A
        dense = self.values.new_zeros((self.copies * n, n))
        rows, columns = self.rows.csr, self.columns.csr
        pointers, indices, values = columns.crow_indices(), columns.col_indices(), columns.values()
        # Some rows at a time, since sparse products take several times the memory of a dense one.
        height = max(1, _GRAM_ENTRIES // n)
        for top in range(0, self.copies * n, height):
            bottom = min(top + height, self.copies * n)
            first, last = pointers[[top, bottom]].tolist()
            part = torch.sparse_csr_tensor(
                pointers[top : bottom + 1] - first,
                indices[first:last],
                values[first:last],
                (bottom - top, columns.shape[1]),
                device=values.device,
                check_invariants=False,
            )
            product = sparse_product(part, rows)
            of_rows = torch.repeat_interleave(product.crow_indices().diff())
            dense[top + of_rows, product.col_indices() % n] = product.values()
        return dense.view(self.copies, n, n)

    def dense(self) -> Tensor:
        """A as a dense tensor (P, m, n), for matrices that are small."""
        rows, columns = self.pattern.indices
        places = (rows * self.n + columns).expand(self.copies, -1)
        flat = self.values.new_zeros((self.copies, self.m * self.n)).scatter_(1, places, self.values)
        return flat.view(self.copies, self.m, self.n)

    @lazy
    def absolute(self) -> Operator:
        """The operator of the absolute values."""
        return self.with_values(self.values.abs())

    def absolute_matmul(self, X: Tensor) -> Tensor:
        """|A| X"""
        return self.absolute.matmul(X)

    def absolute_adjoint(self, Y: Tensor) -> Tensor:
        """|A|^H Y"""
        return self.absolute.adjoint(Y)

    def stored_matmul(self, X: Tensor) -> Tensor:
        if self.copies > 1 or not kernels.available(self.device):
            return super().stored_matmul(X)
        return kernels.add_up(self.pattern, X)

    def stored_adjoint(self, Y: Tensor) -> Tensor:
        if self.copies > 1 or not kernels.available(self.device):
            return super().stored_adjoint(Y)
        return kernels.add_up(self.pattern.T, Y)

    def exact(self, *, adjoint: bool) -> ExactProducts:
        """What multiplies pairs by A, or by A^H, in about twice double precision."""
        return ExactProducts(self, adjoint=adjoint)

    def with_values(self, values: Tensor) -> Operator:
        """Other matrices on the same pattern."""
        return Operator(self.pattern, values)

    def scaled(self, scale: Tensor) -> Operator:
        """A D^-1 for D = `scale` (P, n, 1), powers of two."""
        return self.with_values(self._divided(scale))

    def vanished(self, scale: Tensor) -> Tensor:
        """(P, 1), which matrices have entries that become zero when columns are divided by `scale` (P, n, 1)."""
        return ((self.values != 0) & (self._divided(scale) == 0)).any(1, keepdim=True)

    def _divided(self, scale: Tensor) -> Tensor:
        factors = scale[:, :, 0].reciprocal()  # of powers of two, exact unless they are too small for a normal number
        if entry_kernels.suit(self.values) and not bool((factors < _TINY).any()):
            return entry_kernels.scale_columns(self.pattern, self.values, factors)
        return self.values / at(scale[:, :, 0], self.pattern.indices[1])

    def weighted(self, root: Tensor) -> Operator:
        """W^(1/2) A for `root` = W^(1/2) (P, m)."""
        return self.with_values(self.values * at(root, self.pattern.indices[0]))

    def column_sizes(self, damp: Tensor | None) -> tuple[Tensor, Tensor]:
        """(a, s), both (P, n): the columns of [A; diag(damp)] have the norms a sqrt(s)."""
        if entry_kernels.suit(self.values):
            squares = entry_kernels.column_squares(self.pattern, self.values)
            squares = squares if damp is None else squares + damp.square()
            least, most = squares.aminmax()
            if float(least) > _SMALLEST and float(most) < 1 / _SMALLEST:
                return torch.ones_like(squares), squares
        return column_sizes(self.values.abs(), self.pattern.indices[1].expand(self.copies, -1), damp, self.n)

    def frobenius(self) -> Tensor:
        """(P, 1)"""
        return torch.linalg.vector_norm(self.values, dim=1, keepdim=True)

    def single(self) -> Operator | None:
        """A in single precision, where it is large and its sums are short enough to be right to four digits."""
        if self.values.numel() < _SINGLE_ENTRIES:
            return None
        if max(_longest_row(self.pattern), _longest_row(self.pattern.T)) > _SINGLE_TERMS:
            return None
        kind = torch.complex64 if self.dtype.is_complex else torch.float32
        narrow = self.with_values(self.values.to(kind))
        for name, pattern in (("rows", self.pattern), ("columns", self.pattern.T)):  # to gather anew takes much longer
            setattr(narrow, name, RowByRow(pattern, getattr(self, name).values.to(kind), in_order=True))
        return narrow

    def factor(self, d2: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """By a compiled kernel, where there are any."""
        if not kernels.available(self.device):
            return None
        return dense_kernels.dense_factor(self.rows.arrays, self.pattern, None if d2 is None else d2[:, :, 0])

    def iteration(self, *arguments: Any) -> kernels.Iteration | None:
        """Compiled, where one thread has done an iteration before torch's have begun it."""
        if not (0 < self.pattern.nnz <= kernels.SMALL and kernels.available(self.device)):
            return None
        return kernels.Iteration(self.pattern, self.rows.values, self.columns.values, *arguments)

    def search(self, wanted: Wanted, limit: int) -> Found | None:
        """Compiled, where the threads that there are can have a column each, or one product is too little for them."""
        many = threads() > 2 * wanted.solutions.shape[2] and self.pattern.nnz > _SHARED
        if many or self.copies > 1 or not (self.pattern.nnz and kernels.available(self.device)):
            return None
        return search(self.pattern, self.rows.values, self.columns.values, self.normal, wanted, limit)

    @lazy
    def normal(self) -> NormalProducts | None:
        """What multiplies by A^H A."""
        if not NormalProducts.suit(self.values):
            return None
        return NormalProducts(self.pattern, self.values, self.rows.values)

    @lazy
    def normal_work(self) -> int | None:
        """Entries that one of these products reads."""
        return work(self.pattern, self.dtype) if NormalProducts.suit(self.values) else None

    def normal_iteration(self, *arguments: Any) -> NormalIteration | None:
        """Compiled, by these products."""
        return None if self.normal is None else NormalIteration(self.normal, *arguments)


def column_sizes(sizes: Tensor, columns: Tensor, damp: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
    """(a (P, n), s (P, n)): the norms of the columns are a sqrt(s), where no square has under- or overflown."""
    copies = len(sizes)
    whole = sizes.amax(1, keepdim=True) if columns.shape[1] else sizes.new_zeros((copies, 1))
    whole = whole if damp is None else torch.maximum(whole, damp.amax(1, keepdim=True))
    whole = torch.where(whole == 0, 1.0, whole)
    squares = sizes.new_zeros((copies, n)).scatter_add_(1, columns, (sizes / whole).square_())
    squares = squares if damp is None else squares + (damp / whole).square()
    if not bool((squares < _SMALLEST).any()):
        return whole.expand(-1, n), squares
    # Each in units of its own largest entry.
    largest = sizes.new_zeros((copies, n)).scatter_reduce(1, columns, sizes, "amax")
    largest = largest if damp is None else torch.maximum(largest, damp)
    largest = torch.where(largest == 0, 1.0, largest)
    squares = torch.zeros_like(largest).scatter_add(1, columns, (sizes / largest.gather(1, columns)).square())
    return largest, squares if damp is None else squares + (damp / largest).square()


def _longest_row(pattern: SparsePattern) -> int:
    counts = pattern.rows.pointers.diff
    return pattern.keep("longest row", lambda: int(counts().max()) if pattern.shape[0] else 0)
