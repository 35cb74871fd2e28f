"""SparseMatrix(values, pattern): a pytree with one leaf, the values; conversions from and to torch and SciPy."""

from __future__ import annotations

import html
from typing import Any, cast

import numpy as np
import optree
import scipy.sparse
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from ..result import html_table
from ..torch_func.layouts import LAYOUTS, put_together, take_apart
from ..torch_func.tracing import concrete, is_mapped, is_traced, prepare_compiler
from .algebra import MatrixAlgebra, batched, multiplied
from .entries import take
from .pattern import SparsePattern
from .picture import thumbnail
from .products import multiply

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


class SparseMatrix(MatrixAlgebra):
    """A sparse matrix whose values are differentiable and whose pattern is fixed.

    A pytree for torch.func and optree with `values` as its one leaf: `torch.func.grad(loss)(A)` is a SparseMatrix on
    the same pattern, whose values are the gradient in the caller's own order.

    In a `torch.nn.Module` the values are what is registered: `self.values = torch.nn.Parameter(A.values)` beside
    `self.pattern = A.pattern`, of which `forward` makes the matrix. (A module does not see a Parameter inside of one.)

    Args:
        values: (nnz,) tensor of float32, float64, complex64 or complex128; `values[k]` sits at `indices[:, k]`. Leading
            dimensions make a batch on one pattern, for `torch.vmap` to take apart.
        pattern: where the values sit.

    Raises:
        TypeError: values or pattern are of another type.
        ValueError: the number of values is not that of the pattern, or their devices differ.

    >>> import torch, functional_lstsq as fl
    >>> pattern = fl.SparsePattern(torch.tensor([[0, 2, 1], [0, 1, 0]]), (3, 2))
    >>> A = fl.SparseMatrix(torch.tensor([1.0, 2.0, 3.0]), pattern)
    >>> A
    SparseMatrix(shape=(3, 2), nnz=3, dtype=torch.float32)
    >>> A @ torch.tensor([1.0, 10.0])
    tensor([ 1.,  3., 20.])
    >>> A.T @ torch.ones(3)
    tensor([4., 2.])
    """

    __slots__ = ("pattern", "values")
    values: Tensor
    pattern: SparsePattern

    def __init__(self, values: Tensor, pattern: SparsePattern):
        if not isinstance(pattern, SparsePattern):
            raise TypeError(f"pattern must be a SparsePattern, got {type(pattern).__name__}")
        if not isinstance(values, Tensor):
            raise TypeError(f"values must be a tensor, got {type(values).__name__}")
        if values.dtype not in DTYPES:
            raise TypeError(f"values must be float32, float64, complex64 or complex128, got {values.dtype}")
        if values.ndim < 1 or values.shape[-1] != pattern.nnz:
            raise ValueError(
                f"values must have shape ({pattern.nnz},), one for each entry of the pattern, got {tuple(values.shape)}"
            )
        if values.device != pattern.device:
            raise ValueError(f"values are on {values.device}, their pattern is on {pattern.device}")
        self.values, self.pattern = values, pattern

    def _on(self, values: Tensor, pattern: SparsePattern) -> SparseMatrix:
        return SparseMatrix(values, pattern)  # by its name, since a compiler does not know the class of a result

    def matmul(self, X: Tensor | SparseMatrix) -> Any:
        """A X for a dense X of shape (n,) or (n, k), or for a sparse one; differentiable by both, to any order.

        `A @ X` is the same; torch.compile takes `A.matmul(X)` only.

        Cost: 2 nnz k operations; of a sparse X the multiplications of its entries alone. Its pattern is made once, by a
        product of SciPy's, and kept (the last 16 with this A). Memory: that of the result, and n numbers a thread.
        """
        return multiplied(self, X) if isinstance(X, SparseMatrix) else product(self, X)

    def __matmul__(self, X: Any) -> Any:
        if not isinstance(X, Tensor) and hasattr(X, "__rmatmul__") and hasattr(X, "in_size"):
            return NotImplemented  # a LinearOperator knows
        return self.matmul(X)

    def to(self, *args: Any, **options: Any) -> SparseMatrix:
        """Like `torch.Tensor.to`: another dtype or device, values and pattern together."""
        values = self.values.to(*args, **options)
        return SparseMatrix(values, self.pattern.to(values.device))

    def to_dense(self) -> Tensor:
        """The dense (m, n) tensor, differentiable by the values."""
        single(self, "A")
        (rows, columns), (m, n) = self.pattern.indices, self.shape
        return self.values.new_zeros(m * n).scatter(0, rows * n + columns, self.values).view(m, n)

    def to_torch(self, layout: torch.layout = torch.sparse_coo) -> Tensor:
        """The torch sparse tensor of the given layout: torch.sparse_coo, torch.sparse_csr or torch.sparse_csc."""
        single(self, "A")
        if layout == torch.sparse_coo:
            return torch.sparse_coo_tensor(
                self.pattern.indices, self.values, self.shape, device=self.device, check_invariants=False
            ).coalesce()
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be torch.sparse_coo, torch.sparse_csr or torch.sparse_csc, got {layout!r}")
        rows_first = layout == torch.sparse_csr
        where = self.pattern.rows if rows_first else self.pattern.columns
        values = self.values if where.order is None else self.values.index_select(0, where.order)
        return put_together(values, where.pointers.long(), where.indices.long(), self.shape, layout)

    @staticmethod
    def from_torch(A: Tensor) -> SparseMatrix:
        """From a torch sparse COO, CSR or CSC tensor; gradients flow back to it.

        Duplicates, which COO may have, are added up, in double precision; integers become float64. Works on a tensor
        that a function under torch.func closes over too.

        >>> import torch, functional_lstsq as fl
        >>> fl.SparseMatrix.from_torch(torch.eye(3).to_sparse_csr())
        SparseMatrix(shape=(3, 3), nnz=3, dtype=torch.float32)
        """
        if not isinstance(A, Tensor) or A.layout not in LAYOUTS:
            got = f"layout {A.layout}" if isinstance(A, Tensor) else type(A).__name__
            raise TypeError(f"A must be a torch sparse COO, CSR or CSC tensor, got {got}")
        if A.ndim != 2:
            raise ValueError(f"A must have two dimensions, got shape {tuple(A.shape)}")
        values, indices = take_apart(A)
        if values.ndim != 1:
            raise ValueError(f"A must have scalar entries, got entries of shape {tuple(values.shape[1:])}")
        if not (values.is_floating_point() or values.is_complex()):
            values = values.to(torch.float64)
        return SparseMatrix(values, SparsePattern(indices, (A.shape[0], A.shape[1])))

    @staticmethod
    def from_scipy(A: scipy.sparse.sparray | scipy.sparse.spmatrix, device: torch.device | str = "cpu") -> SparseMatrix:
        """From any SciPy sparse matrix or array.

        Duplicates are added up, in double precision; integers become float64.

        >>> import scipy.sparse, functional_lstsq as fl
        >>> fl.SparseMatrix.from_scipy(scipy.sparse.eye_array(3))
        SparseMatrix(shape=(3, 3), nnz=3, dtype=torch.float64)
        """
        if not hasattr(A, "tocoo"):
            raise TypeError(f"A must be a SciPy sparse matrix, got {type(A).__name__}")
        A = A.tocoo()
        # SciPy would add integers up in their own type, by way of rows that take memory though they are empty.
        single = A.data.dtype in (np.float32, np.complex64)
        data = A.data.astype(np.complex128 if np.iscomplexobj(A.data) else np.float64)
        order = np.lexsort((A.col, A.row))
        rows, columns, data = A.row[order].astype(np.int64), A.col[order].astype(np.int64), data[order]
        new = np.ones(len(rows), dtype=bool)
        new[1:] = (rows[1:] != rows[:-1]) | (columns[1:] != columns[:-1])
        data = np.add.reduceat(data, new.nonzero()[0]) if len(data) else data
        indices = torch.from_numpy(np.stack([rows[new], columns[new]]))
        values = torch.from_numpy(data.astype(A.data.dtype) if single else data)
        return SparseMatrix(values.to(device), SparsePattern(indices.to(device), A.shape))

    def to_scipy(self, format: str = "csr") -> Any:
        """A SciPy sparse array in a format such as "csr", "csc" or "coo"; a copy, without a derivative.

        >>> import torch, functional_lstsq as fl
        >>> fl.SparseMatrix.from_dense(torch.tensor([[1.0, 0], [2, 3]])).to_scipy().sum()
        np.float32(6.0)
        """
        single(self, "A")
        values = self.values.detach().resolve_conj().cpu().numpy().copy()
        rows, columns = self.pattern.indices.cpu().numpy()
        return scipy.sparse.coo_array((values, (rows.copy(), columns.copy())), self.shape).asformat(format)

    @staticmethod
    def from_dense(D: Tensor, pattern: SparsePattern | None = None) -> SparseMatrix:
        """The entries of a dense (m, n) tensor that are not zero, or those of `pattern`; gradients flow back to it.

        Args:
            D: (m, n), or a batch (..., m, n) with `pattern`; integers become float64.
            pattern: which entries. Without it they depend on numbers, which torch.vmap and torch.compile do not know.

        Raises:
            TypeError: D is no dense tensor.
            ValueError: it has other than two dimensions or another shape than `pattern`; it is mapped over or compiled
                without one.

        >>> import torch, functional_lstsq as fl
        >>> fl.SparseMatrix.from_dense(torch.tensor([[1.0, 0], [2, 3]]))
        SparseMatrix(shape=(2, 2), nnz=3, dtype=torch.float32)
        """
        if not isinstance(D, Tensor) or D.layout != torch.strided:
            got = f"layout {D.layout}" if isinstance(D, Tensor) else type(D).__name__
            raise TypeError(f"D must be a dense tensor, got {got}")
        if torch.compiler.is_compiling():
            prepare_compiler()
        if D.ndim < 2 or (pattern is None and D.ndim > 2) or (pattern is not None and D.shape[-2:] != pattern.shape):
            want = "(m, n), or a pattern with it" if pattern is None else str((*"...", *pattern.shape))
            raise ValueError(f"D must have shape {want}, got {tuple(D.shape)}")
        if not (D.is_floating_point() or D.is_complex()):
            D = D.to(torch.float64)
        if pattern is None:
            if is_mapped(D) or is_traced(D):
                raise ValueError("from_dense needs a pattern where D is mapped over or compiled, got None")
            pattern = SparsePattern(concrete(D).detach().nonzero().T, (D.shape[0], D.shape[1]))
        rows, columns = pattern.indices
        return SparseMatrix(batched(take, D.flatten(-2), rows * D.shape[-1] + columns), pattern)

    def __reduce__(self):
        return _unflatten, ([self.values], self.pattern)  # in a form that torch.load takes with its default

    def _repr_html_(self) -> str:
        if not isinstance(self.values, Tensor):
            return f"<pre>{html.escape(repr(self))}</pre>"
        (m, n), batch = self.shape, tuple(self.values.shape[:-1])
        rows = [
            ("size", f"{m:,} x {n:,}"),
            ("entries", f"{self.nnz:,}, density {100 * self.nnz / max(1, m * n):.2g} %"),
            ("dtype", f"{self.dtype}, on {self.device}"),
            *([("batch", str(batch))] if batch else []),
        ]
        return html_table("SparseMatrix", rows) + thumbnail(self.pattern.indices.cpu(), self.shape)

    def __repr__(self) -> str:
        if not isinstance(self.values, Tensor):  # a pytree's leaf may be anything
            return f"SparseMatrix({self.values!r}, {self.pattern!r})"
        batch = tuple(self.values.shape[:-1])
        parts = [f"shape={self.shape}", f"nnz={self.nnz}", f"dtype={self.dtype}"]
        parts += [f"batch={batch}"] if batch else []
        parts += [f"device='{self.device}'"] if self.device.type != "cpu" else []
        parts += ["requires_grad=True"] if self.values.requires_grad else []
        return f"SparseMatrix({', '.join(parts)})"


def product(A: SparseMatrix, X: Tensor) -> Tensor:
    """A X; what `A @ X` does."""
    if torch.compiler.is_compiling():
        prepare_compiler()
    if not isinstance(X, Tensor) or X.layout != torch.strided:
        got = f"layout {X.layout}" if isinstance(X, Tensor) else type(X).__name__
        raise TypeError(f"A @ X takes a dense tensor X, got {got}")
    single(A, "A")
    m, n = A.shape
    if X.ndim not in (1, 2) or X.shape[0] != n:
        raise ValueError(f"A @ X needs X of shape ({n},) or ({n}, k), got {tuple(X.shape)}")
    dtype = torch.promote_types(A.dtype, X.dtype)
    columns = X.to(dtype)[None] if X.ndim == 2 else X.to(dtype)[None, :, None]
    Y = multiply(A.values.to(dtype)[None], columns, A.pattern.indices, m, n)[0]
    return Y if X.ndim == 2 else Y[:, 0]


def single(A: SparseMatrix, name: str) -> None:
    """Refuse a batch of matrices where one is wanted."""
    if A.values.ndim != 1:
        raise ValueError(
            f"{name} has values of shape {tuple(A.values.shape)}, wanted ({A.nnz},); for a batch use torch.vmap over A"
        )


def _flatten(A: SparseMatrix) -> tuple[list, SparsePattern]:
    return [A.values], A.pattern


def _unflatten(leaves: Any, pattern: SparsePattern) -> SparseMatrix:
    A = object.__new__(SparseMatrix)  # no checks: a pytree holds axes, None or any other object in place of a leaf
    (A.values,), A.pattern = leaves, pattern
    return A


torch.serialization.add_safe_globals([SparseMatrix, SparsePattern, _unflatten])
torch_pytree.register_pytree_node(
    SparseMatrix,
    _flatten,
    _unflatten,
    serialized_type_name="functional_lstsq.SparseMatrix",
    to_dumpable_context=lambda pattern: [pattern.indices.tolist(), list(pattern.shape)],
    from_dumpable_context=lambda told: SparsePattern(torch.tensor(told[0], device="cpu").view(2, -1), tuple(told[1])),
    flatten_with_keys_fn=lambda A: ([(torch_pytree.GetAttrKey("values"), A.values)], A.pattern),
)
cast(Any, optree.register_pytree_node)(
    SparseMatrix,
    lambda A: ((A.values,), A.pattern, ("values",)),
    lambda pattern, leaves: _unflatten(leaves, pattern),
    namespace=optree.registry.__GLOBAL_NAMESPACE,
)
