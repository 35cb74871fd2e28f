"""What SparseMatrix has of arithmetic: sums, products, multiples, scaled rows and columns, and parts.

Patterns are merged once and kept, so that values alone are left to be computed, by primitives. All of it is
differentiable by the values to any order, takes batches of values, and promotes dtypes as torch does.
"""

from __future__ import annotations

import numbers
from typing import Any, Self, cast

import torch
from torch import Tensor

from ..torch_func.tracing import prepare_compiler
from .entries import place, take
from .merging import product_pattern, select, union
from .pattern import SparsePattern, recall
from .triple import triple


class MatrixAlgebra:
    """Of values (..., nnz) on a pattern; SparseMatrix is made of it, and of products with dense tensors."""

    __slots__ = ()
    values: Tensor
    pattern: SparsePattern
    __array_ufunc__ = None  # a number of NumPy leaves products to us
    __iter__ = None  # a matrix has no elements to go through

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)"""
        return self.pattern.shape

    @property
    def nnz(self) -> int:
        """Number of stored entries."""
        return self.pattern.nnz

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Device of the values and of the pattern."""
        return self.values.device

    def _on(self, values: Tensor, pattern: SparsePattern) -> Self:
        raise NotImplementedError

    @property
    def T(self) -> Self:
        """The transpose, with the same values on the transposed pattern."""
        return self._on(self.values, self.pattern.T)

    @property
    def H(self) -> Self:
        """The conjugate transpose."""
        return self._on(self.values.conj(), self.pattern.T)

    def __neg__(self) -> Self:
        return self._on(-self.values, self.pattern)

    def __mul__(self, factor: Any) -> Self:
        """s A for a number or a tensor of shape (); rows and columns are multiplied by `scale`."""
        if isinstance(factor, Tensor) and factor.ndim:
            raise ValueError(f"s * A needs a number or a tensor s of shape (), got {tuple(factor.shape)}; see A.scale")
        if not isinstance(factor, (numbers.Number, Tensor)):
            return NotImplemented
        return self._on(cast(Any, factor) * self.values, self.pattern)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Self:
        if isinstance(divisor, Tensor) and divisor.ndim:
            raise ValueError(f"A / s needs a number or a tensor s of shape (), got {tuple(divisor.shape)}")
        if not isinstance(divisor, (numbers.Number, Tensor)):
            return NotImplemented
        return self._on(self.values / cast(Any, divisor), self.pattern)

    def __add__(self, other: Any) -> Self:
        """A + B, whose pattern is the union of both: that of A, with what B alone has behind."""
        if isinstance(other, MatrixAlgebra):
            return added(self, other)
        if isinstance(other, numbers.Number) and other == 0:  # what sum() begins with
            return self
        return NotImplemented

    __radd__ = __add__

    def __sub__(self, other: Any) -> Self:
        return added(self, -other) if isinstance(other, MatrixAlgebra) else NotImplemented

    def scale(self, rows: Tensor | None = None, columns: Tensor | None = None) -> Self:
        """diag(rows) A diag(columns), on the same pattern; torch.compile takes `A.scale(s)` for tensors s, not `s * A`.

        Args:
            rows: (m,) or a batch (..., m) of factors, real or complex, or () for all; None for ones.
            columns: (n,) or a batch (..., n), or ().

        Raises:
            TypeError, ValueError: neither is given, or one is no tensor, of another shape or on another device.

        >>> import torch, functional_lstsq as fl
        >>> A = fl.SparseMatrix.from_dense(torch.tensor([[1.0, 2], [0, 3]]))
        >>> A.scale(rows=torch.tensor([1.0, 10]), columns=torch.tensor([2.0, 1])).to_dense()
        tensor([[ 2.,  2.],
                [ 0., 30.]])
        """
        prepare()
        if rows is None and columns is None:
            raise ValueError("scale needs rows, columns or both, got neither")
        values = self.values
        for name, factors, axis in (("rows", rows, 0), ("columns", columns, 1)):
            if factors is None:
                continue
            size = self.shape[axis]
            if not isinstance(factors, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(factors).__name__}")
            if factors.ndim and factors.shape[-1] != size:
                raise ValueError(f"{name} must have shape ({size},), got {tuple(factors.shape)}")
            if factors.device != self.device:
                raise ValueError(f"{name} are on {factors.device}, A is on {self.device}")
            values = values * (batched(take, factors, self.pattern.indices[axis]) if factors.ndim else factors)
        return self._on(values, self.pattern)

    def __getitem__(self, key: Any) -> Self:
        """A[rows], A[:, columns] or A[rows, columns], in the order asked for.

        Args:
            key: each a slice, or a list, array or tensor of integers (negative ones count from the end, repeated ones
                are repeated) or of bools; one of two must be a slice. A single integer is refused, since vectors are
                dense here: A[[i]] is a matrix of one row.

        Raises:
            TypeError, IndexError: another kind of index; one that lies outside; a mask of another length.

        Cost: the first time for these rows a selection of their entries, which the pattern keeps (the last 16).

        >>> import torch, functional_lstsq as fl
        >>> A = fl.SparseMatrix.from_dense(torch.tensor([[1.0, 2], [0, 3], [4, 0]]))
        >>> A[torch.tensor([2, 0]), :1].to_dense()
        tensor([[4.],
                [1.]])
        """
        prepare()
        rows, columns = key if isinstance(key, tuple) and len(key) == 2 else (key, slice(None))
        if not isinstance(rows, slice) and not isinstance(columns, slice):
            raise TypeError("A[rows, columns] takes a slice as one of the two; write A[rows][:, columns]")
        found = self
        for one, axis in ((rows, 0), (columns, 1)):
            if not isinstance(one, slice) or one != slice(None):
                selected = select(found.pattern, one, axis)
                found = found._on(batched(take, found.values, selected.first), selected.pattern)
        return found


def prepare() -> None:
    if torch.compiler.is_compiling():
        prepare_compiler()


def batched(operation: Any, values: Tensor, *arguments: Any) -> Tensor:
    """`operation` of values (P, size), for values (..., size)."""
    flat = values[None] if values.ndim == 1 else values.flatten(0, -2)
    found = operation(flat, *arguments)
    return found.reshape(*values.shape[:-1], found.shape[-1])


def _on_one_device(A: MatrixAlgebra, B: MatrixAlgebra, what: str) -> None:
    if A.device != B.device:
        raise ValueError(f"{what} needs matrices on one device, got {A.device} and {B.device}")


def added(A: MatrixAlgebra, B: MatrixAlgebra) -> Any:
    """A + B."""
    prepare()
    if A.shape != B.shape:
        raise ValueError(f"A + B needs matrices of one shape, got {A.shape} and {B.shape}")
    _on_one_device(A, B, "A + B")
    both = recall(union, A.pattern.name, B.pattern.name)
    left = A.values if both.first is None else batched(place, A.values, both.first, both.nnz)
    right = B.values if both.second is None else batched(place, B.values, both.second, both.nnz)
    return A._on(left + right, both.pattern)


def multiplied(A: MatrixAlgebra, B: MatrixAlgebra) -> Any:
    """A B, with an entry wherever A B may have one."""
    prepare()
    (m, k), (rows, n) = A.shape, B.shape
    if k != rows:
        raise ValueError(f"A @ B needs as many rows of B as A has columns, got shapes {A.shape} and {B.shape}")
    _on_one_device(A, B, "A @ B")
    pattern = recall(product_pattern, A.pattern.name, B.pattern.name)
    dtype = torch.promote_types(A.dtype, B.dtype)
    batch = torch.broadcast_shapes(A.values.shape[:-1], B.values.shape[:-1])
    left, right = (M.values.to(dtype).expand(*batch, M.nnz) for M in (A, B))
    if not batch:
        left, right = left[None], right[None]
    left, right = left.flatten(0, -2), right.flatten(0, -2)
    found = triple(left, right, A.pattern.indices, B.pattern.indices, pattern.indices, m, k, n)
    return A._on(found.reshape(*batch, found.shape[-1]), pattern)
